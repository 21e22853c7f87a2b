"""Strategy ``fused_simt``: the whole recurrence as one GPU kernel, the state in registers over all tokens.

    S <- exp(g) * S;   u = beta * (v - k S);   S <- S + k^T u;   o = scale * q S       (linear, gated: u = v)

    hal.executable.source @linear_attention_gated_delta_fused_simt_... {
      count(states): (column tiles, states up to 32768, the rest of them)
      load S; scf.for %t { gpu.shuffle sums of k S over the lanes of a column; update S; sums of q S; store o }; store S
    }
    %output, %present = flow.dispatch @...[%states](%states, %T, %query, %key, %value, %past, %decay, %beta)

A column of S lies over several threads (``fused_simt_plan.py``), which sum their parts by shuffles, or through the
workgroup's memory on targets without subgroup operations. The loads of the next tokens are under way during a token.
Open B and T are numbers of the dispatch, so one kernel serves any. Where T is 1 there is one sum instead of two, and
columns may lie in several subgroups (``fused_simt_step.py``).

Legal: on GPUs, for up to 8 query heads a state, if a thread can hold its part of S. Cost: every input is read once a
column tile and S once; 4 dk dv multiply-adds a token and head. Source: ONNX schema LinearAttention-27.
"""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from ..emit.builder import Size, tensor_type
from ..emit.simt_kernel import Kernel, dispatch
from ..node import TensorSpec
from ..op import LoweringContext
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target
from .contract import LinearAttention, output_specs
from .fused_simt_kernel import Before, Recurrence
from .fused_simt_plan import MAX_ROWS, plan_for
from .operands import Operands, kernel_name


def is_legal(contract: LinearAttention, target: Target) -> Legality:
    """On a GPU, if a thread can hold its part of the state."""
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    if contract.rows > MAX_ROWS:
        return No(f"{contract.rows} query heads read one state, more than {MAX_ROWS}")
    if plan_for(contract, target) is None:
        return No(f"a thread cannot hold its part of a {contract.dk}x{contract.dv} state")
    return Yes()


def emit_linear_attention_fused_simt(
    context: LoweringContext,
    contract: LinearAttention,
    x: Operands,
    before: Before | None = None,
    rates: Sequence[ir.Value] = (),
) -> list[ir.Value]:
    """Emit output and present state.

    Args:
        context: Where, and for what.
        contract: What to compute.
        x: The operands.
        before: What to compute of them first, for one token on a target with subgroup operations (``gated.py``).
        rates: With gates: dt_bias and decay_scale.
    """
    b, c, before = context.builder, contract, before or Before()
    plan = plan_for(c, context.target)
    assert plan is not None
    states = b.mul(x.batch, c.kv_heads)
    numbers = [size for size in (states, x.tokens) if not isinstance(size, int)]
    inputs = [value for value in (x.query, x.key, x.value, x.past, x.decay, x.beta) if value is not None]
    inputs += rates
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = []
    for spec in output_specs(c):
        sizes: list[Size] = [x.batch, x.tokens] if spec.rank == 3 else [x.batch]
        shape = [size if isinstance(size, int) else None for size in sizes] + list(spec.shape[len(sizes) :])
        outputs.append((tensor_type(shape, spec.dtype), [size for size in sizes if not isinstance(size, int)]))

    def body(k: Kernel) -> None:
        given = iter(range(len(numbers)))
        count = states if isinstance(states, int) else k.number(next(given))
        tokens = x.tokens if isinstance(x.tokens, int) else k.number(next(given))
        Recurrence(k, c, plan, count, tokens, before).emit()

    name = kernel_name(c, x, f"{plan}{before}")
    tiles = -(-c.dv // plan.tile)
    return dispatch(name, plan.group, tiles, b.index(states), numbers, inputs, outputs, body)


def emit_convolved(
    context: LoweringContext,
    contract: LinearAttention,
    before: Before,
    inputs: Sequence[ir.Value],
    present: TensorSpec,
) -> list[ir.Value]:
    """Emit output, present state and the convolution's, of one token (``convolved.py``).

    Args:
        context: Where, and for what.
        contract: What to compute.
        before: What to compute of the operands first, the convolution among it.
        inputs: The convolution's input, weight, bias and past, the past state, what makes decays and rates.
        present: Type of the convolution's state.
    """
    b, c = context.builder, contract
    plan, states = plan_for(c, context.target), (c.batch or 0) * c.kv_heads
    assert plan is not None

    def body(k: Kernel) -> None:
        Recurrence(k, c, plan, states, 1, before).emit()

    specs = [*output_specs(c), present]
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [
        (tensor_type([size or 0 for size in spec.shape], spec.dtype), []) for spec in specs
    ]
    name, tiles = kernel_name(c, None, f"{plan}{before}"), -(-c.dv // plan.tile)
    return dispatch(name, plan.group, tiles, b.index(states), [], inputs, outputs, body)
