"""The way of a model, as one readable list of stages: load, check, pair states, plan, import, rewrite, compile."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from iree.compiler import ir
from linattn.dialect_patterns.emit.builder import Builder
from linattn.dialect_patterns.exact_gelu import mend_gelu
from linattn.dialect_patterns.exact_quotients import correct_quotients
from linattn.dialect_patterns.guarded_divisions import guard_divisions
from linattn.dialect_patterns.guarded_reads import guard_reads
from linattn.dialect_patterns.kept_nans import keep_nans
from linattn.dialect_patterns.op import INTERNAL, LoweringContext, LoweringOptions
from linattn.dialect_patterns.reduced_angles import reduce_angles
from linattn.dialect_patterns.rewrite import lower_operators
from linattn.dialect_patterns.unsigned_reductions import make_reductions_unsigned
from linattn.dialect_patterns.wide_conversions import widen_conversions
from linattn.runtime.errors import InputError, LoweringError
from linattn.runtime.integrity import seal_file, sealed
from linattn.runtime.manifest import REFLECTION_KEY, RESULTS_KEY, EntryPoint
from linattn.runtime.outputs import check_outputs, new_file
from linattn.runtime.text.files import TextFiles

from .graph.bind_dims import bind_dims
from .graph.branches import flatten_branches
from .graph.check_operands import check_operands
from .graph.expand_swish import expand_swish
from .graph.extra_outputs import add_outputs
from .graph.finite_check import FINITE, check_finite
from .graph.gate_columns import gate_columns
from .graph.index_bounds import index_bounds
from .graph.inline_functions import inline_functions
from .graph.join_attention import join_attention
from .graph.join_convolutions import join_convolutions
from .graph.join_gates import join_gates
from .graph.join_norms import join_norms
from .graph.join_packed_products import join_packed_products
from .graph.join_products import join_products
from .graph.last_position import LEAST_TOKENS, keep_last
from .graph.masked_experts import raise_masked_experts
from .graph.name_nodes import name_nodes
from .graph.near_ids import near_ids
from .graph.next_token import DRAW_INPUT, choose_next
from .graph.quantised_weights import pack_quantised_weights
from .graph.raising.raise_operators import RAISED_OPS, raise_operators
from .graph.raising.tokens import mixes_tokens
from .graph.ranked_top_k import rank_top_k
from .graph.raw_values import raw_values
from .graph.rotate_heads import rotate_heads
from .graph.schema import check_contracts, check_supported, domain_of, infer_types, opset_versions
from .graph.single_token import squeezes_tokens
from .graph.specialize import SpecializedGraph, specialize
from .graph.split_columns import split_columns
from .graph.split_convolutions import split_convolutions
from .graph.state_names import Pairing
from .graph.states import find_states
from .graph.trailing_inputs import drop_trailing_inputs
from .graph.transpose_weights import transpose_weights
from .graph.unused_outputs import leave_out_unused_outputs
from .graph.validate import check_graph
from .graph.weights_outside import move_weights_outside
from .graph.wide_reductions import widen_reductions
from .limits import check_memory
from .lower.alone import describe_alone
from .lower.importer import Signature, import_entry_point
from .lower.iree import CompiledCode, Compiler
from .lower.parameters import PARAMETER_SCOPE, write_parameters
from .lower.weights import Weights
from .model import LoadedModel, load_model
from .options import CompiledModel, CompileOptions
from .plan.abi import describe_abi
from .plan.choices import describe_choices
from .plan.dims import find_roles
from .plan.entry_points import ModuleOptions, ModulePlan, plan_module
from .plan.module import describe_module
from .plan.report import Progress, write_report
from .process.guard import last_net
from .targets import CompileTarget, resolve_target
from .targets.math import with_math
from .text import add_text, report_text, text_files, with_text


@last_net
def compile_model(
    source: str | Path | onnx.ModelProto,
    options: CompileOptions | None = None,
    *,
    output: str | Path | None = None,
    progress: Progress | None = None,
    take_weights: Callable[[Mapping[str, np.ndarray[Any, Any]]], None] | None = None,
) -> CompiledModel:
    """Compile an ONNX model for a target in this process, which ends with the compiler where that aborts.

    Args:
        source: Path of the model, or the model itself.
        options: What to compile for.
        output: File for the module; it appears whole or not at all. Without it the bytes are returned.
        progress: Told of each stage.
        take_weights: Given the weights by content key, instead of the file ``options.parameters`` being written; the
            module reads them from a file of that name all the same.

    Raises:
        UnsupportedModelError: if the model is damaged or cannot be compiled; nothing has been compiled then.
        TargetError: if the target or one of its options is not known.
        LoweringError: if a forced strategy is not legal or IREE fails.
        InputError: if an output is an input, another output, or not a plain file.
        LinattnError: if an output cannot be written.
    """
    options = options or CompileOptions()
    progress = progress or Progress(6)
    target = with_math(resolve_target(options.target, options.machine), options.math)
    with progress.stage("load and check the model"):
        model = load_model(source)
        text = text_files(options.tokenizer, model.path)
        _check_outputs([*model.files, *(text.paths if text is not None else ())], options, output)
        bind_dims(model.proto, options.dims)
        inline_functions(model.proto)
        name_nodes(model.proto.graph)
        drop_trailing_inputs(model.proto.graph)
        choices = flatten_branches(model.proto)
        # This says more of an unknown operator than ONNX's checker.
        written = [node for node in model.proto.graph.node if node.name not in choices]
        check_supported(written, opset_versions(model.proto), passed=(*RAISED_OPS, "Swish"))
        check_graph(model.proto)
        add_outputs(model.proto, options.extra_outputs)
        expand_swish(model.proto.graph)
        raising = raise_operators(model.proto)
        versions = opset_versions(model.proto)
        written = [node for node in model.proto.graph.node if domain_of(node) != INTERNAL]
        check_supported(written, versions, raising.misses)
        leave_out_unused_outputs(model.proto)
        pack_quantised_weights(model)
        transpose_weights(model)
        mixtures = raise_masked_experts(model)
        one_token = mixes_tokens(model.proto, raising.tokens) if raising.tokens is not None else None
        raw_values(model.proto.graph)
        move_weights_outside(model)
    with progress.stage("pair states, plan entry points"):
        plan, graphs, needed = _plan(model, versions, options, target, one_token or "")
        plan, functions = _functions(plan, graphs, options)
    report = describe_choices(model, plan, graphs, versions, _lowering_options(options), target)
    report.call_bytes = needed
    report.notes += [*raising.notes, *mixtures]
    manifest = describe_module(model, plan, report, target, options)
    compiler = Compiler(target, options.dump_ir)
    # IREE 3.13 cannot tell the memory of functions that loop over tokens, and fails.
    loops = options.strategy == "recurrent" or any(
        row.op.endswith("SelectiveScan") and "recurrent" in row.strategy for row in report.nodes
    )
    can_take = not loops and all(_is_static(graph) for graph in functions.values())
    signature = dataclasses.replace(plan.signature(), takes_results=can_take and not options.plain_abi)
    if options.guard != "none" and not target.capabilities.is_gpu:
        report.notes.append("--guard: no function for it, for a CPU's states are read where they are, which is faster")
    elif options.guard != "none":
        found = check_finite(functions[plan.entry_points[0].symbol], plan.states) if signature.takes_results else None
        if found is not None:
            functions[FINITE] = found
            manifest = dataclasses.replace(manifest, finite=FINITE)
        else:
            report.notes.append("--guard: no function for it, for the states or their memory have no known sizes")
    signatures = {symbol: _signature(signature, graph) for symbol, graph in functions.items()}
    report.abi = describe_abi(plan, signatures, functions)
    with progress.stage(f"import {len(functions)} entry points"), compiler.building():
        module = ir.Module.create()
        module.operation.attributes["sym_name"] = ir.StringAttr.get("linattn")
        if target.device_attribute is not None:
            module.operation.attributes["hal.device.targets"] = ir.Attribute.parse(target.device_attribute)
        weights = Weights(module, model.weights, model.keys, PARAMETER_SCOPE if options.parameters else None)
        for symbol, graph in functions.items():
            reflection = {REFLECTION_KEY: manifest.to_json()} if symbol == plan.entry_points[0].symbol else {}
            if signature.takes_results:
                own = signatures[symbol]
                reflection[RESULTS_KEY] = json.dumps([_result(name, own, graph) for name in own.results])
            import_entry_point(symbol, graph, signatures[symbol], weights, reflection)
        compiler.dump(module, "import")
    with progress.stage("lower operators"):
        with compiler.building():
            context = LoweringContext(Builder(), target.capabilities, _lowering_options(options), weights=weights)
            lower_operators(module, context)
            weights.drop_unused()
            compiler.dump(module, "lower-operators")
        compiler.convert_torch(module, takes_workspace=signature.takes_results)
        with compiler.building():
            guard_reads(module)
            guard_divisions(module)
            mend_gelu(module)
            reduce_angles(module)
            if target.capabilities.is_gpu and not target.capabilities.matrix_units:
                widen_conversions(module)
                keep_nans(module)
                correct_quotients(module)
            if target.capabilities.matrix_units:  # CUDA's code generation
                make_reductions_unsigned(module)
        compiler.dump(module, "linalg")
    if options.dry_run:
        report.output = "none, since this was a dry run"
        return _finish(CompiledModel(b"", manifest, report), text, options, progress)
    with progress.stage(f"generate code for {target.name} ({target.description})"):
        code = compiler.compile(module, manifest, progress.write, takes_results=signature.takes_results)
        manifest = code.manifest
        report.alone = describe_alone(manifest)
        report.joined = code.joined
    with progress.stage("write"):
        if take_weights is not None:
            take_weights(weights.archive())
        params = options.parameters if take_weights is None else None
        data = _write(code, weights, output, params, text)
        report.output = str(output or "in memory")
        report.output_bytes = Path(output).stat().st_size if output else len(data)
    return _finish(CompiledModel(data, manifest, report), text, options, progress)


def _finish(
    compiled: CompiledModel, text: TextFiles | None, options: CompileOptions, progress: Progress
) -> CompiledModel:
    """Completes the report, and writes it where it is wanted."""
    report = compiled.report
    if text is not None:
        report_text(text, report)
    report.stages = dict(progress.seconds)
    if options.report is not None:
        write_report(options.report, report.to_dict())
    return compiled


def _check_outputs(read: Sequence[Path], options: CompileOptions, output: str | Path | None) -> None:
    inputs = [*read, *([options.gpu_target] if options.gpu_target else [])]
    check_outputs({"-o": output, "--parameters": options.parameters, "--report": options.report}, inputs)
    if options.dump_ir is not None and options.dump_ir.exists() and not options.dump_ir.is_dir():
        raise InputError("not a folder", where=f"--dump-ir {options.dump_ir}", hint="choose another name")


def _write(
    code: CompiledCode, weights: Weights, output: str | Path | None, params: Path | None, text: TextFiles | None
) -> bytes:
    """Writes the module and its weights, both or none as far as the system lets us; returns it without a file."""
    if output is None:
        if params is not None:
            write_parameters(params, weights.archive())
        return sealed(code.to_bytes() if text is None else with_text(code.to_bytes(), text))
    with new_file(output) as partial:
        code.write(partial)
        if text is not None:
            add_text(partial, text)
        seal_file(partial)
        if params is not None:
            write_parameters(params, weights.archive())
    return b""


def _is_static(graph: SpecializedGraph) -> bool:
    """Whether all sizes are known, so that the memory of a call is too."""
    values = (*graph.proto.graph.input, *graph.proto.graph.output)
    return all(d.HasField("dim_value") for v in values for d in graph.types[v.name].tensor_type.shape.dim)


def _signature(common: Signature, graph: SpecializedGraph) -> Signature:
    """What one function takes and gives."""
    if graph.proto.graph.name == FINITE:
        names = [[value.name for value in values] for values in (graph.proto.graph.input, graph.proto.graph.output)]
        return Signature(names[0], names[1], {}, takes_position=False, takes_results=True)
    draws = DRAW_INPUT in graph.types
    return dataclasses.replace(common, arguments=[*common.arguments, DRAW_INPUT]) if draws else common


def _result(name: str, signature: Signature, graph: SpecializedGraph) -> list[Any] | None:
    """Element type and shape of a result, None if it is written into an argument."""
    if name in signature.tied:
        return None
    tensor = graph.types[name].tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return [dtype, [dim.dim_value for dim in tensor.shape.dim]]


def _lowering_options(options: CompileOptions) -> LoweringOptions:
    return LoweringOptions(options.strategy, options.chunk_size)


def _plan(
    model: LoadedModel, versions: Mapping[str, int], options: CompileOptions, target: CompileTarget, one_token: str
) -> tuple[ModulePlan, list[SpecializedGraph], dict[str, int]]:
    """The plan, a graph for each entry point, and the bytes that each of known sizes needs at most."""
    graph = model.proto.graph
    types = infer_types(model.proto)
    if widen_reductions(graph, types):
        types = infer_types(model.proto)
    pairs = find_states(graph, Pairing(options.states, options.no_states), types)
    check_contracts(graph, types, versions, partial=True)  # before a broken node leaves later ones without types
    roles = find_roles(graph, types, pairs)
    blocks = target.prefill_blocks if options.prefill_blocks == "default" else options.prefill_blocks
    assert not isinstance(blocks, str)
    module_options = ModuleOptions(options.batch, options.max_context, blocks)
    plan = plan_module(graph, types, versions, pairs, roles, module_options)
    graphs: list[SpecializedGraph] = []
    needed: dict[str, int] = {}
    for entry in plan.entry_points:
        sizes = plan.sizes(entry)
        specialized = specialize(model.proto, sizes, plan.state_types, plan.capacity_pairs, model.weights)
        single = (squeezes_tokens(specialized) or one_token) if entry.kind == "prefill" else ""
        if single:  # decode comes first
            plan = plan.without_prefill(f"the model takes one token a call ({single}): prompts go through decode")
            break
        contracts = check_contracts(specialized.proto.graph, specialized.types, versions)
        check_operands(specialized, versions)
        held = check_memory(specialized, contracts, entry.symbol, options.max_memory)
        if _is_static(specialized):
            needed[entry.symbol] = held
        ranked = rank_top_k(specialized, target.capabilities)
        ranked = split_columns(ranked, target.capabilities)
        lowering = _lowering_options(options)
        cut = split_convolutions(ranked, versions, target.capabilities, lowering)
        rotated = rotate_heads(cut, versions, target.capabilities)
        joined = join_products(rotated, versions, target.capabilities, lowering)
        packed = join_packed_products(joined, versions, target.capabilities, lowering)
        opened = gate_columns(packed, target.capabilities)
        stepped = join_attention(opened, versions, target.capabilities)
        gated = join_gates(stepped, versions, target.capabilities, lowering)
        convolved = join_convolutions(gated, versions, target.capabilities, lowering)
        graphs.append(join_norms(convolved, versions, target.capabilities, lowering))
    bounds = index_bounds(graphs, [spec.name for spec in plan.inputs])
    inputs = tuple(dataclasses.replace(spec, bounds=bounds.get(spec.name)) for spec in plan.inputs)
    ids = [spec.name for spec in plan.inputs if spec.role in ("tokens", "position_ids")]
    planned = zip(graphs, plan.entry_points, strict=True)
    graphs = [near_ids(graph, ids, entry.tokens, target.capabilities) for graph, entry in planned]
    return dataclasses.replace(plan, inputs=inputs), graphs, needed


def _functions(
    plan: ModulePlan, graphs: Sequence[SpecializedGraph], options: CompileOptions
) -> tuple[ModulePlan, dict[str, SpecializedGraph]]:
    """Symbol -> graph of all functions: the entry points, each followed by its variants that hand back less.

    After a large one that for the last position, after that of one token that for the next token.
    """
    logits = [output.name for output in plan.outputs if output.role == "logits" and output.token_axis == 1]
    ids = [spec.name for spec in plan.inputs if spec.role == "tokens"]
    entries: list[EntryPoint] = []
    functions: dict[str, SpecializedGraph] = {}
    for entry, graph in zip(plan.entry_points, graphs, strict=True):
        functions[entry.symbol] = graph
        many = len(logits) == 1 and entry.tokens is not None and entry.tokens >= LEAST_TOKENS
        short = keep_last(graph, logits[0], entry.tokens or 0) if many else None
        symbol = f"{entry.symbol}_last"
        if short is not None:
            functions[symbol] = short
        entries.append(dataclasses.replace(entry, last=symbol) if short is not None else entry)
        if options.sampler != "none" and entry.tokens == 1 and len(logits) == len(ids) == 1:
            draws = options.sampler == "draw"
            next_token = choose_next(graph, logits[0], ids[0], draws=draws)
            symbol = f"{entry.symbol}_{'draw' if draws else 'token'}"
            if next_token is not None:
                functions[symbol] = next_token
                chosen = {"draw" if draws else "token": symbol}
                entries[-1] = dataclasses.replace(entries[-1], **chosen)
    notes = list(plan.notes)
    if options.sampler != "none" and not any(entry.token or entry.draw for entry in entries):
        why = "no step of one token has one row of logits an id"
        if plan.batch is None:
            why += " (the batch is open)"
        notes.append(f"--sampler {options.sampler}: no token can be chosen, for {why}")
    return dataclasses.replace(plan, entry_points=tuple(entries), notes=tuple(notes)), functions


__all__ = ["CompileOptions", "CompiledModel", "LoweringError", "compile_model"]
