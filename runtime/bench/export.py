"""Results as Markdown, for a page, and as CSV, for a spreadsheet: of the latter every number, times in seconds."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any, cast

from linattn.runtime.errors import InputError

from .table import model_table, notes, op_table

_TABLES = {"op": op_table, "model": model_table}


def to_markdown(result: Mapping[str, Any]) -> str:
    """The table of a result of `op` or `model`, with where it was measured and by which command."""
    header, rows = _TABLES[_kind(result)](result)
    devices = "; ".join(f"{target}: {device['name']}" for target, device in result["devices"].items())
    packages = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"{devices} ({result['machine']['cores']} cores), {result['started'][:10]}; {packages}", ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    lines += ["", *(f"{note}\n" for note in notes(result))]
    lines.append(f"`{' '.join(result['command'])}`")
    return "\n".join(lines) + "\n"


def to_csv(result: Mapping[str, Any]) -> str:
    """A line a row, a column a number: `decode.step.p95` is that key of the JSON."""
    _kind(result)
    rows = [_flat(row) for row in result["rows"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _kind(result: Mapping[str, Any]) -> str:
    kind = str(result["kind"])
    if kind not in _TABLES:
        raise InputError("no such table", got=kind, expected=" | ".join(_TABLES), hint="--json has all of it")
    return kind


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(cast(Mapping[str, Any], item), f"{prefix}{key}.")
        else:
            flat[prefix + key] = "" if item is None else item
    return flat
