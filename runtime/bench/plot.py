"""Results as a picture: times and speed of an operator over token counts, tokens per second of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linattn.runtime.errors import InputError
from linattn.runtime.outputs import new_file

from .lazy import need
from .table import label_of, time_text

SUFFIXES = (".png", ".svg", ".pdf")
_OURS = ("#1f5fbf", "#2a9d8f", "#7b4fb5", "#c2410c", "#3f7f1f", "#b83280")
_PEERS = ("#6b7280", "#a8a29e", "#c0a062", "#94a3b8")
_PHASES = ("prefill", "decode")
_INK, _GRID, _WRONG = "#1f2937", "#e5e7eb", "#c81e1e"
_WIDE = 30
"""Ratio of the fastest to the slowest above which points on a log axis stand in for bars."""


def check(path: Path) -> None:
    """Finds out before the measuring whether the picture can be drawn.

    Raises:
        InputError: An unknown kind of file.
        TargetError: matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise InputError("unknown kind of picture", where="--plot", got=path.name, expected=" | ".join(SUFFIXES))
    need("matplotlib", "bench")


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws a result, or several of whole models in one picture.

    Args:
        results: As `run_op` or `run_model` returns them, or read back from their JSON.
        path: File to write; its suffix decides the kind.

    Raises:
        InputError: A result that has no picture, or several that do not go together.
    """
    kinds = {result["kind"] for result in results}
    if kinds - {"op", "model"} or (len(results) > 1 and kinds != {"model"}):
        raise InputError("no picture", got=", ".join(sorted(kinds)), expected="one result of op, or some of model")
    if kinds == {"model"}:
        lengths = {str([result["method"][phase] for phase in _PHASES]) for result in results}
        if len(lengths) > 1:
            raise InputError("results of different lengths", expected="the same --prefill and --decode in all of them")
    need("matplotlib", "bench").use("Agg")
    pyplot = need("matplotlib.pyplot", "bench")
    style = {
        "font.size": 9, "axes.edgecolor": "#9ca3af", "axes.labelcolor": _INK, "text.color": _INK, "xtick.color": _INK,
        "ytick.color": _INK, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none",
    }  # fmt: skip
    with pyplot.rc_context(style):
        figure = _draw_op(pyplot, results[0]) if kinds == {"op"} else _draw_models(pyplot, results)
        with new_file(path) as partial:
            figure.savefig(partial, dpi=150, bbox_inches="tight", facecolor="white")
        pyplot.close(figure)


def _draw_op(pyplot: Any, result: Mapping[str, Any]) -> Any:
    """A column for each dtype: times on log axes above, speed against the peer below."""
    rows: list[dict[str, Any]] = result["rows"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    colors = _colors(rows)
    figure, axes = pyplot.subplots(
        2, len(dtypes), figsize=(max(6.4 * len(dtypes), 7.6), 7.4), squeeze=False, height_ratios=(3, 2),
        layout="constrained",
    )  # fmt: skip
    for column, dtype in enumerate(dtypes):
        some = [row for row in rows if row["dtype"] == dtype]
        _draw_times(axes[0][column], some, colors)
        axes[0][column].set_title(dtype, loc="left", fontsize=10, fontweight="bold")
        _draw_speed(axes[1][column], some, colors)
    axes[0][0].set_ylabel("median time of a call")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False)
    figure.suptitle(f"{_case_text(result['case'])}\n{_where_text(result)}", fontsize=10, ha="left", x=0.01)
    return figure


def _draw_times(axis: Any, rows: Sequence[Mapping[str, Any]], colors: Mapping[str, str]) -> None:
    counts = sorted({row["tokens"] for row in rows})
    for subject in dict.fromkeys(row["subject"] for row in rows):
        mine = sorted((row for row in rows if row["subject"] == subject), key=lambda row: row["tokens"])
        ours = mine[0]["kind"] == "linattn"
        x, y = [row["tokens"] for row in mine], [row["call"]["median"] for row in mine]
        style = {"marker": "o", "linewidth": 2.2} if ours else {"marker": "s", "linewidth": 1.6, "linestyle": "--"}
        axis.plot(x, y, color=colors[subject], label=_legend(mine), markersize=5, zorder=3 if ours else 2, **style)
        least, p95 = ([row["call"][key] for row in mine] for key in ("min", "p95"))
        axis.vlines(x, least, p95, color=colors[subject], linewidth=1.2, alpha=0.45, zorder=1)
        for row in mine:
            if row["status"] != "ok":
                axis.annotate("WRONG", (row["tokens"], row["call"]["median"]), color=_WRONG, fontweight="bold")
            elif row["speedup"] and ours:
                _annotate(axis, row, rows, colors[subject])
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.margins(x=0.12, y=0.10)
    axis.yaxis.set_major_formatter(_tick_time)
    axis.grid(True, color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel("tokens of the call (whiskers: least time to p95)")


def _annotate(axis: Any, row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], color: str) -> None:
    """Writes the speed at the fastest of our points of a token count: below it where the peer is above."""
    same = [other for other in rows if other["tokens"] == row["tokens"] and other["kind"] == "linattn"]
    if row is not min(same, key=lambda other: other["call"]["median"]):
        return
    below = row["speedup"] >= 1
    axis.annotate(
        f"{row['speedup']:.2f}x", (row["tokens"], row["call"]["median"]), color=color, fontweight="bold",
        xytext=(7, -12 if below else -3), textcoords="offset points", va="center", zorder=4,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
    )  # fmt: skip


def _draw_speed(axis: Any, rows: Sequence[Mapping[str, Any]], colors: Mapping[str, str]) -> None:
    counts = sorted({row["tokens"] for row in rows})
    rated = [row for row in rows if row["speedup"] and row["kind"] == "linattn"]
    subjects = list(dict.fromkeys(row["subject"] for row in rated))
    if not rated:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "no peer to compare with", ha="center", transform=axis.transAxes, color="#6b7280")
        return
    width = 0.8 / max(len(subjects), 3)
    for index, subject in enumerate(subjects):
        mine = {row["tokens"]: row["speedup"] for row in rated if row["subject"] == subject}
        x = [counts.index(count) + (index - (len(subjects) - 1) / 2) * width for count in mine]
        bars = axis.bar(x, list(mine.values()), width * 0.9, color=colors[subject])
        axis.bar_label(bars, [f"{value:.2f}x" for value in mine.values()], fontsize=8, padding=2)
    axis.axhline(1, color=_INK, linewidth=1, linestyle=":")
    axis.set_xticks(range(len(counts)), [f"T={count}" for count in counts])
    axis.margins(y=0.15)
    peers = list(dict.fromkeys(row["peer"] for row in rated))
    axis.set_ylabel(f"times faster than {', '.join(peers)}")
    axis.grid(True, axis="y", color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def _draw_models(pyplot: Any, results: Sequence[Mapping[str, Any]]) -> Any:
    """Bars of tokens per second, prefill on the left and decode on the right."""
    rows = [(result, row) for result in results for row in result["rows"]]
    colors = _colors([row for _, row in rows])
    height = 1.5 + 0.4 * len(results) + 0.55 * len(rows)
    figure, axes = pyplot.subplots(1, 2, figsize=(10.5, height), sharey=True, layout="constrained")
    for axis, phase in zip(axes, _PHASES, strict=True):
        values = [row[phase]["tokens_per_s"] for _, row in rows]
        inks, places = [colors[row["subject"]] for _, row in rows], range(len(rows))
        if max(values) > _WIDE * min(values):  # a bar's length says nothing there
            axis.set_xscale("log")
            axis.set_xlim(min(values) / 3, max(values) * 8)
            axis.scatter(values, places, 50, inks, zorder=3)
        else:
            axis.set_xlim(0, max(values) * 1.35)
            axis.barh(places, values, 0.7, color=inks)
        for place, value, (result, row) in zip(places, values, rows, strict=True):
            text = _bar_text(row, phase, _reference_rate(result, row, phase))
            axis.annotate(text, (value, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
        axis.set_title(phase, loc="left", fontsize=10, fontweight="bold")
        axis.set_xlabel("tokens/s, by the medians")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.grid(True, axis="x", color=_GRID, linewidth=0.8)
        axis.set_axisbelow(True)
    several = len(results) > 1
    labels = [_model_label(row, result["devices"], result if several else None) for result, row in rows]
    axes[0].set_yticks(range(len(rows)), labels)
    axes[0].invert_yaxis()
    about = [f"{_names(result)}{': ' if several else chr(10)}{_where_text(result)}" for result in results]
    figure.suptitle("\n".join(about), fontsize=8 if several else 10, ha="left", x=0.01)
    return figure


def _reference_rate(result: Mapping[str, Any], row: Mapping[str, Any], phase: str) -> float | None:
    """The rate to compare with: that of the reference, where it ran on the same target."""
    rates = {
        other["subject"]: other[phase]["tokens_per_s"]
        for other in result["rows"]
        if (other["target"], other["prompt"]) == (row["target"], row["prompt"])
    }
    return rates.get(row["reference"])


def _names(result: Mapping[str, Any]) -> str:
    return ", ".join(model["name"] for model in result["models"])


def _tick_time(seconds: float, _: int) -> str:
    return time_text(seconds).replace(".00", "").replace(".0 ", " ")


def _bar_text(row: Mapping[str, Any], phase: str, reference: float | None) -> str:
    value = row[phase]["tokens_per_s"]
    text = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    text += " !" if row["load"]["spoiled"] else ""
    if row["status"] != "ok":
        return f"{text}  WRONG"
    return text if reference is None else f"{text}  ({value / reference:.2f}x)"


def _model_label(row: Mapping[str, Any], devices: Mapping[str, Any], result: Mapping[str, Any] | None) -> str:
    """The subject and the prompt, and under them what it ran and where (of several results) or its error."""
    subject = f"{label_of(row, devices)}, prompt of {row['prompt']}"
    if result is not None:
        device = devices.get(row["target"])
        where = device["name"] if device else result["machine"]["cpu"]
        # Of several models the subject begins with the one that it is of.
        return f"{subject}\n{where}" if len(result["models"]) > 1 else f"{subject}\n{_names(result)}, {where}"
    error = f"\nlogits error {row['error']['logits']:.0e}" if row["error"] else ""
    return f"{subject}{error}"


def _colors(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    kinds = {row["subject"]: row["kind"] == "linattn" for row in rows}
    ours, peers = [s for s, mine in kinds.items() if mine], [s for s, mine in kinds.items() if not mine]
    colors = {subject: _OURS[i % len(_OURS)] for i, subject in enumerate(ours)}
    return colors | {subject: _PEERS[i % len(_PEERS)] for i, subject in enumerate(peers)}


def _legend(rows: Sequence[Mapping[str, Any]]) -> str:
    """The subject, with the strategies that its own choice came to."""
    subject, taken = rows[0]["subject"], list(dict.fromkeys(row["strategy"] for row in rows if row["strategy"]))
    plain = not taken or subject.endswith(f":{taken[0]}")
    return subject if plain else f"{subject} ({', '.join(taken)})"


def _case_text(case: Mapping[str, Any]) -> str:
    if case["op"] == "CausalConvWithState":
        return f"CausalConvWithState, B={case['batch']}, C={case['channels']}, k={case['taps']}"
    heads = f"H={case['heads']}" + (f"/{case['kv_heads']}" if case["kv_heads"] != case["heads"] else "")
    size = f"d={case['dk']}" + (f"x{case['dv']}" if case["dv"] != case["dk"] else "")
    return f"LinearAttention {case['rule']}, B={case['batch']}, {heads}, {size}"


def _where_text(result: Mapping[str, Any]) -> str:
    measured = {row["target"] for row in result["rows"]}
    named = {device["name"]: target for target, device in reversed(result["devices"].items()) if target in measured}
    devices = "; ".join(f"{target.partition('@')[0]}: {name}" for name, target in reversed(named.items()))
    found = result["versions"]
    packages = ", ".join(
        f"{short} {found[name]}"
        for name, short in (("iree-base-runtime", "IREE"), ("onnxruntime", "ONNX Runtime"), ("torch", "PyTorch"))
        if name in found
    )
    return f"{devices} ({result['machine']['cores']} cores); {packages}; {result['started'][:10]}"
