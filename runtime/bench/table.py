"""Results as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from linattn.runtime.sizes import size_text

_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}

_BEYOND = 1.25
"""Of a unit's rate is no share of it: numpy's product, which tells the rates, reaches more than 80 % of its peak."""


def to_text(result: Mapping[str, Any]) -> str:
    """The whole result: where, the rows, what is absent."""
    lines = [_machine_line(result["machine"]), *_device_lines(result["devices"])]
    lines.append("versions  " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()))
    lines.append("")
    lines += {"op": _op_lines, "model": _model_lines, "profile": _profile_lines}[result["kind"]](result)
    if result["absent"]:
        lines.append("")
        lines += [f"absent    {_absent(row)}: {row['reason']}" for row in result["absent"]]
    return "\n".join(lines)


def time_text(seconds: float | None) -> str:
    """A time with three digits and its unit."""
    if seconds is None:
        return "-"
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if seconds * factor < 999.5:
            return f"{_digits(seconds * factor)} {unit}"
    return f"{_digits(seconds)} s"


def rate_text(value: float | None, unit: str) -> str:
    """A rate with three digits and its prefix."""
    if value is None:
        return "-"
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= factor:
            return f"{_digits(value / factor)} {prefix}{unit}"
    return f"{_digits(value)} {unit}"


def grid(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> list[str]:
    """Lines of a table; the first columns to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _machine_line(machine: Mapping[str, Any]) -> str:
    load = machine["load_average"]
    text = f"machine   {machine['cpu']}, {machine['cores']} cores"
    if not load:
        return text
    busy = ": busy, so the least times tell more than the medians" if load[0] > machine["cores"] / 2 else ""
    return f"{text}, load {load[0]:.2f} before{busy}"


