"""Sessions in files: what was saved is what goes on, elsewhere too, and nothing that does not fit is taken."""

from __future__ import annotations

import functools
import json
import random
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from linattn.runtime import InputError, LinattnError, Program, Session, StateError
from needed import need_device
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny_hybrid import Hybrid, open_form, reference

IDS = np.random.default_rng(0).integers(1, 8, (1, 12))


@functools.cache
def program(uri: str = "local-sync", form: Hybrid = Hybrid()) -> Program:  # noqa: B008
    need_device(uri)
    return Program.load(form.compile(), uri)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    session = program().session()
    session.run({"input_ids": IDS[:, :7]})
    session.save(tmp_path / "state.safetensors")
    return tmp_path / "state.safetensors"


def assert_goes_on(session: Session) -> None:
    assert session.position == 7
    for name, want in reference(IDS[:, :7])[1].items():
        np.testing.assert_allclose(session.states[name].numpy(), want, rtol=1e-6, err_msg=name)
    got = session.run({"input_ids": IDS[:, 7:]})["logits"]
    np.testing.assert_allclose(got, reference(IDS)[0][:, 7:], rtol=1e-6)


VULKAN = pytest.param("vulkan", marks=pytest.mark.vulkan)


@pytest.mark.parametrize("source", ["local-sync", VULKAN])
@pytest.mark.parametrize("target", ["local-task", VULKAN])
def test_any_target_goes_on(source: str, target: str, tmp_path: Path) -> None:
    forms = [Hybrid("vulkan" if uri == "vulkan" else "cpu") for uri in (source, target)]
    session = program(source, forms[0]).session()
    session.run({"input_ids": IDS[:, :7]})
    session.save(tmp_path / "state")
    assert_goes_on(Session.load(program(target, forms[1]), tmp_path / "state"))
    assert_goes_on(session)


def test_another_capacity(file: Path) -> None:
    assert_goes_on(Session.load(program(form=replace(Hybrid(), max_context=40)), file))
    assert_goes_on(Session.load(program(form=open_form(Hybrid())), file))


def test_what_is_in_the_file(file: Path) -> None:
    with safe_open(file, framework="np") as found:
        assert found.metadata()["position"] == "7"
        assert found.metadata()["model_sha256"] == "0" * 64
        assert found.get_tensor("past.1.kv").shape == (1, 2, 7, 4)
    session = Session.load(program(), file, window=1)
    session.run({"input_ids": IDS[:, 7:9]})
    session.rollback(2)
    assert_goes_on(session)


def test_nothing_yet(tmp_path: Path) -> None:
    program().session().save(tmp_path / "empty")
    assert Session.load(program(), tmp_path / "empty").position == 0
    with pytest.raises(StateError, match="the batch is open until the first call"):
        program(form=open_form(Hybrid())).session().save(tmp_path / "open")
    assert not (tmp_path / "open").exists()


def test_masks_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linattn.runtime.binding.refuse_padding", lambda *_: None)  # as if the model had caches only
    session = program().session()
    session.run({"input_ids": IDS[:, :7], "attention_mask": [[0, 1, 1, 0, 1, 1, 1]]})
    session.save(tmp_path / "state")
    loaded = Session.load(program(), tmp_path / "state")
    np.testing.assert_array_equal(*[one.run({"input_ids": IDS[:, 7:]})["logits"] for one in (session, loaded)])


def changed(file: Path, **metadata: str) -> None:
    with safe_open(file, framework="np") as found:
        tensors, told = {name: found.get_tensor(name).copy() for name in found.keys()}, found.metadata()  # noqa: SIM118
    save_file(tensors, file, {**told, **metadata})


