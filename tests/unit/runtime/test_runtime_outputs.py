"""What a call hands back: the outputs that are wanted, on the host, on the device, or in memory of the caller."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from linattn.runtime import DeviceTensor, InputError, Program, StateError
from linattn.runtime.device import Device
from linattn.runtime.dlpack import borrowed, from_outside, on_device
from linattn.runtime.opening import open_device
from needed import need_device
from tiny_hybrid import reference

Load = Callable[..., Program]
IDS = np.random.default_rng(0).integers(1, 8, (1, 20))
WANT = reference(IDS)[0]


def aligned(shape: tuple[int, ...], dtype: str = "float32", off: int = 0) -> np.ndarray:
    """Memory that begins `off` bytes after a multiple of 64."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + off
    return raw[start : start + nbytes].view(dtype).reshape(shape)


@pytest.mark.parametrize("logits", ["all", "last"])
@pytest.mark.parametrize("tokens", [1, 3, 12])
def test_outputs_stay_on_the_device(load: Load, tokens: int, logits: Any) -> None:
    """Several blocks are joined there, the next call does not overwrite them, and they live without the program."""
    program = load()
    session = program.session()
    first = session.run({"input_ids": IDS[:, :tokens]}, logits, device_outputs=True)["logits"]
    second = session.run({"input_ids": IDS[:, tokens : max(2 * tokens - 4, tokens)]}, logits, device_outputs=True)[
        "logits"
    ]
    assert isinstance(first, DeviceTensor)
    assert (first.device, first.dtype) == (program.device.uri, "float32")
    want = WANT[:, :tokens] if logits == "all" else WANT[:, tokens - 1 : tokens]
    assert repr(first) == f"DeviceTensor(float32, {list(want.shape)}, on {program.device.uri})"
    assert first.nbytes == want.size * 4
    del program, session
    gc.collect()
    np.testing.assert_allclose(first.numpy(), want, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(first), want, rtol=1e-6)
    assert second.shape[1] == (0 if tokens < 5 else 1 if logits == "last" else tokens - 4)


