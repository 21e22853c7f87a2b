"""The fused GPU kernels: one dispatch an operator, what is refused, and that every GPU target compiles them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from data import Shape, causal_conv, linear_attention
from harness import DEVICE_ATTRIBUTES, TARGETS, compile_module, lowered, lowered_all, node_for
from iree.compiler import ir
from iree.compiler.api import Session
from linattn.dialect_patterns.attention.fused_mma import emit_attention_fused_mma as emit_mma_attention
from linattn.dialect_patterns.attention.simt_tiles import emit_attention_fused_simt_tiles as emit_tiles_attention
from linattn.dialect_patterns.causal_conv.op import choose as choose_conv
from linattn.dialect_patterns.emit.builder import Builder
from linattn.dialect_patterns.emit.dialect_modules import load_dialects
from linattn.dialect_patterns.linear_attention.contract import LinearAttention, parse
from linattn.dialect_patterns.linear_attention.fused_mma_chunks import is_legal as mma_is_legal
from linattn.dialect_patterns.linear_attention.fused_simt import is_legal
from linattn.dialect_patterns.linear_attention.fused_simt_chunks import is_legal as chunks_are_legal
from linattn.dialect_patterns.linear_attention.fused_simt_plan import plan_for
from linattn.dialect_patterns.linear_attention.fused_warp_chunks import plan_for as warp_plan_for
from linattn.dialect_patterns.linear_attention.mma_crossover import FASTER_FROM, least_tokens
from linattn.dialect_patterns.linear_attention.op import choose
from linattn.dialect_patterns.node import Node
from linattn.dialect_patterns.op import MICROSOFT, LoweringOptions
from linattn.dialect_patterns.select import No
from linattn.dialect_patterns.target import Target
from linattn.frontend.targets import TargetOptions, resolve_target
from state_ops import specs_of

GPU = Target("vulkan", is_gpu=True, subgroup_size=32)
PLAIN = Target("vulkan", is_gpu=True)
LARGE = Target("vulkan", is_gpu=True, subgroup_size=32, workgroup_memory=49_152)
MATRICES = replace(LARGE, name="cuda", matrix_stride="elements", max_threads=1024)
OPTIONS = LoweringOptions()


@pytest.fixture(autouse=True)
def _targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "gpu", GPU)
    monkeypatch.setitem(TARGETS, "plain", PLAIN)
    monkeypatch.setitem(TARGETS, "large", LARGE)
    monkeypatch.setitem(TARGETS, "matrices", MATRICES)
    monkeypatch.setitem(TARGETS, "warps", replace(MATRICES, copy_memory=98_304))
    monkeypatch.setitem(TARGETS, "vulkan:hopper", replace(LARGE, matrix_stride="chunks"))


def emit(
    op_type: str,
    inputs: list[Any],
    attributes: dict[str, Any],
    target: str,
    open_dims: bool = True,
    session: Session | None = None,
) -> ir.Module:
    context = session.context if session else None
    specs = specs_of(op_type, inputs, open_dims)
    return lowered("", op_type, 27, specs, attributes, 2, target, OPTIONS, context)


def contract_of(shape: Shape, tokens: int = 4, dtype: Any = np.float32) -> LinearAttention:
    specs = specs_of("LinearAttention", linear_attention(shape, 1, tokens, dtype=dtype), False)
    return parse(node_for("", "LinearAttention", 27, specs, shape.attributes, 2))


def count(module: ir.Module) -> Counter[str]:
    found: Counter[str] = Counter()

    def visit(op: ir.Operation) -> ir.WalkResult:
        found[op.name] += 1
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return found


@pytest.mark.parametrize("target", ["gpu", "plain"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_one_dispatch(target: str, tokens: int) -> None:
    shape = Shape(dk=64, dv=64)
    ops = count(emit("LinearAttention", linear_attention(shape, 1, tokens), shape.attributes, target, False))
    assert ops["flow.dispatch"] == ops["hal.executable.source"] == 1
    assert ops["linalg.generic"] == 0
    assert (ops["gpu.shuffle"] > 0) == (target == "gpu")
    if target == "gpu":  # two subgroups share the columns of one token's state, and wait for each other once
        assert ops["gpu.barrier"] == (1 if tokens == 1 else 0)
    else:
        assert ops["gpu.barrier"]
    assert ops["scf.for"] == (0 if tokens == 1 else 1)


@pytest.mark.parametrize("open_dims", [True, False])
def test_two_dispatches_for_many_tokens(open_dims: bool) -> None:
    shape = Shape(q_heads=2, dk=64, dv=64)
    module = emit("LinearAttention", linear_attention(shape, 1, 40), shape.attributes, "large", open_dims)
    ops = count(module)
    assert ops["flow.dispatch"] == ops["hal.executable.source"] == 2
    assert ops["linalg.generic"] == 0
    assert "_factors" in str(module)


@pytest.mark.parametrize(
    ("heads", "dk", "groups", "parts"),
    [(4, 128, 2, 4), (16, 128, 2, 4), (32, 128, 4, 4), (64, 128, 4, 2), (64, 256, 2, 2)],
)
def test_warps_of_a_workgroup(heads: int, dk: int, groups: int, parts: int) -> None:
    """As was measured to be fastest; all of it in the memory that there is."""
    p = warp_plan_for(contract_of(Shape(q_heads=heads, k_heads=heads, kv_heads=heads, dk=dk, dv=128), 64, np.float16))
    assert (p.groups, p.parts) == (groups, parts)
    assert p.all_memory <= 98_304


@pytest.mark.parametrize(
    ("strategy", "target"),
    [
        ("fused_simt_chunks", "large"),
        ("fused_mma_chunks", "matrices"),
        ("fused_mma_chunks", "vulkan:hopper"),
        ("fused_warp_chunks", "warps"),
        ("fused_term_chunks", "matrices"),
    ],
)
def test_prompts_of_all_sizes_share_the_chunks_kernels(strategy: str, target: str) -> None:
    """A driver compiles every kernel when the module is loaded: one of each for a layer's shape, not for each T too."""
    shape = Shape(q_heads=2, dk=64, dv=64, decay="key" if strategy == "fused_term_chunks" else "head")
    nodes = [
        node_for("", "LinearAttention", 27, specs_of("LinearAttention", inputs, False), shape.attributes, 2)
        for inputs in (linear_attention(shape, 1, tokens, dtype=np.float16) for tokens in (64, 256, 512))
    ]
    module = lowered_all(nodes, target, LoweringOptions(strategy=strategy))
    ops = count(module)
    assert ops["flow.dispatch"] == 6
    assert ops["hal.executable.source"] == 2
    for tokens in (64, 256, 512):
        assert f"tensor<1x{tokens}x128xf16>" in str(module)  # the results' sizes stay known


