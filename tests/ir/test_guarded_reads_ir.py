"""Which indices are clamped: those that data decides, once."""

from __future__ import annotations

import pytest
from iree.compiler import ir
from linattn.dialect_patterns.guarded_reads import guard_reads

MODULE = """
func.func @main(%table: tensor<SIZExf32>, %ids: tensor<4xi64>) -> tensor<4xf32> {
  %init = tensor.empty() : tensor<4xf32>
  %0 = linalg.generic {indexing_maps = [affine_map<(d0) -> (d0)>, affine_map<(d0) -> (d0)>],
      iterator_types = ["parallel"]} ins(%ids : tensor<4xi64>) outs(%init : tensor<4xf32>) {
  ^bb0(%id: i64, %out: f32):
    BODY
    %v = tensor.extract %table[%at] : tensor<SIZExf32>
    linalg.yield %v : f32
  } -> tensor<4xf32>
  return %0 : tensor<4xf32>
}
"""
GIVEN = "%at = arith.index_cast %id : i64 to index"
COUNTED = "%at = linalg.index 0 : index"
MOVED = "%i = linalg.index 0 : index\n %c = arith.constant 1 : index\n %at = arith.addi %i, %c : index"
WITHIN = """%c0 = arith.constant 0 : i64
    %c9 = arith.constant 9 : i64
    %a = arith.minsi %id, %c9 : i64
    %b = arith.maxsi %a, %c0 : i64
    %at = arith.index_cast %b : i64 to index"""
ONE_OF_TWO = """%c0 = arith.constant 0 : index
    %c9 = arith.constant 9 : index
    %zero = arith.constant 0 : i64
    %is = arith.cmpi slt, %id, %zero : i64
    %at = arith.select %is, %c0, %c9 : index"""
ADDED = f"{GIVEN.replace('%at', '%i')}\n %c = arith.constant 1 : index\n %at = arith.addi %i, %c : index"


@pytest.mark.parametrize(
    ("body", "size", "count"),
    [
        (GIVEN, "10", 1),
        (GIVEN, "?", 1),
        (ADDED, "10", 1),
        (COUNTED, "10", 0),
        (MOVED, "?", 0),
        (WITHIN, "10", 0),
        (WITHIN, "9", 1),
        (ONE_OF_TWO, "10", 0),
        (ONE_OF_TWO, "9", 1),
    ],
)
def test_what_is_clamped(body: str, size: str, count: int) -> None:
    with ir.Context(), ir.Location.unknown():
        module = ir.Module.parse(MODULE.replace("BODY", body).replace("SIZE", size))
        assert guard_reads(module) == count
        module.operation.verify()
        text = str(module)
        assert text.count("arith.maxsi") == count + (body == WITHIN)
        assert size == "?" or guard_reads(module) == 0


def test_far_numbers_are_clamped_before_they_become_indices() -> None:
    """Indices have 32 bits on some devices; 2^32 would be 0."""
    with ir.Context(), ir.Location.unknown():
        module = ir.Module.parse(MODULE.replace("BODY", GIVEN).replace("SIZE", "10"))
        guard_reads(module)
        assert "arith.minsi %in, %c9_i64 : i64" in str(module)
