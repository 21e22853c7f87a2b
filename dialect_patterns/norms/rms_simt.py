"""Sum and RMS norm of rows as one GPU kernel, where IREE makes two of it: the norm, and the sum in its own type.

    total = x + skip (+ bias)                                       total in f32, rounded where it is stored
    y = total / sqrt(mean(total^2) + epsilon) * gamma

    %y, %total = flow.dispatch @rms_fused_simt_...[%rows](%x, %skip, %gamma, %bias?)

A workgroup has a row; its threads keep their part of it in registers between the sum of squares and the scaling.

Without it IREE 3.13 keeps all rows of a 16-bit prompt in each thread's own memory on Vulkan devices without subgroup
operations, which NVIDIA's driver refuses to compile, and with a bias in a workgroup's memory on others.

Legal: on GPUs, for static rows whose length 4 divides. Cost: inputs and outputs once.
"""

from __future__ import annotations

from iree.compiler import ir

from ..emit.builder import Builder, spec_of, tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import MAX_GROUPS, Group, Kernel, dispatch
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target

_WIDTH = 4
_MAX_THREADS = 256
_MAX_LOADS = 8  # of a row, for each thread
_PARTS = 16
"""Without subgroup operations: sums that so many threads make of the others' values."""


def is_legal(x: ir.Value, skip: ir.Value, target: Target) -> Legality:
    """For static rows that a workgroup can hold."""
    spec = spec_of(x)
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    if None in spec.shape or spec_of(skip).shape != spec.shape:
        return No(f"{spec} and {spec_of(skip)} are not of one static shape")
    size = spec.shape[-1] or 0
    if size % _WIDTH or not 0 < size <= _WIDTH * _MAX_LOADS * _threads(size, target):
        return No(f"rows of {size}")
    if not 0 < _rows(x) <= MAX_GROUPS:
        return No(f"{_rows(x)} rows")
    return Yes()


def _rows(x: ir.Value) -> int:
    rows = 1
    for size in spec_of(x).shape[:-1]:
        rows *= size or 0
    return rows


def _threads(size: int, target: Target) -> int:
    """As many as there are loads, in whole subgroups; a power of two."""
    threads = target.subgroup_size or _PARTS
    while 2 * threads <= min(_MAX_THREADS, target.max_threads) and threads * _WIDTH < size:
        threads *= 2
    return threads


def emit_rms_fused_simt(
    b: Builder,
    target: Target,
    x: ir.Value,
    skip: ir.Value,
    gamma: ir.Value,
    bias: ir.Value | None,
    epsilon: float,
    *,
    with_sum: bool,
) -> list[ir.Value]:
    """The norm of ``x + skip`` (and the bias), and that sum if it is wanted; both of the type of ``x``."""
    shape, dtype = [size or 0 for size in spec_of(x).shape], spec_of(x).dtype
    threads, rows = _threads(shape[-1], target), _rows(x)

    def body(k: Kernel) -> None:
        _emit(k, k.number(0), shape[-1], dtype, epsilon, with_bias=bias is not None, with_sum=with_sum)

    factor = epsilon.hex().replace(".", "p").replace("-", "m").replace("+", "")
    name = f"rms_fused_simt_{dtype}_nx{shape[-1]}_{factor}_g{target.subgroup_size}"
    name += ("" if bias is None else "_bias") + ("_sum" if with_sum else "")
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [
        (tensor_type(shape, dtype), []) for _ in range(1 + with_sum)
    ]
    inputs = [x, skip, gamma, *([bias] if bias is not None else [])]
    return dispatch(
        name, Group(threads, target.subgroup_size), 1, b.index(rows), [b.index(rows)], inputs, outputs, body
    )


def _emit(k: Kernel, rows: Scalar, size: int, dtype: str, epsilon: float, *, with_bias: bool, with_sum: bool) -> None:
    vectors, threads = size // _WIDTH, k.group.threads
    all_of_it, row_of_it = rows * vectors, Scalar.constant(vectors, "index")
    x, skip = k.buffer(0, dtype, all_of_it, _WIDTH), k.buffer(1, dtype, all_of_it, _WIDTH)
    gamma = k.buffer(2, dtype, row_of_it, _WIDTH)
    bias = k.buffer(3, dtype, row_of_it, _WIDTH) if with_bias else None
    y = k.buffer(3 + with_bias, dtype, all_of_it, _WIDTH)
    total = k.buffer(4 + with_bias, dtype, all_of_it, _WIDTH) if with_sum else None
    start, thread = k.item() * vectors, k.thread()
    sums, places, squares = list[ir.Value](), list[tuple[Scalar, Scalar]](), k.constant(0.0, _WIDTH)
    for first in range(0, vectors, threads):
        place = thread + first
        inside, place = place < vectors, place.minimum(vectors - 1)
        value = k.add(k.widen(x, k.load(x, start + place)), k.widen(skip, k.load(skip, start + place)))
        if bias is not None:
            value = k.add(value, k.widen(bias, k.load(bias, place)))
        counted = value if first + threads <= vectors else k.select(inside, value, k.constant(0.0, _WIDTH))
        squares = k.fma(counted, counted, squares)
        sums.append(value)
        places.append((inside, place))
    one, two, three, four = k.elements(squares)
    mean = k.mul(sum_over_workgroup(k, k.add(k.add(one, two), k.add(three, four))), k.constant(1.0 / size))
    factor = k.splat(k.rsqrt(k.add(mean, k.constant(epsilon))), _WIDTH)
    for value, (inside, place) in zip(sums, places, strict=True):

        def write(value: ir.Value = value, place: Scalar = place) -> None:
            weight = k.widen(gamma, k.load(gamma, place))
            k.store(k.mul(k.mul(value, factor), weight), y, start + place)
            if total is not None:
                k.store(value, total, start + place)

        k.when(inside, write)


def sum_over_workgroup(k: Kernel, value: ir.Value) -> ir.Value:
    """The sum of a value over all threads, a power of two."""
    if not k.group.subgroup:
        return _through_memory(k, value)
    offset, subgroup = 1, k.group.subgroup
    while offset < subgroup:
        value = k.add(value, k.shuffle_xor(value, offset))
        offset *= 2
    count = k.group.threads // subgroup
    if count == 1:
        return value
    scratch = k.shared(count)
    place, lane = k.thread().divide_unsigned(subgroup)
    k.when(lane.equals(0), lambda: k.store(value, scratch, place))
    k.barrier()
    return _added(k, [k.load(scratch, Scalar.constant(i, "index")) for i in range(count)])


def _through_memory(k: Kernel, value: ir.Value) -> ir.Value:
    """The sum by way of the workgroup's memory alone: a few threads add up shares, all of them the few."""
    threads, thread = k.group.threads, k.thread()
    values, shares = k.shared(threads), k.shared(_PARTS)
    k.store(value, values, thread)
    k.barrier()
    part = thread & (_PARTS - 1)
    share = _added(k, [k.load(values, part + i) for i in range(0, threads, _PARTS)])
    k.when(thread < _PARTS, lambda: k.store(share, shares, thread))
    k.barrier()
    return _added(k, [k.load(shares, Scalar.constant(i, "index")) for i in range(_PARTS)])


def _added(k: Kernel, found: list[ir.Value]) -> ir.Value:
    """The sum of a power of two of values."""
    while len(found) > 1:
        found = [k.add(found[i], found[i + 1]) for i in range(0, len(found), 2)]
    return found[0]