def test_prompts_of_all_sizes_share_a_convolution() -> None:
    """Of channels that lie side by side; one token, and channels apart, have kernels for their size."""
    nodes: list[Node] = []
    for tokens in (64, 256, 512):
        inputs = causal_conv(1, 32, tokens, 4, past=False)
        inputs[0] = inputs[0].transpose(0, 2, 1)  # type: ignore[union-attr]
        specs = specs_of("CausalConvWithState", inputs, False)
        nodes.append(node_for(MICROSOFT, "CausalConvWithState", 1, specs, {"channels_last": 1}, 2))
    ops = count(lowered_all(nodes, "gpu"))
    assert ops["flow.dispatch"] == 3
    assert ops["hal.executable.source"] == 1


@pytest.mark.parametrize(("emit_kernel", "dtype"), [(emit_mma_attention, "f16"), (emit_tiles_attention, "f32")])
def test_prompts_of_all_sizes_share_attentions_kernels(emit_kernel: Any, dtype: str) -> None:
    """Of few rows the keys are cut into parts, which are joined; of many they are not."""
    lengths, context = (16, 64, 256, 2048, 4096), ir.Context()
    load_dialects(context)
    cache = f"tensor<1x2x4096x64x{dtype}>"
    queries = ", ".join(f"%q{t}: tensor<1x8x{t}x64x{dtype}>" for t in lengths)
    with context, ir.Location.unknown():
        module = ir.Module.parse(f"""
            func.func @main({queries}, %k: {cache}, %v: {cache}, %first: index) {{
              return
            }}""")
        block = module.body.operations[0].regions[0].blocks[0]
        *given, k, v, first = block.arguments
        with ir.InsertionPoint(block.operations[0]):
            for q in given:
                y = emit_kernel(
                    Builder(), MATRICES, q, k, v, first=first, scale=0.125, softcap=0.0, left=None, sink=None,
                    bias=None, **({"heads": None} if dtype == "f16" else {}),
                )  # fmt: skip
                assert y.type == q.type
        module.operation.verify()
        ops = count(module)
    assert ops["flow.dispatch"] == 8  # the first three are joined
    assert ops["hal.executable.source"] == 5  # over all keys, over a part, and the joins of 32, 8 and 2 parts