def test_memory_is_shared_where_it_can_be(load: Load) -> None:
    program = load()
    tensor = program.session().run({"input_ids": IDS}, device_outputs=True)["logits"]
    if program.device.driver == "vulkan":
        with pytest.raises(StateError, match=r"vulkan: its memory cannot be shared; only the CPU's and CUDA's is") as e:
            np.from_dlpack(tensor)
        assert "\n" not in str(e.value)
        return
    one, other = np.from_dlpack(tensor), np.from_dlpack(tensor)
    assert one.ctypes.data == other.ctypes.data
    del tensor, program, other
    gc.collect()
    np.testing.assert_allclose(one, WANT, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bool", "int8", "int32", "int64", "float16", "float32", "float64", "bfloat16"])
def test_every_dtype_goes_out_and_in(dtype: str) -> None:
    """IREE's own capsules, as they are made for CUDA, go back in with the same bits."""
    device = open_device("local-sync")
    array = np.arange(6).reshape(2, 3).astype(dtype)
    tensor = DeviceTensor(device, device.upload(array, dtype))
    again = device.from_dlpack(device.to_dlpack(tensor._array, 1, 0))
    assert (again.shape, again.dtype) == ((2, 3), dtype)
    np.testing.assert_array_equal(device.to_host(again), array)
    if dtype != "bfloat16":
        np.testing.assert_array_equal(np.from_dlpack(tensor), array)


def test_names_of_outputs(cpu: Program) -> None:
    session = cpu.session()
    assert session.run({"input_ids": [1, 2]}, outputs=[]) == {}
    assert list(session.run({"input_ids": [1, 2]}, outputs=["logits"])) == ["logits"]
    assert session.position == 4
    assert list(cpu.run({"input_ids": [1]}, outputs=["present.0.conv", "logits"])) == ["logits", "present.0.conv"]
    for outputs, words in (
        (["logit"], "outputs: no such output, got logit, expected logits"),
        (["present.0.rec"], "outputs: no such output, got present.0.rec, expected logits"),
        ("logits", "outputs: a list of names, got 'logits', expected ['logits']"),
    ):
        with pytest.raises(InputError) as caught:
            session.run({"input_ids": [1]}, outputs=outputs)
        assert words in str(caught.value)
    with pytest.raises(InputError, match="outputs: no such output, got present, expected logits, present"):
        cpu.run({"input_ids": [1]}, outputs=["present"])
    assert session.position == 4


def test_unwanted_logits_do_not_leave_the_device(cpu: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    to_host = Device.to_host
    monkeypatch.setattr(Device, "to_host", lambda self, array: read.append(array.nbytes) or to_host(self, array))
    cpu.session().run({"input_ids": IDS}, outputs=[])
    assert read == []


def test_stateless_outputs_stay_on_the_device(load: Load) -> None:
    program = load()
    found = program.run({"input_ids": IDS[:, :8]}, device_outputs=True)
    assert all(isinstance(tensor, DeviceTensor) for tensor in found.values())
    logits, states = reference(IDS[:, :8])
    np.testing.assert_allclose(found["logits"].numpy(), logits, rtol=1e-6)
    for name, want in states.items():
        np.testing.assert_allclose(found[name.replace("past", "present")].numpy(), want, rtol=1e-6)
    pasts = {name: found[name.replace("past", "present")] for name in states}
    again = program.run({"input_ids": IDS[:, 8:11], **pasts})
    np.testing.assert_allclose(again["logits"], WANT[:, 8:11], rtol=1e-6)


@pytest.mark.parametrize("off", [0, 4, None], ids=["aligned", "elsewhere", "strided"])
def test_memory_of_the_caller(load: Load, off: int | None) -> None:
    session = load().session()
    memory = np.zeros((1, 4, 11), np.float32).transpose(0, 2, 1) if off is None else aligned((1, 11, 4), off=off)
    found = session.run({"input_ids": IDS[:, :11]}, into={"logits": memory})
    assert found["logits"] is memory
    np.testing.assert_allclose(memory, WANT[:, :11], rtol=1e-6)
    step = aligned((1, 1, 4))
    for at in range(11, 14):
        session.run({"input_ids": IDS[:, at : at + 1]}, into={"logits": step})
        np.testing.assert_allclose(step, WANT[:, at : at + 1], rtol=1e-6)


def test_memory_of_a_former_call(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    session = load().session()
    tensor = session.run({"input_ids": IDS[:, :1]}, device_outputs=True)["logits"]
    for at in range(1, 4):
        found = session.run({"input_ids": IDS[:, at : at + 1]}, device_outputs=True, into={"logits": tensor})
        assert found["logits"] is tensor
        np.testing.assert_allclose(tensor.numpy(), WANT[:, at : at + 1], rtol=1e-6)


def test_memory_that_does_not_fit(cpu: Program) -> None:
    session = cpu.session()
    session.run({"input_ids": IDS[:, :2]})
    before = session.states.numpy()
    read_only = np.zeros((1, 3, 4), np.float32)
    read_only.flags.writeable = False
    for memory, words in (
        (np.zeros((1, 3, 4)), "into['logits']: wrong dtype, got float64, expected float32"),
        (np.zeros((1, 2, 4), np.float32), "into['logits']: wrong shape, got [1, 2, 4], expected [1, 3, 4]"),
        (read_only, "into['logits']: it may not be written"),
        ([[[0.0]]], "into['logits']: not memory for an output, got list, expected a numpy array or DLPack"),
        (
            cpu.session().run({"input_ids": [1]}, device_outputs=True)["logits"],
            "into['logits']: wrong shape, got [1, 1, 4], expected [1, 3, 4]",
        ),
    ):
        with pytest.raises(InputError) as caught:
            session.run({"input_ids": IDS[:, 2:5]}, into={"logits": memory})
        assert str(caught.value).startswith(words)
    with pytest.raises(InputError, match=r"into: no such output, got logit, expected logits"):
        session.run({"input_ids": IDS[:, 2:5]}, into={"logit": read_only})
    assert session.position == 2
    for name, array in session.states.numpy().items():
        np.testing.assert_array_equal(array, before[name])


def test_no_tokens(cpu: Program) -> None:
    session, nothing = cpu.session(), {"input_ids": np.zeros((1, 0), np.int64)}
    assert session.run(nothing, device_outputs=True)["logits"].shape == (1, 0, 4)
    memory = np.zeros((1, 0, 4), np.float32)
    assert session.run(nothing, into={"logits": memory})["logits"] is memory
    with pytest.raises(InputError, match="wrong shape"):
        session.run(nothing, into={"logits": np.zeros((1, 1, 4), np.float32)})


@pytest.mark.parametrize("value", [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3], np.int32), [[1, 2, 3]]])
def test_ids_in_any_form(cpu: Program, value: Any) -> None:
    want = reference(np.array([[1, 2, 3]]))[0]
    np.testing.assert_allclose(cpu.session().run({"input_ids": value})["logits"], want, rtol=1e-6)
    np.testing.assert_allclose(cpu.run({"input_ids": value})["logits"], want, rtol=1e-6)


class Foreign:
    """What a framework hands over by DLPack."""

    def __init__(self, array: np.ndarray, place: tuple[int, int] = (1, 0)) -> None:
        self.array, self.place = array, place

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.place


def test_ids_and_memory_of_others(load: Load) -> None:
    session = load().session()
    memory = np.zeros((1, 3, 4), np.float32)
    session.run({"input_ids": Foreign(IDS[:, :3])}, into={"logits": Foreign(memory)})
    np.testing.assert_allclose(memory, WANT[:, :3], rtol=1e-6)


def test_what_is_borrowed() -> None:
    """Only memory that kernels may read as it is: elsewhere they would read beside it."""
    cpu = open_device("local-sync")
    good = aligned((2, 16))
    array = borrowed(cpu, good, "float32")
    assert array is not None
    good[...] = 3
    np.testing.assert_array_equal(cpu.to_host(array), good)
    locked = aligned((2, 16))
    locked.flags.writeable = False
    for bad in (aligned((2, 16), off=4), aligned((2, 16))[:, ::2], locked, aligned((2, 16), "int32"), good[:0]):
        assert borrowed(cpu, bad, "float32") is None


@pytest.mark.vulkan
def test_tensors_of_other_devices() -> None:
    vulkan, cpu = need_device("vulkan"), open_device("local-sync")
    tensor = DeviceTensor(vulkan, vulkan.upload(np.ones(3, np.float32), "float32"))
    assert borrowed(vulkan, aligned((4,)), "float32") is None
    with pytest.raises(InputError, match=r"on another device, got vulkan, expected local-sync; use its numpy\(\)"):
        on_device(cpu, tensor)
    np.testing.assert_array_equal(from_outside(tensor), 1)
    assert on_device(vulkan, Foreign(np.ones(3), (2, 0))) is None  # CUDA's memory is not Vulkan's


MASKS = [
    [0, 1, 1],
    [1, 0, 1],
    [1, 1, 0],
    [0, 0, 0],
    [1, 1],
    [1, 1, 1, 1],
    [[1, 1, 1]],
    [1.0, 1.0, 1.0],
    ["a", "b", "c"],
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masks_are_refused_by_both(cpu: Program, mask: Any) -> None:
    """What a session refuses, the stateless call refuses in the same words."""
    found: list[str] = []
    for run in (cpu.session().run, cpu.run):
        with pytest.raises(InputError) as caught:
            run({"input_ids": [[1, 2, 3]], "attention_mask": [mask]})
        found.append(str(caught.value))
    assert found[0] == found[1]
    assert found[0].startswith("attention_mask: ")
