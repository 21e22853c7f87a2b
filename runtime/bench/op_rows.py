"""Rows of an operator's result: kernel time, rates, and how much faster than the peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .timing import median


def kernel_time(kind: str, samples: Mapping[str, Sequence[float]], chain: int) -> dict[str, Any]:
    """The time of the kernel alone, as far as it can be told.

    Args:
        kind: `linattn`, `onnxruntime` or `fla`.
        samples: Seconds of each `call`, of each call of a trivial model (`overhead`), of each `chain`, and of each
            `kernel` by the device's clock (FLA: of a replayed CUDA graph).
        chain: Nodes of the chain.

    Returns:
        `seconds`, None where the time drowns in the noise, and the `method`.
    """
    if samples["kernel"]:
        seconds = median(samples["kernel"])
        return {"seconds": seconds, "method": "CUDA graph, median" if kind == "fla" else "device clock, median"}
    if kind == "fla":
        return {"seconds": None, "method": "not told"}
    if samples["chain"]:
        seconds = (min(samples["chain"]) - min(samples["call"])) / (chain - 1)
        method = f"(chain of {chain} - call) / {chain - 1}, least times"
    else:
        seconds = median(samples["call"]) - median(samples["overhead"])
        method = "call - overhead, medians"
    return {"seconds": seconds, "method": method} if seconds > 0 else {"seconds": None, "method": f"{method}: noise"}


def rate(rows: Sequence[dict[str, Any]], devices: Mapping[str, Any]) -> None:
    """Adds rates, of the kernel where its time is known, and their share of the device's ceilings."""
    for row in rows:
        seconds = row["kernel"]["seconds"] or row["call"]["median"]
        ceilings = devices.get(row["target"], {}).get("ceilings")
        for amount, rate, ceiling in (
            ("bytes", "bytes_per_s", "copy_bytes_per_s"),
            ("flop", "flop_per_s", "fma_flop_per_s"),
        ):
            row[rate] = row[amount] / seconds
            row[f"{rate}_of_ceiling"] = row[rate] / ceilings[ceiling] if ceilings else None


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Adds how many times faster than the peer a row is.

    The peer is the first right one of the same case on the same target, or else the first one anywhere.
    """
    for row in rows:
        same = [o for o in rows if o["tokens"] == row["tokens"] and o["dtype"] == row["dtype"] and o["status"] == "ok"]
        peers = [other for other in same if other["kind"] != "linattn"]
        near = [other for other in peers if other["target"] == row["target"].partition("@")[0]]
        peer = next(iter(near or peers), None)
        wanted = row["status"] == "ok" and peer is not None and row is not peer
        row["peer"] = peer["subject"] if wanted and peer else None
        row["speedup_min"] = peer["call"]["min"] / row["call"]["min"] if wanted and peer else None
        row["speedup"] = peer["call"]["median"] / row["call"]["median"] if wanted and peer else None