@pytest.mark.parametrize(
    ("change", "target", "reason"),
    [
        ({"decay": "key"}, "large", "decays per key"),
        ({"q_heads": 4}, "large", "2 query heads"),
        ({"dk": 48}, "large", "a 48x64 state does not divide into 32x16"),
        ({"dv": 24}, "large", "a 64x24 state"),
        ({"dk": 1024}, "large", "cannot hold 16 columns of 1024"),
        ({"dk": 512}, "large", "bytes of the workgroup's memory, more than 49152"),
        ({"dk": 128}, "gpu", "more than 16384"),
        ({}, "plain", "without subgroups"),
        ({}, "cpu", "not a GPU"),
    ],
)
def test_reasons_against_chunks(change: dict[str, Any], target: str, reason: str) -> None:
    shape = replace(Shape(q_heads=2, dk=64, dv=64), **change)
    legality = chunks_are_legal(contract_of(shape, 40), TARGETS[target])
    assert isinstance(legality, No)
    assert reason in legality.reason


@pytest.mark.parametrize(
    ("change", "dtype", "target", "reason"),
    [
        ({}, np.float16, "cpu", "not a GPU"),
        ({}, np.float16, "large", "without products of 16x16 matrices"),
        ({}, np.float32, "matrices", "f32: terms of 16 bits would lose some of it"),
        ({"decay": "key"}, np.float16, "matrices", "decays per key"),
        ({"dk": 96}, np.float16, "matrices", "a 96x64 state does not divide into 64x16"),
        ({"dv": 40}, np.float16, "matrices", "a 64x40 state"),
        ({"dk": 256}, np.float16, "matrices", "bytes of the workgroup's memory, more than 49152"),
    ],
)
def test_reasons_against_matrix_units(change: dict[str, Any], dtype: Any, target: str, reason: str) -> None:
    shape = replace(Shape(q_heads=2, dk=64, dv=64), **change)
    legality = mma_is_legal(contract_of(shape, 40, dtype), TARGETS[target])
    assert isinstance(legality, No)
    assert reason in legality.reason


def test_matrix_units_are_taken_where_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By streams and tokens; the form of warps first, where they are told to copy."""
    contract, few = (contract_of(Shape(q_heads=n, dk=64, dv=64), 40, np.float16) for n in (4, 2))
    assert choose(contract, MATRICES, LoweringOptions("fused_mma_chunks")).reason == "asked for"
    monkeypatch.setitem(FASTER_FROM, "elements", ((2, 64), (4, 32)))
    assert choose(few, MATRICES, OPTIONS).rejected["fused_mma_chunks"] == "T=40 is less than 64 tokens"
    assert choose(contract, MATRICES, OPTIONS).strategy == "fused_mma_chunks"
    assert least_tokens("elements", 1) is None
    monkeypatch.setitem(FASTER_FROM, "warps", ((4, 32),))
    warps = replace(MATRICES, copy_memory=98_304)
    assert choose(contract, warps, OPTIONS).strategy == "fused_warp_chunks"
    assert choose(few, warps, OPTIONS).rejected["fused_warp_chunks"] == "not measured for so few heads"
    assert "fused_warp_chunks" in choose(contract, replace(warps, copy_memory=0), OPTIONS).rejected
    keys = Shape(q_heads=2, dk=64, dv=64, decay="key")
    assert choose(contract_of(keys, 64, np.float16), warps, OPTIONS).strategy == "fused_term_chunks"
    short = choose(contract_of(keys, 40, np.float16), warps, OPTIONS)
    assert short.strategy == "fused_simt"
    assert short.rejected["fused_term_chunks"] == "T=40 is less than 64 tokens"
    fast = replace(warps, fast_math=True)
    assert choose(contract_of(keys, 64), fast, OPTIONS).strategy == "fused_term_chunks"
    assert choose(contract_of(keys, 64), warps, OPTIONS).rejected["fused_term_chunks"].endswith("for --math fast")
    head = contract_of(replace(keys, decay="head"), 64)
    assert choose(head, fast, OPTIONS).strategy == "fused_term_chunks"
    on_vulkan = choose(head, replace(fast, matrix_stride="chunks"), OPTIONS)
    assert on_vulkan.strategy == "fused_simt_chunks"
    assert "as fast" in on_vulkan.rejected["fused_term_chunks"]


@pytest.mark.parametrize(
    ("target", "arch", "strategy"),
    [
        ("cuda", "sm_80", "fused_mma_chunks"),
        ("cuda", "sm_80", "fused_warp_chunks"),
        ("vulkan", "hopper", "fused_mma_chunks"),
    ],
)
@pytest.mark.parametrize(("rule", "dtype"), [("gated_delta", np.float16), ("linear", ml_dtypes.bfloat16)])
def test_matrix_units_compile(
    target: str, arch: str, strategy: str, rule: str, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real ones, for open and static sizes."""
    resolved = resolve_target(target, TargetOptions(gpu_target=arch))
    monkeypatch.setitem(TARGETS, "real", resolved.capabilities)
    if resolved.device_attribute:
        monkeypatch.setitem(DEVICE_ATTRIBUTES, "real", resolved.device_attribute)
    shape = Shape(rule, q_heads=2, dk=128, dv=128)
    session = Session()
    session.set_flags(*resolved.flags, "--iree-input-type=none")
    inputs = linear_attention(shape, 1, 40, dtype=dtype)
    options = LoweringOptions(strategy)
    specs = specs_of("LinearAttention", inputs, rule == "linear")
    module = lowered("", "LinearAttention", 27, specs, shape.attributes, 2, "real", options, session.context)
    ops = count(module)
    assert ops["flow.dispatch"] == ops["hal.executable.source"] == 2
    assert ops["gpu.subgroup_mma_compute"] > 0
    assert len(compile_module(module, session, "real")) > 0


