from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time

import ml_dtypes
import numpy as np
import onnx
import pytest
from conftest import need_device
from iree.compiler.tools import compile_str
from linattn.frontend import CompileOptions, compile_model
from linattn.frontend.compile import compile_model as compile_here
from linattn.runtime import InputError, Program, TargetError
from linattn.runtime.bench.cases import AttentionCase
from linattn.runtime.bench.op_models import build_op
from linattn.runtime.device import DTYPE_NAMES, Device, Move, numpy_dtype
from linattn.runtime.drivers import default_uri, list_devices, subgroup_sizes
from linattn.runtime.integrity import sealed
from linattn.runtime.module import Module
from linattn.runtime.opening import open_device
from tiny_hybrid import FLAGS, Hybrid, reference


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (1, 0), (0, 4), (2, 4, 0), (7, 3, 5)])
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_upload_and_back(device: Device, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 100, shape)
    array = np.asarray(array).astype(numpy_dtype(dtype))
    back = device.to_host(device.upload(array, dtype))
    assert (back.shape, back.dtype) == (shape, array.dtype)
    np.testing.assert_array_equal(back, array)
    if shape != () and array.size:
        strided = array[..., ::-1]
        np.testing.assert_array_equal(device.to_host(device.upload(strided, dtype)), strided)


def test_bfloat16_is_a_dtype() -> None:
    assert numpy_dtype("bfloat16") == ml_dtypes.bfloat16


@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (0, 3), (64, 64)])
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "int64"])
def test_zeros_and_fill(device: Device, shape: tuple[int, ...], dtype: str) -> None:
    assert not device.to_host(device.zeros(shape, dtype)).any()
    dirty = device.upload(np.ones(shape, dtype), dtype)
    device.fill_zero([dirty, device.zeros(shape, dtype)])
    assert not device.to_host(dirty).any()


@pytest.mark.parametrize("size", [2304, 8192, 131_072, 300_000, 1 << 22])
def test_new_memory_of_a_cpu_is_zeros(size: int) -> None:
    """IREE's comes from calloc, and states count on it; what others left where it was before is not in it."""
    for uri in ("local-task", "local-sync"):
        device = open_device(uri)
        assert device.clears_new
        for _ in range(3):
            arrays = [device.empty((size,), "uint8") for _ in range(4)]
            for array in arrays:
                view = device.host_view(array)
                assert view is not None
                assert not view.any()
                view.fill(0xFF)
            del view, array, arrays


