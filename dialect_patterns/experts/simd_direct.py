"""The kernels of strategy ``fused_simd`` for few tokens: each reads the weights of the chosen experts, row by row.

h [T k, I]: a workgroup per assignment and group of panels: gate and factor, their biases, activated
y [T, H]:   a workgroup per token and group of panels: sum over its k experts of w (h W2_e^T + b2_e)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..emit.dispatch import Kernel
from ..emit.kernel_text import Index, KernelText, vector_type
from ..mat_mul.simd_direct import direct_products
from ..mat_mul.simd_edges import store_rows
from ..mat_mul.simd_plan import Plan
from ..node import TensorSpec
from ..target import Target
from .activation import activate_text
from .contract import Experts
from .simd_bias import Bias
from .simd_layers import first_layers, second_layer
from .simd_routing import load_number


def first_kernel(c: Experts, target: Target) -> Kernel:
    """The first layer and the activation."""
    layers, rows = first_layers(c), c.rows or 0
    p = layers[0].direct(target, rows * c.chosen)
    biases = [(m, TensorSpec((c.count, m.columns), m.dtype)) for m in (c.fc1, c.fc3) if m and m.bias is not None]

    def write(k: KernelText, batch: Index, tokens: Index, memrefs: Sequence[str]) -> None:
        del batch, tokens
        x, experts, *weights = memrefs[: 2 + len(layers)]
        given = dict(zip([m.name for m, _ in biases], memrefs[2 + len(layers) :], strict=False))
        h = memrefs[-1]
        assignment = k.op("hal.interface.workgroup.id[1] : index", "index")
        token = k.div(assignment, c.chosen)
        expert = load_number(k, experts, [token, k.rem(assignment, c.chosen)], c.count)
        factor = _factor_bias(k, c, given)
        gate = Bias(k, given.get("fc1"), layers[0].layout, 0, c.inner)
        matrices = [(weights[i], layer, part) for i, layer in enumerate(layers) for part in range(layer.parts)]

        def panel(index: Index) -> None:
            parts: list[list[str]] = []
            for (memref, layer, part), bias in zip(matrices, (gate, factor), strict=False):
                before = k.mul(k.add(k.mul(expert, layer.parts), part), layer.panels(p))
                sums = direct_products(k, p, x, memref, k.add(before, index), token)
                columns = [k.add(k.mul(index, p.width), v * p.lanes) for v in range(p.vectors)]
                parts.append([bias.add(s, expert, column) for s, column in zip(sums, columns, strict=True)])
            gates, factors = parts[0], parts[1] if len(parts) > 1 else [None] * p.vectors
            values = [activate_text(k, c.activation, g, f) for g, f in zip(gates, factors, strict=True)]
            store_rows(k, p, h, 1, assignment, index, values)

        _each_panel(k, p, panel)

    ends = "".join(f"_{m.name}" for m, _ in biases)
    shape = f"{rows}x{c.hidden}x{c.inner}_{c.chosen}of{c.count}"
    return Kernel(
        name=f"experts_first_{c.x.dtype}_{shape}_{c.layout}_{c.activation.key}{ends}_v{32 * p.lanes}",
        inputs=(
            TensorSpec((rows, c.hidden), c.x.dtype),
            TensorSpec((rows, c.chosen), "i32"),
            *(layer.packed(p.layout) for layer in layers),
            *(spec for _, spec in biases),
        ),
        outputs=(TensorSpec((rows * c.chosen, c.inner), "f32"),),
        axes=("__", "__", *("___" for _ in layers), *("__" for _ in biases), "__"),
        workgroups=(-(-p.panels // p.group), 1),
        write=write,
    )


def _factor_bias(k: KernelText, c: Experts, given: dict[str, str]) -> Bias:
    if c.layout == "separate":
        return Bias(k, given.get("fc3"), "plain", 0, c.inner)
    return Bias(k, given.get("fc1"), c.layout, 1, c.inner)


def second_kernel(c: Experts, target: Target) -> Kernel:
    """The second layer, and the sum over the experts of a token."""
    layer, rows = second_layer(c), c.rows or 0
    p = layer.direct(target, rows)
    bias = [TensorSpec((c.count, c.hidden), c.x.dtype)] if c.fc2.bias is not None else []

    def write(k: KernelText, batch: Index, tokens: Index, memrefs: Sequence[str]) -> None:
        del batch, tokens
        h, experts, weights, memref = memrefs[:4]
        given = Bias(k, memrefs[4] if bias else None, "plain", 0, c.hidden)
        y = memrefs[-1]
        token = k.op("hal.interface.workgroup.id[1] : index", "index")

        def panel(index: Index) -> None:
            columns = [k.add(k.mul(index, p.width), v * p.lanes) for v in range(p.vectors)]

            def one(j: Index, totals: list[str]) -> list[str]:
                expert = load_number(k, experts, [token, j], c.count)
                weight = k.splat(k.load(weights, [token, j]), p.lanes)
                stored = k.add(k.mul(expert, layer.panels(p)), index)
                sums = direct_products(k, p, h, memref, stored, k.add(k.mul(token, c.chosen), j))
                sums = [given.add(s, expert, column) for s, column in zip(sums, columns, strict=True)]
                return [k.fma(s, weight, total) for s, total in zip(sums, totals, strict=True)]

            totals = k.loop(c.chosen, [k.constant(0.0, vector_type(p.lanes))] * p.vectors, one)
            store_rows(k, p, y, 1, token, index, totals)

        _each_panel(k, p, panel)

    shape = f"{rows}x{c.inner}x{c.hidden}_{c.chosen}of{c.count}"
    return Kernel(
        name=f"experts_second_{c.x.dtype}_{shape}{'_bias' if bias else ''}_v{32 * p.lanes}",
        inputs=(
            TensorSpec((rows * c.chosen, c.inner), "f32"),
            TensorSpec((rows, c.chosen), "i32"),
            TensorSpec((rows, c.chosen), "f32"),
            layer.packed(p.layout),
            *bias,
        ),
        outputs=(TensorSpec((rows, c.hidden), c.x.dtype),),
        axes=("__", "__", "__", "___", *("__" for _ in bias), "__"),
        workgroups=(-(-p.panels // p.group), 1),
        write=write,
    )


def _each_panel(k: KernelText, p: Plan, body: Callable[[Index], None]) -> None:
    """``body(panel)`` for the panels of this workgroup."""
    first = k.mul(k.op("hal.interface.workgroup.id[0] : index", "index"), p.group)
    end = k.add(first, p.group)

    def one(index: Index, _: list[str]) -> list[str]:
        body(index)
        return []

    k.loop(end if p.panels % p.group == 0 else k.minimum(end, p.panels), [], one, start=first)