@pytest.mark.parametrize(("target", "arch"), [("cuda", "sm_80"), ("vulkan", "hopper")])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (Shape("gated_delta", "key", q_heads=2, dk=128, dv=128), np.float16),
        (Shape("gated", "key", q_heads=2, dk=64, dv=64), ml_dtypes.bfloat16),
        (Shape("gated_delta", q_heads=2, dk=128, dv=128), np.float32),
    ],
    ids=["f16", "bf16", "f32"],
)
def test_terms_compile(target: str, arch: str, shape: Shape, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With real matrix units; their memory is what any such GPU has."""
    resolved = resolve_target(target, TargetOptions(gpu_target=arch))
    monkeypatch.setitem(TARGETS, "real", replace(resolved.capabilities, fast_math=True))
    if resolved.device_attribute:
        monkeypatch.setitem(DEVICE_ATTRIBUTES, "real", resolved.device_attribute)
    session = Session()
    session.set_flags(*resolved.flags, "--iree-input-type=none")
    specs = specs_of("LinearAttention", linear_attention(shape, 1, 40, dtype=dtype), True)
    options = LoweringOptions("fused_term_chunks")
    module = lowered("", "LinearAttention", 27, specs, shape.attributes, 2, "real", options, session.context)
    assert count(module)["gpu.subgroup_mma_compute"] > 0
    assert len(compile_module(module, session, "real")) > 0


def test_one_dispatch_for_the_convolution() -> None:
    ops = count(emit("CausalConvWithState", causal_conv(1, 6, 5, 4), {"activation": "silu"}, "gpu"))
    assert ops["flow.dispatch"] == ops["hal.executable.source"] == 1
    assert ops["linalg.generic"] == 0


TARGET_OPTIONS = [
    ("cuda", "sm_89"), ("vulkan", "ada"), ("vulkan", "baseline"), ("vulkan", "rdna3"), ("vulkan", "valhall")
]  # fmt: skip


@pytest.mark.parametrize("target", TARGET_OPTIONS, ids=lambda t: "-".join(t))
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda t: t.__name__)
def test_compiles(target: tuple[str, str], dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = resolve_target(target[0], TargetOptions(gpu_target=target[1]))
    compile_both(resolved.flags, resolved.device_attribute, resolved.capabilities, dtype, monkeypatch)


OTHER_FLAGS = {
    "rocm": (("--iree-hal-target-device=hip", "--iree-rocm-target=gfx942"), 64),
    "metal": (("--iree-hal-target-device=metal",), 32),
}


@pytest.mark.parametrize("target", OTHER_FLAGS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda t: t.__name__)
def test_compiles_beyond_our_targets(target: str, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, subgroup = OTHER_FLAGS[target]
    compile_both(flags, None, Target(target, is_gpu=True, subgroup_size=subgroup), dtype, monkeypatch)


CHUNK_TARGETS = [("cuda", np.float32), ("vulkan", np.float16), ("rocm", ml_dtypes.bfloat16), ("metal", np.float16)]


@pytest.mark.parametrize(("target", "dtype"), CHUNK_TARGETS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_chunks_compile(target: str, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if target in OTHER_FLAGS:
        flags, subgroup = OTHER_FLAGS[target]
        capabilities, device = Target(target, is_gpu=True, subgroup_size=subgroup, workgroup_memory=32_768), None
    else:
        resolved = resolve_target(target, TargetOptions(gpu_target={"cuda": "sm_89", "vulkan": "ada"}[target]))
        flags, capabilities, device = resolved.flags, resolved.capabilities, resolved.device_attribute
    monkeypatch.setitem(TARGETS, "tested", capabilities)
    shape = Shape("gated_delta", q_heads=2, dk=128, dv=64)
    session = Session()
    session.set_flags("--iree-input-type=none", *flags)
    module = emit(
        "LinearAttention", linear_attention(shape, 1, 40, dtype=dtype), shape.attributes, "tested", session=session
    )
    assert "_factors" in str(module)
    if device is not None:
        module.operation.attributes["hal.device.targets"] = ir.Attribute.parse(device, session.context)
    assert len(compile_module(module, session, "tested")) > 0


def compile_both(
    flags: tuple[str, ...], device: str | None, target: Target, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TARGETS, "tested", target)
    shape = Shape("gated_delta", "key", dk=64, dv=64)
    cases = [
        ("LinearAttention", linear_attention(shape, 1, 8, dtype=dtype), shape.attributes),
        ("CausalConvWithState", causal_conv(1, 6, 5, 4, dtype=dtype), {"activation": "silu"}),
    ]
    for op_type, inputs, attributes in cases:
        session = Session()
        session.set_flags("--iree-input-type=none", *flags)
        module = emit(op_type, inputs, attributes, "tested", session=session)
        if device is not None:
            module.operation.attributes["hal.device.targets"] = ir.Attribute.parse(device, session.context)
        assert len(compile_module(module, session, "tested")) > 0


@pytest.mark.parametrize(
    ("shape", "target", "reason"),
    [
        (Shape(), Target("cpu", vector_bits=256), "cpu is not a GPU"),
        (Shape(q_heads=16, k_heads=1, kv_heads=1), GPU, "16 query heads read one state, more than 8"),
        (Shape(dk=1021, dv=8), GPU, "a thread cannot hold its part of a 1021x8 state"),
    ],
)
def test_refused_with_the_reason(shape: Shape, target: Target, reason: str) -> None:
    legality = is_legal(contract_of(shape), target)
    assert isinstance(legality, No)
    assert legality.reason == reason


@pytest.mark.parametrize("size", [32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("target", [GPU, PLAIN], ids=["subgroups", "none"])
def test_head_sizes_are_legal(size: int, target: Target) -> None:
    for dv in (size, 64):
        assert not isinstance(is_legal(contract_of(Shape(dk=size, dv=dv)), target), No)


@pytest.mark.parametrize(
    ("target", "heads", "size", "plan"),
    [
        (("cuda", "sm_90"), 16, (128, 128), "l32c4t128p1b1g32s4"),
        (("cuda", "sm_90"), 32, (128, 128), "l16c4t128p1b1g32s4"),  # enough states for wider parts
        (("vulkan", "hopper"), 16, (128, 128), "l32c4t128p1b1g32s4"),
        (("vulkan", "adreno"), 16, (128, 128), "l32c4t128p1b1g64s2"),
        (("vulkan", "xe"), 16, (256, 256), "l32c4t256p1b1g16s16"),
        (("vulkan", "hopper"), 16, (32, 32), "l8c4t32p1b1g32"),
        (("vulkan", "hopper"), 2, (80, 10), "l4c2t32p1b1g32"),  # columns that do not divide by four
    ],
)
def test_one_token_is_cut_as_was_measured(
    target: tuple[str, str], heads: int, size: tuple[int, int], plan: str
) -> None:
    capabilities = resolve_target(target[0], TargetOptions(gpu_target=target[1])).capabilities
    shape = Shape(q_heads=heads, k_heads=heads, kv_heads=heads, dk=size[0], dv=size[1])
    assert str(plan_for(contract_of(shape, tokens=1), capabilities)) == plan


def test_the_convolution_is_fused_unless_asked_otherwise() -> None:
    from harness import node_for
    from linattn.dialect_patterns.causal_conv.contract import parse as parse_conv

    specs = specs_of("CausalConvWithState", causal_conv(1, 6, 5, 4), False)
    contract = parse_conv(node_for("", "CausalConvWithState", 27, specs, {}, 2))
    assert choose_conv(contract, GPU, OPTIONS).strategy == "fused_simt"
    assert choose_conv(contract, GPU, LoweringOptions("recurrent")).strategy == "fused_simt"
    assert choose_conv(contract, GPU, LoweringOptions("direct")).strategy == "direct"
    assert choose_conv(contract, GPU, LoweringOptions("fused_simt")).strategy == "fused_simt"
