"""Which unit of a machine a product ran on, by the name of its kernel, and what that unit could do.

The rates are not those of data sheets: clocks are not told in virtual machines. The machine's rate of f32 is measured
(`ceilings`), and a unit's is as many times that as the makers' tables give it operations in the same cycles: Intel's
and AMD's optimisation guides, Arm's of the Neoverse cores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from linattn.runtime.cpu import chosen_level
from linattn.runtime.manifest_target import Target

HOW = "the measured f32 rate times the operations that the unit has for one of it"


@dataclass(frozen=True)
class Unit:
    """A unit that multiplies.

    Attributes:
        name: For people.
        times: Useful operations for one of f32 in the same time.
        kernels: The names of its kernels, as a regular expression.
    """

    name: str
    times: float
    kernels: str


_BYTES = "mat_mul_n_bits_fused_simd_.*_"
_OWN = "(?:^|_)(?:mat_?mul|matvec|mmt4d|batch_matmul|vecmat)"
CPU_UNITS = (
    # 512 (bytes 1024) multiply-adds a cycle beside 32: two f32 vectors of 16 lanes.
    Unit("amx-bf16", 16, "mat_mul_n_bits_fused_amx_bf16_"),
    Unit("amx-int8", 32, "mat_mul_n_bits_fused_amx_"),
    Unit("amx-bf16", 16, "mat_mul_fused_(?:amx_bf16_|simd_bf16_.*_amx)"),
    Unit("amx-bf16, 2 products for one", 16 / 2, "mat_mul_fused_amx_f16_by_bf16_"),
    Unit("amx-bf16, 3 products for one", 16 / 3, "mat_mul_fused_amx_(?:f16|f32)_"),
    Unit("avx512_bf16", 2, "mat_mul_fused_simd_bf16_.*_v512_pairs"),
    Unit("bfdot", 2, "mat_mul_fused_simd_bf16_.*_v128_pairs"),
    Unit("bfmmla", 4, "mat_mul_fused_simd_bf16_.*_v128_squares"),
    Unit("amx-bf16", 16, "attention_fused_amx_"),
    Unit("avx512_bf16", 2, "attention_fused_simd_many_pairs_.*_v512"),
    # Four bytes a lane where f32 has one element; where two instructions make one product, in half of the time.
    Unit("avx512_vnni", 4, _BYTES + "avx512vnni_v(?:512|256)"),
    Unit("avx_vnni", 4, _BYTES + "avxvnni_v256"),
    Unit("avx512bw, bytes", 2, _BYTES + "avx512bw_v512"),
    Unit("avx2, bytes", 2, _BYTES + "avx2_v256"),
    Unit("ssse3, bytes", 2, _BYTES + "ssse3_v128"),
    Unit("i8mm", 8, _BYTES + "i8mm_v128"),
    Unit("dotprod", 4, _BYTES + "dotprod_v128"),
    Unit("f32, 512 bits", 1, "(?:fused_simd|experts_(?:first|second|product))_.*_v512"),
    Unit("f32, 256 bits", 1, "(?:fused_simd|experts_(?:first|second|product))_.*_v256"),
    Unit("f32, 128 bits", 1, "(?:fused_simd|experts_(?:first|second|product))_.*_v128"),
    Unit("f32, IREE's", 1, _OWN),
)
"""Of CPUs, the first that fits."""

GPU_UNITS = (
    Unit("matrix units", 0, "_fused_mma_|linear_attention_.*_(?:mma|warp|term)_"),
    Unit("f32", 1, "_fused_(?:simt|tiled)_"),
    Unit("IREE's", 0, _OWN),
)
"""Of GPUs; 0: the rate of matrix products in f16 is measured itself, where somebody tells it."""

_PRODUCT = re.compile(
    r"mat_?mul|matvec|mmt4d|vecmat|experts_(?:first|second|product)|attention_(?!step_|fused_simt_join_)"
)
_BYTES_OF_LEVELS = re.compile("_avx512vnni_v(?:512|256)_")
_LEVELS = {"x86-64-v4+vnni": ("avx512vnni", "v512"), "x86-64-v3": ("avx2", "v256"), "x86-64-v2": ("ssse3", "v128")}
_ARRANGED = re.compile(r"mat_mul_(?:n_bits_)?(?:amx_)?rows_|_rounded_")


def unit_of(key: str, target: Target) -> Unit | None:
    """The unit of a dispatch.

    Args:
        key: Its name.
        target: What the module was compiled for.

    Returns:
        None where it is no product, or a portable module's name does not tell.
    """
    if not _PRODUCT.search(key) or _ARRANGED.search(key):
        return None
    if target.architecture is None:
        return next((unit for unit in GPU_UNITS if re.search(unit.kernels, key)), None)
    if target.levels and "fused_simd" in key:
        key = _of_level(key, chosen_level(target))
    return next((unit for unit in CPU_UNITS if re.search(unit.kernels, key)), None)


def _of_level(key: str, level: str | None) -> str:
    """What the kernel would be called that was made for one level only."""
    kind, width = _LEVELS.get(level or "", ("", ""))
    return f"mat_mul_n_bits_fused_simd__{kind}_{width}" if _BYTES_OF_LEVELS.search(key) else f"fused_simd__{width}"


def add_units(rows: Sequence[dict[str, Any]], target: Target, ceilings: Mapping[str, Any] | None, cores: float) -> None:
    """Give rows of a profile `unit`, `unit_flop_per_s` and `unit_share`.

    Args:
        rows: See `profile_entry`.
        target: What the module was compiled for.
        ceilings: Of its device, None where they were not measured.
        cores: The part of the machine's cores that worked.
    """
    for row in rows:
        units = [unit_of(key, target) for key in row.get("kernels") or [row["key"]]]
        several = {unit for unit in units if unit is not None}
        unit = several.pop() if len(several) == 1 else None  # joined dispatches may use more than one
        rate = None if unit is None else _rate(unit, row["dtype"], ceilings or {})
        rate = rate and rate * cores
        known = rate and row["flop"] and row["seconds"]
        row["unit"] = None if unit is None else unit.name
        row["unit_flop_per_s"] = rate
        row["unit_share"] = row["flop"] / row["seconds"] / rate if known else None


def _rate(unit: Unit, dtype: str | None, ceilings: Mapping[str, Any]) -> float | None:
    if not unit.times:
        matrix = ceilings.get("matrix_flop_per_s")
        return matrix if unit.name == "matrix units" or dtype in ("f16", "bf16") else ceilings.get("fma_flop_per_s")
    measured = ceilings.get("fma_flop_per_s")
    return measured and unit.times * measured
