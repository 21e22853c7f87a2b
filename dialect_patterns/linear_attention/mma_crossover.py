r"""From how many tokens on chunks on matrix units beat the strategies without: measured data, no more.

Microseconds of both kernels on an H100 (80 GB HBM3), B=1, gated_delta, d=128, f16, a state of f32; 26 November 2026:

| CUDA, H=16 | T=32 | 64 | 128 | 256 | 1024 | 4096 |
|---|---|---|---|---|---|---|
| fused_warp_chunks | 6.8 | 8.1 | 10.9 | 16.6 | 52.5 | 209 |
| fused_simt_chunks | 9.8 | 12.8 | 18.6 | 30.3 | 103 | 405 |
| fused_simt | 10.4 | 18.4 | 34.4 | 66.3 | 257 | 1308 |
| CUDA, H=32: fused_warp_chunks | 7.5 | 9.2 | 12.5 | 19.7 | 77.2 | 299 |
| fused_mma_chunks | | | | 27.3 | 92.2 | 336 |
| fused_simt_chunks | 13.0 | 17.9 | 28.0 | 48.4 | 177 | 688 |
| Vulkan, H=16: fused_mma_chunks | 15.1 | 17.0 | 21.0 | 28.3 | 74.9 | 255 |
| fused_simt_chunks | 20.4 | 23.5 | 30.1 | 42.5 | | |
| fused_simt | 17.3 | 26.9 | 46.4 | 85.5 | | |
| Vulkan, H=32: fused_mma_chunks | | | | | 112 | 387 |

The same with decays of a key dimension:

| CUDA, H=16 | T=64 | 256 | 1024 | 4096 |
|---|---|---|---|---|
| fused_term_chunks | 16.0 | 28.7 | 99.7 | 393 |
| fused_simt | 23.1 | 84.2 | 329 | 1787 |
| CUDA, H=32: fused_term_chunks | 19.6 | 44.9 | 169 | 665 |
| fused_simt | 32.5 | 116 | 519 | 2060 |
| Vulkan, H=16: fused_term_chunks | 35.4 | 48.7 | 153 | 473 |
| fused_simt | 36.8 | 122 | 461 | 1991 |
| Vulkan, H=32: fused_term_chunks | 38.7 | 65.3 | 220 | 740 |
| fused_simt | 44.8 | 151 | 606 | |

To measure again, with FLA's kernels beside them:

    for heads in 16 32; do
      linattn-bench op --op linear_attention --rule gated_delta --heads $heads --dim 128 --dtype f16 \
        --tokens 32,64,128,256,1024,4096 --strategies fused_simt,fused_simt_chunks,fused_mma_chunks,fused_warp_chunks \
        --peers fla --targets cuda:sm_89,vulkan:hopper --json mma_$heads.json --markdown mma_$heads.md
    done
"""

from __future__ import annotations

FASTER_FROM: dict[str, tuple[tuple[int, int], ...]] = {
    "warps": ((1, 32),),  # fused_warp_chunks
    "elements": ((1, 256),),  # fused_mma_chunks, CUDA
    "chunks": ((1, 32),),  # fused_mma_chunks, Vulkan
    "keys, elements": ((1, 64),),  # fused_term_chunks, CUDA
    "keys, chunks": ((1, 64),),  # and Vulkan
}
"""By what multiplies, ``warps`` or ``Target.matrix_stride``, the latter after ``keys, `` where decays are of key
dimensions: (streams, tokens), streams from few to many."""


def least_tokens(kind: str | None, streams: int) -> int | None:
    """The least T from which on it is faster, by the last row with no more streams; None where none is known.

    Args:
        kind: ``warps`` or the target's ``matrix_stride``, after ``keys, `` for decays of key dimensions.
        streams: B * max(Hq, Hkv).
    """
    known = [tokens for count, tokens in FASTER_FROM.get(kind or "", ()) if count <= streams]
    return known[-1] if known else None
