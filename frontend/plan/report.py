"""What the user sees while and after compiling: stages with times, then what was found and chosen."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from linattn.runtime.errors import LinattnError
from linattn.runtime.outputs import new_file
from linattn.runtime.sizes import size_text


@dataclass(frozen=True)
class NodeRow:
    """One line of the report: a LinearAttention or CausalConvWithState node.

    Attributes:
        name: The node's name.
        op: Domain and operator.
        rule: The update rule, or the activation.
        heads: Heads and head sizes.
        dtypes: Activation and state types.
        strategy: Which strategy was chosen, for decode and prefill if they differ.
        reason: Why.
        rejected: Better strategies that were not taken -> reason.
    """

    name: str
    op: str
    rule: str
    heads: str
    dtypes: str
    strategy: str
    reason: str
    rejected: dict[str, str] = field(default_factory=dict[str, str])


@dataclass
class CompileReport:
    """What was compiled.

    Attributes:
        model: Name of the model.
        target: Target and description.
        nodes: The two operators' nodes.
        states: Kind -> number of states and bytes in all; ``token_bytes`` for each token where the context is open.
        entry_points: Names of the compiled functions.
        alone: Those that are too small for CPU workers: the thread that calls runs them.
        joined: Those with kernels that one thread does one after the other, and how many these are.
        output: File written.
        output_bytes: Its size.
        weight_bytes: Size of the weights.
        call_bytes: Function of known sizes -> bytes that a call needs at most, by the sizes of the model's values:
            inputs, states, outputs and what it computes between. What IREE fuses takes none.
        stages: Stage -> seconds.
        others: What was chosen for operators of which a model has many, a line a choice.
        notes: Things the user should know.
        abi: Function -> its arguments and results, see :func:`~linattn.frontend.plan.abi.describe_abi`; not in text.
    """

    model: str = ""
    target: str = ""
    nodes: list[NodeRow] = field(default_factory=list[NodeRow])
    states: dict[str, dict[str, int]] = field(default_factory=dict[str, dict[str, int]])
    entry_points: list[str] = field(default_factory=list[str])
    alone: list[str] = field(default_factory=list[str])
    joined: list[str] = field(default_factory=list[str])
    output: str = ""
    output_bytes: int = 0
    weight_bytes: int = 0
    call_bytes: dict[str, int] = field(default_factory=dict[str, int])
    stages: dict[str, float] = field(default_factory=dict[str, float])
    others: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])
    abi: dict[str, dict[str, list[dict[str, str]]]] = field(default_factory=dict[str, dict[str, list[dict[str, str]]]])

    def to_dict(self) -> dict[str, object]:
        """For ``--report FILE.json``."""
        return asdict(self)

    def to_text(self) -> str:
        """For the terminal."""
        lines = [f"model     {self.model}  ({size_text(self.weight_bytes)} of weights)", f"target    {self.target}"]
        if self.nodes:
            lines.append("")
            lines += _table(
                ("node", "rule", "heads", "types", "strategy", "why"),
                [(_short(r.name), r.rule, r.heads, r.dtypes, r.strategy, r.reason) for r in self.nodes],
            )
            lines.append("")
        lines += [f"others    {line}" for line in self.others]
        for kind, total in self.states.items():
            size = f"{size_text(total['token_bytes'])} a token" if total["token_bytes"] else size_text(total["bytes"])
            lines.append(f"states    {total['count']} x {kind}, {size}")
        lines.append(f"entries   {', '.join(self.entry_points)}")
        if self.alone:
            lines.append(f"alone     {', '.join(self.alone)}: done sooner by the thread that calls than by workers")
        if self.joined:
            lines.append(f"joined    {', '.join(self.joined)}")
        if self.call_bytes:
            symbol, most = max(self.call_bytes.items(), key=lambda item: item[1])
            lines.append(f"memory    up to {size_text(most)} in a call of {symbol}, beside the weights")
        size = f"  ({size_text(self.output_bytes)})" if self.output_bytes else ""
        lines.append(f"output    {self.output}{size}")
        lines += [f"note      {note}" for note in self.notes]
        return "\n".join(lines)


BUNDLE_WEIGHTS = "weights.irpa"
"""The file in a bundle with the weights of all its modules."""


@dataclass(frozen=True)
class BundleReport:
    """What was compiled for several machines.

    Attributes:
        output: The folder.
        modules: File name of each module -> its report.
        weight_bytes: Weights in all.
        shared_bytes: Weights that more than one module reads.
        own_bytes: File name of each module -> bytes of the weights that no other module reads.
    """

    output: str
    modules: Mapping[str, CompileReport]
    weight_bytes: int = 0
    shared_bytes: int = 0
    own_bytes: Mapping[str, int] = field(default_factory=dict[str, int])

    def to_dict(self) -> dict[str, object]:
        """For ``--report FILE.json``."""
        return asdict(self)

    def to_text(self) -> str:
        """For the terminal."""
        parts = [report.to_text() for report in self.modules.values()]
        sizes = sum(report.output_bytes for report in self.modules.values())
        if not sizes:  # a dry run
            return "\n\n".join(parts)
        own = ", ".join(f"{size_text(count)} for {name} alone" for name, count in self.own_bytes.items() if count)
        shared = f"{size_text(self.shared_bytes)} shared" + (f", {own}" if own else "")
        total = f"bundle    {self.output}  ({len(self.modules)} modules, {size_text(sizes)} of code)"
        return "\n\n".join([*parts, f"{total}\nweights   {BUNDLE_WEIGHTS}  ({size_text(self.weight_bytes)}: {shared})"])


def _short(name: str, width: int = 44) -> str:
    return name if len(name) <= width else "..." + name[3 - width :]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)]


class Progress:
    """Prints stages with their times while they run; silent without a stream."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total = total
        self.done = 0
        self._stream = stream
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, title: str) -> Generator[None]:
        """Run a stage: its title is shown at once, its time when it is done."""
        self.done += 1
        self.write(f"[{self.done}/{self.total}] {title} ... ")
        start = time.perf_counter()
        try:
            yield
        except BaseException as error:
            self.write("failed\n")
            if not isinstance(error, LinattnError):  # one of ours says what matters
                error.add_note(f"stage '{title}'")
            raise
        self.seconds[title] = round(time.perf_counter() - start, 3)
        self.write(f"{self.seconds[title]:.1f} s\n")

    @property
    def is_live(self) -> bool:
        """Whether it is shown on a terminal, where what was shown can be written over."""
        return self._stream is not None and self._stream.isatty()

    def write(self, text: str) -> None:
        """Show something as it is."""
        if self._stream is not None:
            self._stream.write(text)
            self._stream.flush()


def module_progress(module: str) -> Progress:
    """Progress on standard error of one module of several."""
    print(module, file=sys.stderr)
    return stderr_progress(6)


def stderr_progress(total: int) -> Progress:
    """Progress on standard error."""
    return Progress(total, sys.stderr)


def write_report(path: Path, content: Mapping[str, object]) -> None:
    """Write ``--report FILE.json``.

    Raises:
        LinattnError: if it cannot be written.
    """
    with new_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")
