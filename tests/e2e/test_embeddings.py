"""Models that take embeddings, and positions that are not the number of tokens, as after an image (PEERS g6)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from linattn.frontend import CompileOptions
from linattn.frontend.compile import compile_model
from linattn.runtime import DeviceTensor, InputError, Program, TextGenerator, generate, greedy
from linattn.runtime.dlpack import new_tensor

from tests.tolerances import MODEL_LOGITS, error

NAME = "qwen35_vl--genai-cpu-fp32-exclude_embeds_true"


@pytest.fixture(scope="module")
def folder(shared_models: Path) -> Path:
    return shared_models / "families" / NAME


@pytest.fixture(scope="module")
def program(folder: Path) -> Program:
    options = CompileOptions(target="cpu", max_context=128, prefill_blocks=(8,))
    return Program.load(compile_model(folder / "model.onnx", options).module)


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "ort_expected.npz") as arrays:
        return dict(arrays)


def reference(folder: Path, program: Program, embeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """ONNX Runtime's logits of all tokens at once, from no past."""
    session, tokens = onnxruntime.InferenceSession(folder / "model.onnx"), embeds.shape[1]
    feeds = {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": np.ones((1, tokens), np.int64)}
    for spec in program.states:
        shape = [size if isinstance(size, int) else {"batch_size": 1}.get(size, 0) for size in spec.shape]
        feeds[spec.name] = np.zeros(shape, np.float32)
    return session.run(["logits"], feeds)[0]


def test_generation_from_a_table_or_a_function(program: Program, expected: dict[str, np.ndarray]) -> None:
    table = expected["embed"]
    for embed in (table, lambda ids: table[ids]):
        for length in (1, 5, 65):
            found = greedy(program.session(), expected[f"ids_{length}"], 16, embed=embed)
            assert list(found) == expected[f"greedy_{length}"].tolist()


def test_text_from_a_table(program: Program, expected: dict[str, np.ndarray]) -> None:
    """Prompts share what they begin with here too."""

    class Numbers:
        def encode(self, text: str, special: bool = True) -> list[int]:
            return [int(word) for word in text.split()]

        def decode(self, ids: list[int]) -> str:
            return "".join(f"{token} " for token in ids)

        def stream(self) -> object:
            return lambda token: f"{token} "

        def token_id(self, token: str) -> int | None:
            return None

    first = TextGenerator(program, Numbers(), embed=expected["embed"])  # type: ignore[arg-type]
    ids = expected["ids_65"][0].tolist()
    "".join(first.generate(" ".join(map(str, [*ids[:60], 7])), max_tokens=2))
    stream = first.fork().generate(" ".join(map(str, ids)), max_tokens=16)
    assert "".join(stream).split() == [str(token) for token in expected["greedy_65"]]
    again = first.fork().generate(" ".join(map(str, ids)), max_tokens=2)
    assert "".join(again).split() == [str(token) for token in expected["greedy_65"][:2]]
    assert again.reused_tokens == 60


def test_positions_that_are_not_the_number_of_tokens(folder: Path, program: Program, expected: dict) -> None:
    """An image of 2 x 3 patches between texts: its tokens share a position in time, and what follows counts on."""
    ids = expected["ids_65"][:, :20]
    text, image = np.arange(4), np.array([[4] * 6, [4, 4, 4, 5, 5, 5], [4, 5, 6] * 2])
    positions = np.concatenate([np.stack([text] * 3), image, np.stack([7 + np.arange(10)] * 3)], 1)[:, None, :]
    session, fed = program.session(), list[np.ndarray]()
    run = session.run
    session.run = lambda feed, **how: fed.append(feed["position_ids"]) or run(feed, **how)  # type: ignore[method-assign]
    found = list(generate(session, ids, 12, embed=expected["embed"], prompt={"position_ids": positions}))
    assert session.position == 20 + 11
    later = np.broadcast_to(17 + np.arange(11), (3, 1, 11))
    np.testing.assert_array_equal(np.concatenate(fed, 2), np.concatenate([positions, later], 2))
    embeds = expected["embed"][np.concatenate([ids, [found[:-1]]], 1)]
    logits = reference(folder, program, embeds, np.concatenate([positions, later], 2))
    assert found == logits[0, 19:].argmax(-1).tolist()
    counted = program.session().run({"inputs_embeds": embeds})["logits"]
    assert error(counted, logits) > 10 * MODEL_LOGITS["f32"]  # so positions do matter
    given = {"position_ids": positions, "inputs_embeds": embeds[:, :20]}
    assert list(generate(program.session(), ids, 12, embed=expected["embed"], prompt=given)) == found
    manual = program.session().run({"inputs_embeds": embeds, "position_ids": np.concatenate([positions, later], 2)})
    assert error(manual["logits"], logits) < MODEL_LOGITS["f32"]


def test_embeddings_that_are_on_the_device(program: Program, expected: dict[str, np.ndarray]) -> None:
    """They are cut into blocks there; so a program's outputs go into another one's inputs."""
    embeds = expected["embed"][expected["ids_65"]]
    tensor = new_tensor(program.device, embeds.shape, "float32")
    np.from_dlpack(tensor, copy=False)  # the same memory, read-only for others
    tensor._host[...] = embeds  # type: ignore[index]
    for session, tokens in ((program.session(), 65), (program.session(), 16)):
        want = session.fork().run({"inputs_embeds": embeds[:, :tokens]})["logits"]
        part = DeviceTensor(program.device, program.device.upload(embeds[:, :tokens], "float32"))
        np.testing.assert_array_equal(session.run({"inputs_embeds": part})["logits"], want)
    np.testing.assert_array_equal(program.session().run({"inputs_embeds": tensor})["logits"].shape, (1, 65, 500))
    half = DeviceTensor(program.device, program.device.upload(embeds.astype(np.float16), "float16"))
    with pytest.raises(InputError, match="inputs_embeds: wrong dtype, got float16, expected float32"):
        program.session().run({"inputs_embeds": half})


def test_what_is_refused(program: Program, expected: dict[str, np.ndarray]) -> None:
    table, session = expected["embed"], program.session()
    for embed, ids, words in (
        (None, [1], r"inputs_embeds: the model takes embeddings; pass embed: the table \[V, D\]"),
        (table, [500], r"prompt\[0, 0\]: index out of range, got 500, expected 0 to 499"),
        (table, [-1], r"prompt\[0, 0\]: index out of range, got -1, expected 0 to 499"),
        (table, [], r"prompt: the prompt must have tokens"),
        (table[0], [1], r"embed: not a table, got \[64\], expected \[V, D\]"),
        (table.astype(np.float64), [1], r"inputs_embeds: wrong dtype, got float64, expected float32"),
        (lambda ids: table[ids][0], [1, 2], r"inputs_embeds: wrong shape, got \[2, 64\]"),
    ):
        with pytest.raises(InputError, match=words):
            list(greedy(session, ids, 2, embed=embed))
    assert session.position == 0
