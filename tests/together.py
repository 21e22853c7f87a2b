"""Operators that the tests of a file run are compiled together: a module of one is for nine tenths IREE's own start.

Before the first test of a file its tests are begun, each up to where it asks for an operator's function or compiles
something by itself, and what they ask for is compiled in few modules. Then they run as written, and find their
functions. A test with fixtures is left alone (``monkeypatch`` may change what is compiled); what a test asks for later
gets a module of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import iree.runtime as rt
import pytest
from harness import FLAGS, TARGETS, compile_module, device_config, lowered_all, missing_features
from iree.compiler.api import Session
from linattn.dialect_patterns.node import Node
from linattn.dialect_patterns.op import LoweringOptions
from linattn.frontend.process import isolated

Asked = tuple[Node, str, LoweringOptions]
MOST = 24
"""Functions of a module: a larger one takes IREE as long for each."""

_OURS = ("_compile_together", "_together_or_alone")  # fixtures of tests/numeric/conftest.py
_functions: dict[str, Any] = {}
_asked: list[Asked] | None = None
shared = False
"""Whether what was compiled for other tests is good for the one that runs."""


class _NotYet(BaseException):
    """Ends a test that was begun to see what it asks for."""


def function(node: Node, target: str, options: LoweringOptions) -> Any:
    """The loaded function of an operator; None where this CPU lacks what it was compiled for."""
    return functions([node], target, options)[0]


def functions(nodes: Sequence[Node], target: str, options: LoweringOptions) -> list[Any]:
    """The same of several; what is not there yet is compiled in one module."""
    if _asked is not None:
        _asked.extend((node, target, options) for node in nodes)
        raise _NotYet
    keys = [_key(node, target, options) for node in nodes]
    known = _functions if shared else dict[str, Any]()
    new = {key: node for key, node in zip(keys, nodes, strict=True) if key not in known}
    if new:
        known.update(zip(new, _load([*new.values()], target, options), strict=True))
    return [known[key] for key in keys]


def prepare(items: Sequence[pytest.Item]) -> None:
    """Compile what the tests of a file ask for first."""
    _functions.clear()
    groups: dict[str, dict[str, Asked]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and not item.get_closest_marker("skip"):
            for one in _asked_by(item):
                groups.setdefault(repr(one[1:]), {})[_key(*one)] = one
    for group in groups.values():
        keys, asked = list(group), list(group.values())
        for at in range(0, len(keys), MOST):
            some = asked[at : at + MOST]
            if len(some) == 1:
                continue
            try:
                loaded = _load([node for node, *_ in some], *some[0][1:])
            except Exception:  # one of them: each test compiles its own, and the one that is to blame fails
                continue
            _functions.update(zip(keys[at:], loaded, strict=False))


def _asked_by(item: pytest.Function) -> list[Asked]:
    """What a test asks for first."""
    global _asked
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if set(item.fixturenames) - set(parameters) - {"request", *_OURS} or hasattr(item.obj, "hypothesis"):
        return []
    _asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "__init__", _no_session)
        patch.setattr(isolated, "run_isolated", _end)
        try:
            item.obj(**parameters)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # the end, or what the test will say again
            pass
        finally:
            asked, _asked = _asked, None
    return asked


def _no_session(session: Session) -> None:
    session._session_p = None  # there is nothing to destroy
    raise _NotYet


def _end(*_: object, **__: object) -> None:
    raise _NotYet


def _key(node: Node, target: str, options: LoweringOptions) -> str:
    return repr((node, target, TARGETS[target], FLAGS[target], options))


def _load(nodes: Sequence[Node], target: str, options: LoweringOptions) -> list[Any]:
    session = Session()
    session.set_flags(*FLAGS[target], "--iree-input-type=none")
    vmfb = compile_module(lowered_all(nodes, target, options, session.context), session, target)
    if missing_features(target):
        return [None] * len(nodes)
    context = rt.SystemContext(config=device_config(target))
    context.add_vm_module(rt.VmModule.copy_buffer(context.instance, vmfb))
    return [context.modules.module[f"main{i or ''}"] for i in range(len(nodes))]
