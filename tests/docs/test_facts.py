"""What pages say of the code is so: operators, strategies, families of GPUs, versions, files."""

from __future__ import annotations

import re
import runpy
import tomllib
from dataclasses import fields

import linattn
import pytest
from linattn import runtime
from linattn.dialect_patterns.causal_conv import op as causal_conv
from linattn.dialect_patterns.linear_attention import op as linear_attention
from linattn.dialect_patterns.op import INTERNAL
from linattn.dialect_patterns.registry import OPS
from linattn.frontend import cli as compile_cli
from linattn.frontend.plan.report import CompileReport, NodeRow
from linattn.frontend.targets.vulkan_device import BASELINE, DEVICES
from linattn.runtime import cli as run_cli
from linattn.runtime.bench import cli as bench_cli
from pages import PAGES, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def text(page: str) -> str:
    return (ROOT / page).read_text()


def test_every_operator_is_in_the_reference() -> None:
    named = text("docs/reference/operators.md")
    missing = {op.op_type for op in OPS if op.domain != INTERNAL and op.op_type not in named}
    assert missing == set()


def test_every_strategy_of_the_state_operators_is_in_the_reference() -> None:
    named = text("docs/reference/operators.md")
    strategies = {strategy.name for op in (linear_attention, causal_conv) for strategy in op.STRATEGIES}
    assert not {name for name in strategies if f"`{name}`" not in named}


def test_families_of_gpus_are_those_that_we_know() -> None:
    """`--gpu-target` in the how-to, a name or a range of names."""
    (row,) = (line for line in text("docs/how-to/targets.md").splitlines() if line.startswith("| whose GPU"))
    names = set(re.findall(r"`([a-z]+\d?)`", row)) | set(re.findall(r"--gpu-target (\w+)", row))
    for first, last in re.findall(r"`[a-z]+(\d)` to `[a-z]+(\d)`", row):
        names |= {f"rdna{n}" for n in range(int(first), int(last))}
    assert names == set(DEVICES) - {BASELINE}


def test_every_option_of_the_compiler_is_explained() -> None:
    """In the table, besides what the command says itself; what all commands have is explained once."""
    explained = text("docs/reference/cli.md").partition("## linattn-run")[0]
    options = {name for action in compile_cli.make_parser()._actions for name in action.option_strings if len(name) > 2}
    assert not {name for name in options - {"--help"} if f"`{name}" not in explained}


def test_every_public_name_is_in_the_reference() -> None:
    named = text("docs/reference/api.md")
    assert not [name for name in (*linattn.__all__, *runtime.__all__) if not re.search(rf"[.`]{name}\b", named)]


def test_the_picture_is_the_one_that_is_drawn() -> None:
    drawn = runpy.run_path(str(ROOT / "docs/contributing/rooms.py"))["draw"]()
    assert text("docs/contributing/rooms.svg") == drawn + "\n", "run docs/contributing/rooms.py"


def test_linearity_is_drawn_of_what_was_measured() -> None:
    script = runpy.run_path(str(ROOT / "docs/linearity.py"))
    assert text("docs/linearity.svg") == script["draw"](script["read"]()), "run docs/linearity.py"
    for page in ("docs/benchmarks.md", "README.md"):
        assert "linearity.svg" in text(page)
    line = {"points": [(tokens, 7 + 5 * tokens / 1024) for tokens in (1024, 4096, 65_536)]}
    assert script["fit"](line) == pytest.approx((7, 5, 0))
    for row in script["read"]():
        call, each, apart = script["fit"](row)
        assert f"{round(call, 1) + 0.0} + {each:.1f} us a 1,024, ± {100 * apart:.1f} %" in text("docs/linearity.svg")
        assert f"{'none' if call < 0.05 else f'{call:.1f}'} and {each:.1f}" in text("docs/benchmarks.md")


def test_hosted_ci_is_ours() -> None:
    assert "bash .ci/run" in text(".github/workflows/ci.yml")


