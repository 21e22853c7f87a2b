"""From how many tokens on ``fused_mma_chunks`` beats the other strategies: measured data, no more.

It has run on no GPU yet, so there are none. To measure both on an H100, with the kernels' own times beside FLA's:

    for heads in 16 32 64; do
      linattn-bench op --op linear_attention --rule gated_delta --heads $heads --dim 128 --dtype f16,bf16 \
        --tokens 32,64,128,256,512,1024,4096,16384 --strategies fused_simt_chunks,fused_mma_chunks --peers fla \
        --targets cuda:sm_89,vulkan:hopper --json mma_$heads.json --markdown mma_$heads.md
    done

Expected there from ptxas (sm_90: 128 and 133 registers, at most 8 bytes spilt; 1,290 instructions a chunk in the first
kernel, about 600 in the second, 68 of them HMMA): 45 to 65 us for T=1024 and 32 heads, 110 to 170 us for T=4096 and 16,
where ``fused_simt_chunks`` takes 166 and 384 us. Measure, and write a row for every number of streams: the least T from
which on the second is faster.
"""

from __future__ import annotations

FASTER_FROM: dict[str, tuple[tuple[int, int], ...]] = {
    "elements": (),  # CUDA
    "chunks": (),  # Vulkan
}
"""By ``Target.matrix_stride``: (streams, tokens) with the streams, B * max(Hq, Hkv), from few to many."""


def least_tokens(kind: str | None, streams: int) -> int | None:
    """The least T from which on it is faster, by the last row with no more streams; None where none is known.

    Args:
        kind: The target's ``matrix_stride``.
        streams: B * max(Hq, Hkv).
    """
    known = [tokens for count, tokens in FASTER_FROM.get(kind or "", ()) if count <= streams]
    return known[-1] if known else None
