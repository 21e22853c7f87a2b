r"""From how many tokens on chunks on matrix units beat the strategies without: measured data, no more.

Microseconds of all kernels on an H100 (80 GB HBM3), gated_delta, f16, a state of f32; 26 November 2026, `307d9d7`
(streams are B * H). Each the best strategy without matrix units / with them:

| CUDA: fused_simt or fused_simt_chunks / fused_warp_chunks | T=16 | 32 | 64 | 256 | 1024 | 4096 |
|---|---|---|---|---|---|---|
| B=1, H=4, d=128 | 5.8 / 6.0 | 9.4 / 6.0 | 12.2 / 7.2 | 29.6 / 14.0 | 97.5 / 40.9 | 373 / 150 |
| H=8 | 5.8 / 6.1 | 9.4 / 6.2 | 12.6 / 7.2 | 29.7 / 14.0 | 99.1 / 41.9 | 387 / 164 |
| H=16 | 6.5 / 6.3 | 9.9 / 6.4 | 12.9 / 7.6 | 30.6 / 14.6 | 104 / 44.4 | 407 / 185 |
| H=32 | 8.9 / 7.6 | 13.2 / 7.8 | 18.2 / 9.7 | 48.8 / 21.8 | 179 / 74.7 | 693 / 288 |
| H=64; B=4, H=16 is within 1 % | 13.7 / 11.1 | 18.8 / 11.6 | 28.0 / 15.3 | 88.4 / 40.7 | 336 / 153 | 1300 / 571 |
| H=16, d=64 | 6.1 / 5.7 | 7.5 / 5.7 | 9.6 / 6.8 | 22.5 / 13.1 | 76.8 / 39.7 | 301 / 165 |
| H=16, d=128x256 | 9.2 / 7.4 | 12.9 / 7.6 | 17.9 / 9.4 | 47.2 / 20.7 | 168 / 67.7 | 654 / 267 |
| H=16, d=256 | 13.2 / 9.5 | 19.1 / 10.0 | 26.6 / 12.4 | 72.1 / 27.0 | 269 / 96.5 | 1044 / 371 |

| Vulkan: the same / fused_mma_chunks | T=16 | 32 | 64 | 128 | 1024 | 4096 |
|---|---|---|---|---|---|---|
| B=1, H=4, d=128 | 11.9 / 14.0 | 16.7 / 14.2 | 22.7 / 15.7 | 29.0 / 19.3 | 117 / 65.5 | 423 / 219 |
| H=8 | 11.9 / 14.0 | 16.8 / 14.1 | 22.7 / 16.0 | 29.2 / 19.9 | 118 / 64.4 | 443 / 227 |
| H=16 | 12.3 / 14.8 | 17.2 / 14.7 | 23.4 / 16.5 | 30.2 / 20.4 | 123 / 69.0 | 460 / 240 |
| H=32 | 14.5 / 15.4 | 20.7 / 15.5 | 28.1 / 18.2 | 38.4 / 24.0 | 209 / 108 | 760 / 366 |
| H=64; B=4, H=16 is within 2 % | 18.8 / 20.2 | 28.0 / 20.7 | 41.5 / 25.7 | 62.7 / 35.6 | 399 / 197 | 1503 / 720 |
| H=16, d=64 | 9.3 / 13.4 | 12.5 / 13.8 | 19.0 / 15.5 | | 90.4 / 59.4 | 335 / 214 |
| H=16, d=128x256 | 14.4 / 15.4 | 20.3 / 15.7 | 28.2 / 18.4 | | 201 / 100 | 721 / 343 |

Of 64 heads the CUDA kernels had four warps a group; with two, as they have since, T=4096 took 456 us before warps
shared their work. Vulkan's of d=64 are chosen from 32 tokens on, too, where they take 1.3 us more. On CUDA
``fused_mma_chunks`` takes 92 and 336 us for T=1024 and 4096 of 32 heads: for GPUs without ``mma.sync``.

The same with decays of a key dimension, and in f32 with decays of a head (``--math fast``):

| CUDA, H=16, decays per key | T=32 | 64 | 256 | 1024 | 4096 |
|---|---|---|---|---|---|
| fused_term_chunks | 12.5 | 14.4 | 26.4 | 93.6 | 358 |
| fused_simt | 12.8 | 23.1 | 84.2 | 329 | 1787 |
| H=32: fused_term_chunks | 14.7 | 17.8 | 42.3 | 155 | 575 |
| fused_simt | | 32.5 | 116 | 519 | 2060 |
| Vulkan, H=16: fused_term_chunks | 22.6 | 24.5 | 38.0 | 138 | 490 |
| fused_simt | 22.6 | 36.8 | 122 | 461 | 1991 |
| H=32: fused_term_chunks | 23.8 | 27.7 | 58.2 | 202 | 725 |
| fused_simt | | 44.8 | 151 | 606 | |
| CUDA, H=16, f32: fused_term_chunks | 10.2 | 12.6 | 26.8 | 99.6 | 384 |
| fused_simt_chunks | 10.0 | 13.0 | 30.9 | 109 | 424 |
| H=32: fused_term_chunks | 13.2 | 17.1 | 46.0 | 167 | 625 |
| fused_simt_chunks | 13.4 | 18.2 | 47.9 | 184 | 712 |
| Vulkan, H=16, f32: fused_term_chunks | | 27.7 | 43.8 | 146 | 494 |
| fused_simt_chunks | | 23.8 | 43.2 | 140 | 482 |

Of the rows of fused_term_chunks with decays per key the first kernel was measured in one run, the second in another.

To measure again, with FLA's kernels beside them:

    for heads in 16 32; do
      linattn-bench op --op linear_attention --rule gated_delta --heads $heads --dim 128 --dtype f16 \
        --tokens 32,64,128,256,1024,4096 --strategies fused_simt,fused_simt_chunks,fused_mma_chunks,fused_warp_chunks \
        --peers fla --targets cuda:sm_89,vulkan:hopper --json mma_$heads.json --markdown mma_$heads.md
    done
"""

from __future__ import annotations

FASTER_FROM: dict[str, tuple[tuple[int, int], ...]] = {
    "warps": ((1, 32), (16, 16)),  # fused_warp_chunks
    "elements": ((1, 256),),  # fused_mma_chunks, CUDA
    "chunks": ((1, 32),),  # fused_mma_chunks, Vulkan
    "keys, elements": ((1, 64),),  # fused_term_chunks, CUDA
    "keys, chunks": ((1, 64),),  # and Vulkan
    "f32, elements": ((1, 64),),  # and CUDA in f32
}
"""By what multiplies, ``warps`` or ``Target.matrix_stride``, the latter after ``keys, `` where decays are of key
dimensions, or after ``f32, ``: (streams, tokens), streams from few to many."""


def least_tokens(kind: str | None, streams: int) -> int | None:
    """The least T from which on it is faster, by the last row with no more streams; None where none is known.

    Args:
        kind: ``warps`` or the target's ``matrix_stride``, after ``keys, `` for decays of key dimensions or ``f32, ``.
        streams: B * max(Hq, Hkv).
    """
    known = [tokens for count, tokens in FASTER_FROM.get(kind or "", ()) if count <= streams]
    return known[-1] if known else None