def test_versions_are_those_of_the_project() -> None:
    readme, extras = text("README.md"), PROJECT["optional-dependencies"]
    iree = next(need.partition("==")[2] for need in PROJECT["dependencies"] if need.startswith("iree"))
    onnx = next(need.partition("==")[2] for need in extras["compile"] if need.startswith("onnx"))
    assert f"IREE exactly {iree.removesuffix('.*')}, ONNX exactly {onnx.removesuffix('.*')}" in readme
    assert re.search(rf"\| {PROJECT['requires-python'].removeprefix('>=')} to 3\.\d+;", readme)
    for page in PAGES:
        given = re.findall(r"(?:pip install )'?\.?(?:linattn)?\[([\w,]+)\]", text(page))
        assert not {extra for extras_ in given for extra in extras_.split(",")} - set(extras), page


def test_targets_of_make_that_pages_name_are_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", text("Makefile"), re.M))
    named = [
        (page, word)
        for page in PAGES
        for words in re.findall(r"(?:`|^)make ([\w-]+(?: [\w-]+)*)", text(page), re.M)
        for word in words.split()
    ]
    assert len(named) >= 10
    assert not [f"{page}: make {word}" for page, word in named if word not in targets]


def test_names_in_the_walks_are_in_the_code() -> None:
    """Functions, classes, constants, files and folders that a contributor is sent to, by the last part of the name."""
    folders = ("frontend", "dialect_patterns", "runtime", "tests", "docs", "samples")
    paths = [ROOT / "pyproject.toml", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    defined = re.compile(r"^ *(?:(?:def|class) (\w+)|(\w+)(?:: [^=\n]+)?(?: =|$)|import (\w+))", re.M)
    known = {name for path in paths for names in defined.findall(path.read_text()) for name in names}
    known |= {part for path in paths for part in path.relative_to(ROOT).parts}
    for page in ("CONTRIBUTING.md", "docs/contributing/architecture.md"):
        named = re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`", text(page))
        assert len(named) > 5
        parts = {name if name.endswith((".py", ".toml")) else name.rpartition(".")[2] for name in named}
        assert not parts - known - {"tokenizers"}, page  # a package


@pytest.mark.parametrize("folder", ["runtime", "runtime/bench"])
def test_tables_of_files_are_whole(folder: str) -> None:
    named = text(f"{folder}/README.md")
    files = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert not {name for name in files if f"`{name}`" not in named}


def test_every_command_says_in_the_reference_what_it_takes() -> None:
    named = set(re.findall(r"<!-- help: (.+) -->", text("docs/reference/cli.md")))
    commands: set[str] = set()
    for cli in (compile_cli, run_cli, bench_cli):
        parser = cli.make_parser()
        commands.add(parser.prog)
        for action in parser._subparsers._group_actions if parser._subparsers else []:
            commands |= {f"{parser.prog} {one}" for one in action.choices or ()}
    assert named == commands


def test_the_tutorial_reads_what_the_report_says() -> None:
    """The words at the beginning of the report's lines."""
    report = CompileReport(
        nodes=[NodeRow(*[""] * len(fields(NodeRow)))],  # type: ignore[arg-type]
        states={"conv": {"count": 1, "bytes": 1, "token_bytes": 0}},
        entry_points=["decode"],
        notes=["a note"],
    )
    first = {line.split()[0] for line in report.to_text().splitlines() if line.strip()}
    named = re.findall(r"^- \*\*(\w+)\*\*:", text("docs/tutorial.md"), re.M)
    assert len(named) == 4
    assert set(named) <= first


def test_files_that_pages_name_are_there() -> None:
    """What stands in code marks and begins with one of our folders."""
    path = re.compile(r"`((?:frontend|dialect_patterns|runtime|tests|samples|docs|\.ci|\.github)/[\w./*-]*)`")
    named = [(page, name) for page in PAGES for name in path.findall(text(page))]
    assert len(named) > 20
    assert not [f"{page}: {name}" for page, name in named if not list(ROOT.glob(name.rstrip("/")))]
