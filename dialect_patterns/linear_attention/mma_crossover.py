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
}
"""By what multiplies, ``warps`` or ``Target.matrix_stride``: (streams, tokens), streams from few to many."""


def least_tokens(kind: str | None, streams: int) -> int | None:
    """The least T from which on it is faster, by the last row with no more streams; None where none is known.

    Args:
        kind: ``warps`` or the target's ``matrix_stride``.
        streams: B * max(Hq, Hkv).
    """
    known = [tokens for count, tokens in FASTER_FROM.get(kind or "", ()) if count <= streams]
    return known[-1] if known else None
