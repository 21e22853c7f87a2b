"""What a mask adds to the scores, in the GPU kernels of softmax attention."""

from __future__ import annotations

from iree.compiler import ir

from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Kernel
from .simt_call import Call, Sizes


class Bias:
    """Adds the bias [B or 1, Hq or 1, T or 1, S] to scores of one key head.

    Args:
        k: The kernel.
        c: What is computed.
        n: Its sizes.
        binding: Of the bias, f32.
        head: The key head, counted through the batch.
    """

    def __init__(self, k: Kernel, c: Call, n: Sizes, binding: int, head: Scalar) -> None:
        assert c.bias_dims is not None
        self._k, self._c, self._n, self._dims = k, c, n, c.bias_dims
        count = Scalar.constant(c.keys, "index")
        for has, size in zip(self._dims, (c.batch, c.kv_heads * c.group, n.tokens), strict=True):
            count = count * size if has else count
        self._buffer: Buffer = k.buffer(binding, "f32", count)
        self._batch, self._head = head.divide_unsigned(c.kv_heads)

    def added(self, score: ir.Value, row: Scalar, key: Scalar) -> ir.Value:
        """The score of a row of the key head (its query heads and their tokens); -inf where the mask hides the key.

        Nothing is added to a score there: NaN of a hidden key would stay NaN.
        """
        k, c = self._k, self._c
        member, token = self._n.member(row)
        place = self._batch if self._dims[0] else Scalar.constant(0, "index")
        if self._dims[1]:
            place = place * (c.kv_heads * c.group) + self._head * c.group + member
        if self._dims[2]:
            place = place * self._n.tokens + token
        bias = k.load(self._buffer, place * c.keys + key)
        hidden = k.constant(float("-inf"))
        return k.select(Scalar(bias).equals(Scalar(hidden)), hidden, k.add(score, bias))