@pytest.mark.vulkan
def test_a_queue_s_copies_share_a_semaphore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making one takes a driver longer than the copy. One that was not waited for is nobody's, but its copy is done."""
    device = need_device("vulkan")
    device._semaphores.clear()
    array, target = device.upload(np.arange(6, dtype=np.float32), "float32"), device.zeros((6,), "float32")
    move = Move(array, target, ((0, 0, 24),))
    device.move([move])
    ((semaphore, reached),) = device._semaphores
    device.move([move])
    device.fill_zero([target])
    assert device._semaphores == [(semaphore, reached + 2)]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(device, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            device.move([move])
    assert semaphore.query() == reached + 3
    assert device._semaphores == []
    np.testing.assert_array_equal(device.to_host(target), np.arange(6))


def test_copy_is_separate(device: Device) -> None:
    one, two = device.upload(np.arange(6, dtype=np.float32), "float32"), device.zeros((0, 2), "float16")
    copies = device.copy([one, two])
    device.fill_zero([one])
    np.testing.assert_array_equal(device.to_host(copies[0]), np.arange(6))
    assert copies[1].shape == (0, 2)
    assert not device.to_host(one).any()  # read anew, not from a cache (iree#18870)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_last_position(device: Device, axis: int) -> None:
    array = np.arange(3 * 4 * 5, dtype=np.float16).reshape(3, 4, 5)
    got = device.to_host_rows(device.upload(array, "float16"), axis, array.shape[axis] - 1, array.shape[axis])
    np.testing.assert_array_equal(got, np.take(array, [-1], axis))


def test_host_copies_are_independent(device: Device) -> None:
    array = device.upload(np.zeros(4, np.float32), "float32")
    first = device.to_host(array)
    first[:] = 5
    assert not device.to_host(array).any()
    source = np.ones(4, np.float32)
    uploaded = device.upload(source, "float32")
    source[:] = 7
    np.testing.assert_array_equal(device.to_host(uploaded), 1)


def test_wrong_dtype_is_refused(device: Device) -> None:
    with pytest.raises(InputError, match="wrong dtype, got float64, expected float32"):
        device.upload(np.zeros(2), "float32")


def test_opened_once() -> None:
    assert open_device("cpu") is open_device("local-task")


def test_threads_of_the_first_program_are_those_of_the_process() -> None:
    """In a process of its own: IREE starts its workers once."""
    code = """
import os
from linattn.runtime.opening import open_device
before = len(os.listdir("/proc/self/task"))
device = open_device("cpu", threads=3)
started = len(os.listdir("/proc/self/task")) - before
assert started >= 3, started
assert open_device("cpu") is device and open_device("local-task", 3) is device
try:
    open_device("cpu", threads=2)
except Exception as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "threads: cannot be changed, got 2, but 3 were started" in done.stdout


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="for Linux")
def test_a_caller_waits_without_taking_the_cpu_of_a_worker(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = Module.__new__(Module), list[int]()
    module._device, module._lock, module._closed, module._result_specs = device, threading.Lock(), False, {"f": None}
    module._has_workers, module._alone = device.has_workers, None

    def invoke(function: str, packed: object, results: object, alone: bool) -> None:
        seen.append(os.sched_getscheduler(0))
        if len(seen) == 2:
            raise RuntimeError("a call that fails")
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_invoke", invoke)
    before = os.sched_getscheduler(0)
    module.call("f", [], [])
    for error in (TargetError, KeyboardInterrupt):
        with pytest.raises(error):
            module.call("f", [], [])
    assert seen == [os.SCHED_BATCH if device.driver == "local-task" else before] * 3
    assert os.sched_getscheduler(0) == before


@pytest.mark.parametrize(("name", "threads"), [("local-sync", 2), ("cpu", 0), ("vulkan", 1)])
def test_threads_that_cannot_be(name: str, threads: int) -> None:
    with pytest.raises(InputError, match="threads: cannot be set"):
        open_device(name, threads)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("metal3", "cpu | cuda | vulkan"),
        ("", "cpu | cuda | vulkan"),
        ("vulkan://99", "no such device"),
        ("vulkan://GPU-00", "no such device"),
        ("local-task://5", "no such device"),
    ],
)
def test_missing_device(name: str, words: str) -> None:
    with pytest.raises(TargetError) as caught:
        open_device(name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# Prints the priorities of a process's threads while a device is open, and which of them use their core.
IDLE = """
import json, os, time
from pathlib import Path
from linattn.runtime.opening import open_device
device = open_device("vulkan")
def ticks():
    tasks = Path("/proc/self/task").iterdir()
    return {task.name: int((task / "stat").read_text().rpartition(")")[2].split()[11]) for task in tasks}
before = ticks()
time.sleep(0.5)
nice = {name: os.getpriority(os.PRIO_PROCESS, int(name)) for name in before}
busy = [name for name, spent in ticks().items() if spent - before.get(name, 0) > 20]
print(json.dumps([device.description, nice, busy]), flush=True)
os._exit(0)
"""


@pytest.mark.vulkan
def test_a_software_vulkan_device_lets_others_go_first() -> None:
    """Mesa spins where IREE's queue threads wait: what spins while the device is idle steps back, and nothing else.

    In a process that nothing keeps from spinning, unlike those of the tests (tests/lavapipe_naps.c).
    """
    given = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([sys.executable, "-c", IDLE], env=given, capture_output=True, text=True, check=True)
    description, nice, busy = json.loads(done.stdout)
    if "llvmpipe" not in description:
        pytest.skip("for software Vulkan")
    stepped_back = [name for name, priority in nice.items() if priority == 10]
    assert set(busy) <= set(stepped_back), nice
    assert 1 <= len(stepped_back) <= 3, nice


@pytest.mark.vulkan
def test_vulkan_by_number(device: Device) -> None:
    if device.driver != "vulkan":
        pytest.skip("for Vulkan")
    first = open_device("vulkan://0")
    sizes = subgroup_sizes(first.uri)
    assert sizes is not None
    assert 1 <= sizes[0] <= sizes[1] <= 128


def test_more_memory_than_there_is(device: Device) -> None:
    """Table 2 #35: a line that says how much was wanted, sparse memory or not; the device goes on."""
    for allocate in (device.empty, device.zeros, device.host_buffer):
        with pytest.raises(TargetError, match=r"cannot allocate, got 4398046511104 bytes") as caught:
            allocate([1 << 42], "uint8")
        assert "\n" not in str(caught.value)
    assert not device.to_host(device.zeros([1 << 20], "uint8")).any()


@pytest.mark.vulkan
def test_a_device_of_two_names_is_opened_once(device: Device) -> None:
    """By its driver, by number, by path: a second one would have memory, queues and threads of its own."""
    if device.driver != "vulkan":
        pytest.skip("for Vulkan")
    uri = default_uri(list_devices("vulkan"))
    assert uri is not None
    number = [listed for listed, _ in list_devices("vulkan")].index(uri)
    assert device is open_device("vulkan") is open_device(uri) is open_device(f"vulkan://{number}")
    assert device.description == dict(list_devices("vulkan"))[uri]


def test_the_default_device_is_the_first_that_can_be_used() -> None:
    found = [("vulkan://old", "GPU (driver) [below baseline]"), ("vulkan://new", "GPU"), ("vulkan://other", "GPU")]
    assert default_uri(found) == "vulkan://new"
    assert default_uri(found[:1]) is default_uri([]) is None


def test_unaligned_bytes() -> None:
    """Table 2 #34: a module at an odd address gives the right numbers."""
    data = Hybrid().compile()
    ids = np.array([[3, 1, 2]])
    want = reference(ids)[0]
    for offset in range(1, 8):
        memory = bytearray(offset) + data
        view = memoryview(memory)[offset:]
        logits = Program.load(view).run({"input_ids": ids})["logits"]  # type: ignore[arg-type]
        np.testing.assert_allclose(logits, want, rtol=1e-6)


def test_zero_size_state(device: Device) -> None:
    """A conv state of k = 1 is [B, C, 0]; it goes in and out on every driver."""
    source = """
    func.func @f(%x: tensor<1x4xf32>, %s: tensor<1x4x0xf32>) -> (tensor<1x4xf32>, tensor<1x4x0xf32>) {
      %y = arith.addf %x, %x : tensor<1x4xf32>
      return %y, %s : tensor<1x4xf32>, tensor<1x4x0xf32>
    }"""
    target = "vulkan" if device.driver == "vulkan" else "cpu"
    module = Module(sealed(compile_str(source, extra_args=[*FLAGS[target]])))
    module.link(device, None)
    arguments = [device.upload(np.ones((1, 4), np.float32), "float32"), device.zeros((1, 4, 0), "float32")]
    for _ in range(2):
        out, state = module.call("f", arguments, ["float32", "float32"])
        assert device.to_host(state).shape == (1, 4, 0)
        np.testing.assert_array_equal(device.to_host(out), 2)
        arguments[1] = state


def test_call_errors_are_one_line(device: Device) -> None:
    target = "vulkan" if device.driver == "vulkan" else "cpu"
    source = "func.func @f(%x: tensor<4xf32>) -> tensor<4xf32> { return %x : tensor<4xf32> }"
    source = source.replace("return %x", "%y = arith.addf %x, %x : tensor<4xf32>\n return %y")
    module = Module(sealed(compile_str(source, extra_args=[*FLAGS[target]])))
    module.link(device, None)
    good = device.zeros((4,), "float32")
    for arguments, dtypes in (
        ([device.zeros((5,), "float32")], ["float32"]),
        ([good, good], ["float32"]),
        ([], ["float32"]),
        ([3], ["float32"]),
        ([good], ["float32", "float32"]),
        ([good], ["float16"]),
    ):
        with pytest.raises(TargetError) as caught:
            module.call("f", arguments, dtypes)
        assert "\n" not in str(caught.value)
    assert len(module.call("f", [good], ["float32"])) == 1


def test_calls_are_let_in_one_by_one() -> None:
    """An IREE context is not made for two callers at once; nothing else would show a missing lock."""
    module = Module(Hybrid().compile())
    module.link(open_device("local-sync"), None)
    inside, most = [0], [0]

    class Context:
        def invoke(self, *_: object) -> None:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            inside[0] -= 1

    module._context = Context()

    def call() -> None:
        with contextlib.suppress(TargetError):  # the fake returns no results
            module.call("decode", [], ["float32"])

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert most == [1]


@pytest.mark.vulkan
def test_results_in_new_buffers_every_time(device: Device) -> None:
    """A module of several command buffers, whose last one IREE keeps: it writes where it is told to, in every call."""
    if device.driver != "vulkan":
        pytest.skip("for Vulkan")
    case = AttentionCase(tokens=3, dtype="float32", heads=1, kv_heads=1, dk=8, dv=8)
    model = onnx.load_from_string(build_op(case, case.inputs(), "com.microsoft"))
    options = CompileOptions(target="vulkan", strategy="recurrent")
    program = Program.load(compile_model(model, options).module)
    for seed in range(3):
        given = AttentionCase(tokens=3, dtype="float32", heads=1, kv_heads=1, dk=8, dv=8, seed=seed)
        want, got = given.reference(given.inputs()), program.run(given.inputs())
        for name, array in want.items():
            np.testing.assert_allclose(got[name], array, atol=1e-5)


@pytest.mark.vulkan
def test_a_large_constant() -> None:
    """Table 2 #35: a table beyond what one buffer of Vulkan must hold (128 MiB), in memory that a device has."""
    rows, width = 34_000, 1024
    table = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
    made = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gather", ["table", "at"], ["found"])],
        "large",
        [made("at", onnx.TensorProto.INT64, [3])],
        [made("found", onnx.TensorProto.FLOAT, [3, width])],
        [onnx.numpy_helper.from_array(table, "table")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    program = Program.load(compile_here(model, CompileOptions(target="vulkan")).module)
    at = np.array([0, rows // 2, rows - 1])
    np.testing.assert_array_equal(program.run({"at": at})["found"], table[at])