def retyped(file: Path, name: str, change: Callable[[np.ndarray], np.ndarray | None], new: str = "") -> None:
    with safe_open(file, framework="np") as found:
        tensors, told = {name: found.get_tensor(name).copy() for name in found.keys()}, found.metadata()  # noqa: SIM118
    array = change(tensors.pop(name))
    if array is not None:
        tensors[new or name] = np.ascontiguousarray(array)
    save_file(tensors, file, told)


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "no file": (lambda file: file.unlink(), "no such file"),
    "empty": (lambda file: file.write_bytes(b""), "not a file of saved states"),
    "text": (lambda file: file.write_text("hello, world"), "not a file of saved states"),
    "other safetensors": (lambda file: save_file({"a": np.ones(3)}, file), "unknown format of saved states"),
    "format": (lambda file: changed(file, linattn_state="2"), "unknown format of saved states, got 2, expected 1"),
    "model": (
        lambda file: changed(file, model_sha256="1" * 64),
        "states of another model, got tiny-hybrid with other weights or another graph, expected tiny-hybrid",
    ),
    "name": (lambda file: changed(file, model_sha256="", model="x\ny"), "another model, got x y, expected tiny-hybrid"),
    "batch": (lambda file: changed(file, batch="2"), "states of another batch, got 2, expected 1"),
    "no batch": (lambda file: changed(file, batch="0"), "states of another batch, got 0, expected 1"),
    "position": (lambda file: changed(file, position="8"), "past.1.kv: wrong shape, got [1, 2, 7, 4], expected [1, 2,"),
    "negative": (lambda file: changed(file, position="-1"), "the position is not a number, got '-1'"),
    "huge": (lambda file: changed(file, position="9" * 999), "the position is not a number, got '999"),
    "far": (lambda file: changed(file, position="99"), "context full, got 99 + 0 tokens, expected at most 24"),
    "hash": (lambda file: changed(file, sha256="0"), "damaged: its bytes are not those that were saved"),
    "dtype": (
        lambda file: retyped(file, "past.0.rec", lambda a: a.astype(np.float16)),
        "past.0.rec: wrong dtype, got F16, expected F32",
    ),
    "shape": (lambda file: retyped(file, "past.0.rec", lambda a: a[None]), "past.0.rec: wrong shape, got [1, 1, 4]"),
    "values": (lambda file: retyped(file, "past.0.rec", lambda a: a + 1), "damaged"),
    "missing": (lambda file: retyped(file, "past.0.conv", lambda a: None), "got no past.0.conv, expected past.0.rec, "),
    "renamed": (lambda file: retyped(file, "past.0.conv", lambda a: a, "conv"), "got no past.0.conv, conv, expected"),
    "mask": (
        lambda file: retyped(file, "past.0.conv", lambda a: a, "attention_mask"),
        "got no past.0.conv, expected past.0.rec, past.0.conv, past.1.kv, attention_mask",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_refused(what: str, file: Path) -> None:
    damage, words = WRONG[what]
    damage(file)
    with pytest.raises(StateError) as caught:
        Session.load(program(), file)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_model_is_refused(file: Path) -> None:
    loaded = program()
    twin = Program(loaded._engine.module, replace(loaded.manifest, model_sha256="1" * 64))
    with pytest.raises(StateError, match="states of another model, got tiny-hybrid with other weights"):
        Session.load(twin, file)


def test_every_truncation_is_refused(file: Path) -> None:
    data = file.read_bytes()
    for size in range(len(data)):
        file.write_bytes(data[:size])
        with pytest.raises(StateError, match="not a file of saved states") as caught:
            Session.load(program(), file)
        assert "\n" not in str(caught.value)


def hostile_headers(data: bytes) -> list[bytes]:
    """Headers that lie about sizes, shapes and offsets."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]

    def packed(header: dict[str, Any], length: int | None = None, body: bytes = body) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + body

    files = [packed(header, length) for length in (0, 1, size + 1, size - 1, 1 << 31, (1 << 63) + 5, (1 << 64) - 1)]
    for field, value in [
        ("shape", [1 << 62, 1 << 62]), ("shape", [-1]), ("shape", [1, 1 << 63]), ("shape", "x"), ("shape", []),
        ("data_offsets", [0, 1 << 62]), ("data_offsets", [5, 3]), ("data_offsets", [-1, 3]), ("data_offsets", [0]),
        ("dtype", "F128"), ("dtype", None), ("dtype", "BF16"),
    ]:  # fmt: skip
        files += [packed({**header, name: {**header[name], field: value}}) for name in header if name[0] != "_"]
    files += [packed({**header, "__metadata__": value}) for value in (None, [], "x", {"position": 7}, {})]
    files += [packed({**header, name: value}) for name in ("", "\0", "../x", "x" * 9999) for value in (None, {}, 1)]
    return [*files, packed({}), packed(header, body=body + b"\0"), packed(header, body=b""), b"\xff" * 64, b"[" * 4096]


def test_hostile_headers_are_refused(file: Path) -> None:
    for data in hostile_headers(file.read_bytes()):
        file.write_bytes(data)
        with pytest.raises(StateError) as caught:
            Session.load(program(), file)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_damaged_files(file: Path) -> None:
    """Whatever bytes are changed: refused in one line, or the same states (a version that is not looked at)."""
    rng, data = random.Random(0), file.read_bytes()
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            session = Session.load(program(), file)
        except StateError:  # whose text is always one line
            refused += 1
        else:
            for name, want in reference(IDS[:, :7])[1].items():
                np.testing.assert_allclose(session.states[name].numpy(), want, rtol=1e-6)
    assert refused > 300


def test_a_file_that_cannot_be_written(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was there stays, whole; nothing else is left."""
    session, before = program().session(), file.read_bytes()
    with pytest.raises(InputError, match="no such folder"):
        session.save(tmp_path / "nowhere" / "state")

    def full(tensors: object, path: str, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(LinattnError, match="cannot be written, got No space left on device"):
        session.save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_without_the_package(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    for use in (lambda: Session.load(program(), file), lambda: program().session().save(file)):
        with pytest.raises(LinattnError, match=r"need the package safetensors; pip install \"safetensors"):
            use()


def test_a_closed_program(file: Path) -> None:
    closed = Program.load(Hybrid().compile(), "local-sync")
    session = closed.session()
    closed.close()
    for use in (lambda: Session.load(closed, file), lambda: session.save(file)):
        with pytest.raises(StateError, match="the program is closed"):
            use()