def _device_lines(devices: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines: list[str] = []
    width = max((len(target) for target in devices), default=0)
    for target, device in devices.items():
        line = f"{target:<{max(width, 9)}} {device['name']} ({device['driver']} driver, {device['driver_version']})"
        ceilings = device.get("ceilings")
        if ceilings:
            copy, fma = ceilings["copy_bytes_per_s"], ceilings["fma_flop_per_s"]
            line += f"; ceilings {rate_text(copy, 'B/s')}, {rate_text(fma, 'FLOP/s')}"
            matrix = ceilings.get("matrix_flop_per_s")
            line += f", {rate_text(matrix, 'FLOP/s')} in f16" if matrix else ""
        lines.append(line)
    return lines


def op_table(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of an operator's result."""
    header = (
        "subject", "strategy", "T", "dtype", "n", "min", "median", "p95", "p99", "+-", "speed", "error", "state err",
        "others", "kernel", "overhead", "bytes/s", "FLOP/s",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    peers = _peers(result)
    for row in result["rows"]:
        call, error = row["call"], row["error"]
        wrong = row["status"] != "ok"
        speed = "WRONG" if wrong else f"{row['speedup']:.2f}x" if row["speedup"] else "-"
        speed += f" {row['peer']}" if len(peers) > 1 and row["peer"] else ""
        rows.append(
            (
                label_of(row, result["devices"]),
                row["strategy"] or "-",
                str(row["tokens"]),
                _SHORT[row["dtype"]],
                str(call["n"]),
                *(time_text(call[key]) for key in ("min", "median", "p95", "p99", "deviation")),
                speed,
                f"{error['output']:.1e}",
                f"{error['state']:.1e}",
                _others(row),
                time_text(row["kernel"]["seconds"]),
                time_text(row["overhead"]["median"] if row["overhead"] else None),
                _share(row, "bytes_per_s", "B/s"),
                _share(row, "flop_per_s", "FLOP/s"),
            )
        )
    return header, rows


def _op_lines(result: Mapping[str, Any]) -> list[str]:
    lines, peers = grid(*op_table(result)), _peers(result)
    if peers:
        lines.append(f"speed: times faster than {', '.join(peers)} by the median call; error: norm against float64")
    else:
        lines.append("error: norm against float64")
    return lines + notes(result)


def _peers(result: Mapping[str, Any]) -> list[str]:
    return sorted({row["peer"] for row in result["rows"] if row["peer"]})


def label_of(row: Mapping[str, Any], devices: Mapping[str, Any]) -> str:
    """The subject, and that it is no GPU where its driver computes on the CPU."""
    return f"{row['subject']} (on the CPU)" if devices.get(row["target"], {}).get("software") else row["subject"]


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know of the rows: software drivers, a busy machine, wrong results."""
    rows: list[Mapping[str, Any]] = result["rows"]
    lines = [
        f"{target}: {device['name']} is a driver in software and no GPU: its times say nothing about one"
        for target, device in result["devices"].items()
        if device.get("software")
    ]
    spoiled = [row for row in rows if row.get("load", {}).get("spoiled")]
    if spoiled:
        most = max(row["load"]["cores_of_others"] for row in spoiled)
        lines.append(
            f"SPOILED ({len(spoiled)} of {len(rows)} rows, marked !): other processes took up to {most:.2f} cores "
            "while they were timed; repeat them on an idle machine"
        )
    if any(row["status"] != "ok" for row in rows):
        what = "the error is above the limit" if result["kind"] == "op" else "logits or tokens are not ONNX Runtime's"
        lines.append(f"WRONG: {what}; its time means nothing")
    return lines


def _others(row: Mapping[str, Any]) -> str:
    """Cores that others took, with a mark where that spoiled the row."""
    others = row["load"]["cores_of_others"]
    return "-" if others is None else f"{others:.2f}" + (" !" if row["load"]["spoiled"] else "")


def _share(row: Mapping[str, Any], key: str, unit: str) -> str:
    share = row[f"{key}_of_ceiling"]
    return rate_text(row[key], unit) + (f" {share:.0%}" if share is not None else "")


def model_table(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the result of whole models."""
    header = (
        "subject", "weights", "prompt", "first token", "prefill", "decode", "median", "p95", "p99", "+-", "logits err",
        "tokens", "threads", "others", "memory", "load", "overhead", "bare call", "generating", "strategy",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for row in result["rows"]:
        bare, generated = row.get("bare_overhead"), row.get("generate_overhead")  # older versions' results have none
        steps, error, greedy = row["decode"]["step"], row["error"], row["greedy"]
        rows.append(
            (
                label_of(row, result["devices"]),
                row["weights"] or "-",
                str(row["prompt"]),
                time_text(row["first_token_s"]["median"]),
                f"{_digits(row['prefill']['tokens_per_s'])} tok/s",
                f"{_digits(row['decode']['tokens_per_s'])} tok/s",
                *(time_text(steps[key]) for key in ("median", "p95", "p99", "deviation")),
                ("WRONG " if row["status"] != "ok" else "") + f"{error['logits']:.1e}" if error else "-",
                f"{greedy['equal']}/{greedy['of']}" if greedy else "-",
                str(row["load"]["threads"] or "-"),
                _others(row),
                size_text(row["memory_bytes"]["peak"]) if row["memory_bytes"]["peak"] else "-",
                time_text(row["load_s"]),
                time_text(row["overhead"]["median"] if row["overhead"] else None),
                time_text(bare["median"] if bare else None),
                time_text(generated["median"] if generated else None),
                row["strategy"] or "-",
            )
        )
    return header, rows


def _model_lines(result: Mapping[str, Any]) -> list[str]:
    lines = grid(*model_table(result))
    if any(row["reference"] for row in result["rows"]):
        lines.append("logits err and equal greedy tokens: against onnxruntime on the same ONNX model")
    lines += [
        f"{row['subject']}, prompt of {row['prompt']}: {row['reference']} without rounded activations differs from it "
        f"by {row['error']['noise']:.1e}; right is up to {row['error']['limit']:.1e}"
        for row in result["rows"]
        if row["error"] and row["error"]["noise"] is not None
    ]
    lines.append(
        "median, p95, p99, +- (deviation): of one decode step; overhead: what `session.run` takes beyond IREE's call "
        "of the module; bare call: what of it a loop takes that calls again and again with the same arguments; "
        "generating: what a token of `generate` does, where the module chooses it; "
        "memory: peak of the subject's process on the host; threads: that worked; others: cores of other processes"
    )
    return lines + notes(result)


def _profile_lines(result: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    header = ("dispatch", "node", "count", "time", "share", "bytes", "bytes/s", "FLOP/s", "unit", "of it")
    for profile in result["rows"]:
        ceilings: Mapping[str, float] = result["devices"].get(profile["target"], {}).get("ceilings") or {}
        rows: list[tuple[str, ...]] = []
        for row in profile["rows"]:
            nodes = row["nodes"]
            more = f" (+{len(nodes) - 1})" if len(nodes) > 1 else ""
            rows.append(
                (
                    _cut(row["key"].rpartition("$async_")[2], 64),
                    _cut(nodes[0], 44) + more if nodes else "-",
                    str(row["count"]),
                    time_text(row["seconds"]),
                    f"{row['share']:.1%}",
                    rate_text(row["bytes"], "B"),
                    _rate(row, "bytes", "B/s", ceilings.get("copy_bytes_per_s")),
                    _rate(row, "flop", "FLOP/s", None),
                    row["unit"] or "-",
                    "-" if row["unit_share"] is None else f"{row['unit_share']:.0%}",
                )
            )
        where = f" at position {profile['position']}" if profile["position"] else ""
        lines.append(
            f"{profile['subject']}: {profile['entry']}{where}, {profile['count']} dispatches, "
            f"{time_text(profile['dispatch_s'])} in all"
        )
        lines += [*grid(header, rows), ""]
    lines.append("all of one call; bytes: of all operands and results, an upper bound where only a part is read")
    shares = [row["unit_share"] or 0.0 for profile in result["rows"] for row in profile["rows"]]
    if any(shares):
        lines.append(f"unit: what a product ran on; of it: the part of its rate, {result['method']['unit_rates']}")
    if max(shares, default=0.0) > _BEYOND:
        lines.append(
            f"a product at {max(shares):.0%} of its unit's rate: others worked while the f32 rate was measured, and "
            "all shares say too much; repeat it on a machine that does nothing else"
        )
    return lines


def _rate(row: Mapping[str, Any], amount: str, unit: str, ceiling: float | None) -> str:
    if row[amount] is None or not row["seconds"]:
        return "-"
    value = row[amount] / row["seconds"]
    return rate_text(value, unit) + (f" {value / ceiling:.0%}" if ceiling else "")


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else "..." + text[3 - width :]


def _absent(row: Mapping[str, Any]) -> str:
    where = [f"{key}={row[key]}" for key in ("tokens", "dtype") if key in row]
    return row["name"] + (f" ({', '.join(where)})" if where else "")
