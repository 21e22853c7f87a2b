"""The tables of speeds are those of docs/speeds.jsonl; what makes a row there is undisturbed, right and committed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from pages import ROOT

SPEC = importlib.util.spec_from_file_location("speeds", ROOT / "docs" / "speeds.py")
assert SPEC is not None
assert SPEC.loader is not None
speeds = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(speeds)


def result(**changes: Any) -> dict[str, Any]:
    def row(kind: str, prompt: int) -> dict[str, Any]:
        rates = {"prefill": {"tokens_per_s": 1000.04 * prompt}, "decode": {"tokens_per_s": 50.0 + prompt}}
        found = {"kind": kind, "subject": kind, "target": "cpu", "weights": "float32", "prompt": prompt, "status": "ok"}
        return found | {"load": {"spoiled": False, "cores_of_others": 0.0}} | rates

    rows = [row(kind, prompt) for prompt in (64, 512) for kind in ("linattn", "onnxruntime")]
    found = {"commit": "abc1234", "started": "2026-11-26T00:00:00", "machine": {"cores": 2}, "rows": rows}
    found |= {"devices": {"cpu": {"name": "a CPU"}}}
    for key, value in changes.items():
        if key in ("weights", "prompt"):  # of all rows
            found["rows"] = [row | {key: value} for row in found["rows"] if row["prompt"] != value]
            continue
        (found["rows"][0] if key in rows[0] else found["devices"]["cpu"] if key == "software" else found)[key] = value
    return found


def test_pages_hold_the_table() -> None:
    """Whoever changes one by hand is told."""
    rows = speeds.read()
    for page in speeds.PAGES:
        found = speeds._BETWEEN.findall(page.read_text())
        assert found == [speeds.table(rows)], f"{page}: run `python docs/speeds.py`"


def test_a_row() -> None:
    (row,), passed = speeds.rows_of(result())
    assert (row["machine"], row["weights"], passed) == ("2 cores of a CPU", "fp32", [])
    assert row["linattn"] == {"prefill_64": 64_002.6, "prefill_512": 512_020.5, "decode": 562.0}
    assert "| 2 cores of a CPU | fp32 | 512,020 / 562 | 512,020 / 562 | `abc1234`, 2026-11-26 |" in speeds.table([row])


def test_llama_cpp_has_no_column() -> None:
    """A row compares with ONNX Runtime, whoever else took part."""
    with_it = result()
    rates = {"prefill": {"tokens_per_s": 1.0}, "decode": {"tokens_per_s": 1.0}}
    with_it["rows"] += [row | {"kind": "llama.cpp", "subject": "it"} | rates for row in with_it["rows"]]
    assert speeds.rows_of(with_it) == speeds.rows_of(result())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"load": {"spoiled": True, "cores_of_others": 1.5}}, "others took 1.5 cores"),
        ({"status": "wrong"}, "linattn is wrong"),
        ({"software": True}, "a CPU is no GPU"),
        ({"commit": "abc1234-dirty"}, "is not committed"),
        ({"commit": None}, "is not committed; --commit names that of a tree without git"),
        ({"weights": None}, "measure the .onnx"),
        ({"prompt": 64}, "no prompt of 512 tokens"),
    ],
)
def test_what_makes_no_row(change: dict[str, Any], why: str) -> None:
    rows, passed = speeds.rows_of(result(**change))
    assert (rows, len(passed)) == ([], 1)
    assert why in passed[0]


def test_turns_that_are_too_short_to_tell() -> None:
    """The others' turns between them tell, if there are any."""
    found = result(load={"spoiled": None, "cores_of_others": None})
    assert len(speeds.rows_of(found)[0]) == 1
    for row in found["rows"]:
        row["load"] = {"spoiled": None, "cores_of_others": None}
    rows, passed = speeds.rows_of(found)
    assert (rows, len(passed)) == ([], 1)
    assert "too short to tell" in passed[0]


def test_what_was_measured_elsewhere_has_the_name_and_commit_that_are_given() -> None:
    """Of a tree without git; whatever its devices and drivers call themselves, a machine has one row for one thing."""
    found = result(commit=None)
    for row in found["rows"][::2]:
        row["target"] = "vulkan"
    found["devices"]["vulkan"] = {"name": "NVIDIA H100 80GB HBM3 (NVIDIA 580.159.04)"}
    (row,), _ = speeds.rows_of(found, None, "1234567")
    assert (row["machine"], row["commit"]) == ("NVIDIA H100 80GB HBM3, Vulkan", "1234567")
    (row,), _ = speeds.rows_of(found, "H100", "1234567")
    assert row["machine"] == "H100, Vulkan"
    assert row["machine"] in {kept["machine"] for kept in speeds.read()}
    (row,), _ = speeds.rows_of(result(), "a Zen 4", "1234567")
    assert (row["machine"], row["commit"]) == ("2 cores of a Zen 4", "abc1234")


def test_steps_are_those_after_the_prompt_that_is_shown() -> None:
    found = result()
    found["rows"] += [row | {"prompt": 2048, "decode": {"tokens_per_s": 1.0}} for row in found["rows"][:2]]
    (row,), _ = speeds.rows_of(found)
    assert (row["linattn"]["decode"], "prefill_2048" in row["linattn"]) == (562.0, True)


def test_rows_of_other_machines_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (new,), _ = speeds.rows_of(result())
    old = [new | {"machine": "another"}, new | {"commit": "0000000"}]
    rows = speeds.merged(old, [new])
    found = [(row["machine"], row["commit"]) for row in rows]
    assert found == [("another", "abc1234"), ("2 cores of a CPU", "abc1234")]
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- speeds -->\nold\n<!-- /speeds -->\nafter\n")
    monkeypatch.setattr(speeds, "PAGES", (page,))
    speeds.write_tables(rows)
    speeds.write_tables(rows)
    assert page.read_text() == f"before\n<!-- speeds -->\n{speeds.table(rows)}<!-- /speeds -->\nafter\n"
