"""The operator entries of LinearAttention: which strategy, and lowering with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from iree.compiler import ir
from linattn.runtime.errors import LoweringError

from ..emit.builder import spec_of
from ..op import MICROSOFT, Choice, LoweringContext, LoweringOptions, Op
from ..select import Legality, No, Strategy, Yes, not_emitted, select
from ..target import Target
from . import (
    chunked,
    fused_mma_chunks,
    fused_simd,
    fused_simt,
    fused_simt_chunks,
    fused_term_chunks,
    fused_warp_chunks,
    recurrent,
)
from .contract import LinearAttention, output_types, parse
from .mma_chunk_operands import CHUNK
from .mma_crossover import FASTER_FROM, least_tokens
from .operands import prepare, present_state, refine_inputs, state_or_zeros

_CHUNK_SIZES = (8, 16, 32, 64, 128)
_MIN_TOKENS = 2
_MIN_CHUNKED_TOKENS = 32


def _chunked_is_preferred(contract: LinearAttention, target: Target, options: LoweringOptions) -> Legality:
    """Chunks pay off from two tokens on (measured on the CPU); a call with an open number of tokens has many."""
    chunk = chunk_size(contract, target, options)
    if target.is_gpu and None in (contract.tokens, contract.batch):
        return No("with open sizes IREE fuses what comes before it into its reductions, wrongly on Vulkan")
    if contract.tokens is not None and contract.tokens < _MIN_TOKENS:
        return No(f"T={contract.tokens} is less than {_MIN_TOKENS} tokens, where chunks do not pay off")
    return Yes(f"T={'?' if contract.tokens is None else contract.tokens}, chunks of {chunk} tokens")


def _fused_simd_is_preferred(contract: LinearAttention, target: Target, options: LoweringOptions) -> Legality:
    """Wherever it is legal, unless chunks of another size are asked for."""
    if options.chunk_size is not None:
        return No(f"chunks of {options.chunk_size} tokens are asked for")
    return Yes(fused_simd.describe(contract, target))


def _recurrent_is_preferred(contract: LinearAttention, target: Target, options: LoweringOptions) -> Legality:
    """What is left."""
    del contract, target, options
    return Yes("one token needs no chunks")


def _fused_simt_is_preferred(contract: LinearAttention, target: Target, options: LoweringOptions) -> Legality:
    """One kernel beats many wherever it is possible."""
    del target, options
    tokens = "?" if contract.tokens is None else contract.tokens
    return Yes(f"T={tokens} in one kernel, the state in registers")


def _fused_simt_chunks_is_preferred(contract: LinearAttention, target: Target, options: LoweringOptions) -> Legality:
    """From a few chunks on, for which it was measured (H100)."""
    del target
    if options.chunk_size is not None:
        return No(f"chunks of {options.chunk_size} tokens are asked for")
    if contract.tokens is not None and contract.tokens < _MIN_CHUNKED_TOKENS:
        return No(f"T={contract.tokens} is less than {_MIN_CHUNKED_TOKENS} tokens")
    tokens = "?" if contract.tokens is None else contract.tokens
    return Yes(f"T={tokens} in two kernels: chunks of {fused_simt_chunks.CHUNK} tokens, the state in registers")


def _from_measured_tokens(contract: LinearAttention, options: LoweringOptions, kind: str | None, how: str) -> Legality:
    """Where it has been measured to be faster (``mma_crossover``)."""
    if options.chunk_size is not None:
        return No(f"chunks of {options.chunk_size} tokens are asked for")
    least = least_tokens(kind, (contract.batch or 1) * contract.out_heads)
    if least is None:
        return No("not measured for so few heads")
    if contract.tokens is not None and contract.tokens < least:
        return No(f"T={contract.tokens} is less than {least} tokens")
    tokens = "?" if contract.tokens is None else contract.tokens
    return Yes(f"T={tokens} in two kernels: chunks of {CHUNK} tokens on the matrix units{how}")


def _fused_warp_chunks_is_preferred(contract: LinearAttention, target: Target, options: LoweringOptions) -> Legality:
    del target
    return _from_measured_tokens(contract, options, "warps", ", the state in warps' registers")


def _fused_mma_chunks_is_preferred(contract: LinearAttention, target: Target, options: LoweringOptions) -> Legality:
    return _from_measured_tokens(contract, options, target.matrix_stride, "")


def _fused_term_chunks_is_preferred(contract: LinearAttention, target: Target, options: LoweringOptions) -> Legality:
    kind = f"{'keys' if contract.decay == 'key' else 'f32'}, {target.matrix_stride}"
    if kind not in FASTER_FROM:
        return No("in f32 fused_simt_chunks is as fast here")
    return _from_measured_tokens(contract, options, kind, ", keys and queries in terms of f16")


STRATEGIES = (
    Strategy("fused_simd", fused_simd.is_legal, _fused_simd_is_preferred),
    Strategy("fused_warp_chunks", fused_warp_chunks.is_legal, _fused_warp_chunks_is_preferred),
    Strategy("fused_mma_chunks", fused_mma_chunks.is_legal, _fused_mma_chunks_is_preferred),
    Strategy("fused_term_chunks", fused_term_chunks.is_legal, _fused_term_chunks_is_preferred),
    Strategy("fused_simt_chunks", fused_simt_chunks.is_legal, _fused_simt_chunks_is_preferred),
    Strategy("fused_simt", fused_simt.is_legal, _fused_simt_is_preferred),
    Strategy("chunked", chunked.is_legal, _chunked_is_preferred),
    Strategy("recurrent", recurrent.is_legal, _recurrent_is_preferred),
)


def chunk_size(contract: LinearAttention, target: Target, options: LoweringOptions) -> int:
    """Tokens of a chunk: what was asked for, or the default of target and head size (NUMERICS section 0).

    Raises:
        LoweringError: if what was asked for is not a power of two from 8 to 128.
    """
    asked = options.chunk_size
    if asked is not None and asked not in _CHUNK_SIZES:
        raise LoweringError(
            "option 'chunk size'", where=contract.where, got=asked, expected=" or ".join(map(str, _CHUNK_SIZES))
        )
    large = max(contract.dk, contract.dv) >= 128
    if asked is not None:
        chunk = asked
    elif target.matrix_units:
        chunk = 64 if large else 32
    else:
        chunk = 32 if large else 16
    if contract.tokens is not None:  # one chunk of the next power of two is enough for a short call
        chunk = min(chunk, max(_CHUNK_SIZES[0], 1 << max(contract.tokens - 1, 0).bit_length()))
    return chunk


def choose(contract: LinearAttention, target: Target, options: LoweringOptions) -> Choice:
    """The strategy for a node.

    Raises:
        LoweringError: if a strategy is forced that is not legal.
    """
    choice = select(STRATEGIES, contract, target, options, contract.where)
    return replace(choice, rule=contract.rule, heads=contract.heads_text)


def _is_static(operands: Sequence[ir.Value | None]) -> bool:
    return all(operand is None or None not in spec_of(operand).shape for operand in operands)


def lower(
    context: LoweringContext, contract: LinearAttention, operands: Sequence[ir.Value | None]
) -> list[ir.Value | None]:
    """Emit the node with the chosen strategy; one value an output of the node."""
    b, c = context.builder, contract
    choice = choose(c, context.target, context.options)
    if choice.strategy == "fused_simd" and c.tokens != 0:
        inputs = refine_inputs(b, c, operands)
        query = inputs[0]
        assert query is not None
        results = fused_simd.emit_linear_attention_fused_simd(context, c, inputs, b.dim(query, 0), b.dim(query, 1))
        return [value if used else None for value, used in zip(results, c.used_outputs, strict=False)]
    if context.target.is_gpu and choice.strategy == "chunked" and _is_static(operands):
        # IREE 3.13 clones elementwise producers into the chunked form's reductions and then gives NaN on Vulkan.
        operands = [None if operand is None else b.barrier(operand) for operand in operands]
    x = prepare(b, c, operands)

    if isinstance(x.tokens, int) and x.tokens == 0:
        output = b.full(0.0, [x.batch, 0, c.out_heads * c.dv], c.dtype)
        results = [output, present_state(b, c, x.batch, state_or_zeros(b, c, x))]
    elif choice.strategy == "fused_warp_chunks":
        results = fused_warp_chunks.emit_linear_attention_fused_warp_chunks(context, c, x)
    elif choice.strategy == "fused_mma_chunks":
        results = fused_mma_chunks.emit_linear_attention_fused_mma_chunks(context, c, x)
    elif choice.strategy == "fused_term_chunks":
        results = fused_term_chunks.emit_linear_attention_fused_term_chunks(context, c, x)
    elif choice.strategy == "fused_simt_chunks":
        results = fused_simt_chunks.emit_linear_attention_fused_simt_chunks(context, c, x)
    elif choice.strategy == "fused_simt":
        results = fused_simt.emit_linear_attention_fused_simt(context, c, x)
    elif choice.strategy == "recurrent":
        results = recurrent.emit_linear_attention_recurrent(context, c, x)
    elif choice.strategy == "chunked":
        results = chunked.emit_linear_attention_chunked(context, c, x, chunk_size(c, context.target, context.options))
    else:
        raise not_emitted(choice.strategy)
    return [value if used else None for value, used in zip(results, c.used_outputs, strict=False)]


OPS = tuple(
    Op(domain, "LinearAttention", since, parse, output_types, lower, choose)
    for domain, since in (("", 27), (MICROSOFT, 1))
)
