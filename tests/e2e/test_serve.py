"""samples/serve.py with OpenAI's own client: answers, streams, conversations at once, clients that leave, errors."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import onnx
import openai
import pytest
import uvicorn
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime import Program, Sampling, TextGenerator
from linattn.runtime.step import Step

from samples import byte_tokenizer
from samples.serve import Server
from samples.tiny_hybrid import build

CONTEXT = 512
SYSTEM = {
    "role": "system",
    "content": "You answer in bytes, in a long text that all conversations begin with.",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    folder = byte_tokenizer.write(tmp_path_factory.mktemp("serve"))
    onnx.save(build(), folder / "model.onnx")
    options = CompileOptions(target="cpu", max_context=CONTEXT, prefill_blocks=(32,))
    (folder / "tiny.vmfb").write_bytes(compile_model(folder / "model.onnx", options).module)
    return Program.load(folder / "tiny.vmfb")


@pytest.fixture(scope="module")
def server(program: Program) -> Server:
    return Server(program, "tiny", 2)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        uvicorn_server = uvicorn.Server(uvicorn.Config(server.app(), log_level="error"))
        thread = threading.Thread(target=uvicorn_server.run, args=([listening],), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            yield client
        uvicorn_server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def want(program: Program, messages: list[dict[str, str]], **options: object) -> str:
    return "".join(TextGenerator(program).chat(messages, **options))  # type: ignore[arg-type]


def idle(server: Server) -> bool:
    """Whether all generators are free again, soon."""
    for _ in range(300):
        if server.free.qsize() == len(server.slots):
            return True
        time.sleep(0.1)
    return False


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_answers_whole_and_in_pieces(client: openai.OpenAI, program: Program) -> None:
    for options in ({"temperature": 0}, {"temperature": 0.8, "seed": 7, "top_p": 0.9}):
        asked = {"model": "tiny", "messages": [user("Hällo")], "max_tokens": 24, **options}
        expected = want(program, [user("Hällo")], max_tokens=24, sampling=Sampling(**options))  # type: ignore[arg-type]
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == expected
        assert whole.choices[0].finish_reason == "length"
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (23, 24)
        pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert pieces[0].choices[0].delta.role == "assistant"
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == expected
        assert pieces[-2].choices[0].finish_reason == "length"
        assert pieces[-1].usage.total_tokens == 47


def test_stop(client: openai.OpenAI, program: Program) -> None:
    text = want(program, [user("Hi")], max_tokens=24)
    stop = text[5]
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=24, temperature=0, stop=stop)
    assert found.choices[0].message.content == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_conversations_side_by_side_share_what_they_begin_with(client: openai.OpenAI, program: Program) -> None:
    """More of them than generators; each is answered as if it were alone, and reads only what is new."""
    texts = [f"Question {i}?" for i in range(6)]
    expected = {text: want(program, [SYSTEM, user(text)], max_tokens=16) for text in texts}

    def ask(messages: list[dict[str, str]]) -> tuple[str, int]:
        found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=16, temperature=0)
        return found.choices[0].message.content, found.usage.prompt_tokens_details.cached_tokens

    ask([SYSTEM, user("First")]), ask([SYSTEM, user("Second")])
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, [[SYSTEM, user(text)] for text in texts]))
    assert {text: answer for text, (answer, _) in zip(texts, answers, strict=True)} == expected
    common = len("[system]") + len(SYSTEM["content"]) + len("[user]")
    assert all(cached >= common for _, cached in answers)
    more = [SYSTEM, user(texts[0]), {"role": "assistant", "content": answers[0][0]}, user("And?")]
    answer, cached = ask(more)
    assert answer == want(program, more, max_tokens=16)
    assert cached >= common + len(texts[0])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer(
    client: openai.OpenAI, server: Server, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = Step.call

    def slow(*args: Any) -> Any:  # 400 tokens of this model take 20 ms
        time.sleep(0.005)
        return quick(*args)

    monkeypatch.setattr(Step, "call", slow)
    before = sum(slot._memory.tokens != [] for slot in server.slots)
    assert before
    asked = {"model": "tiny", "messages": [user("x" * 40)], "max_tokens": 400, "temperature": 0}
    if stream:
        with client.chat.completions.create(**asked, stream=True) as pieces:
            next(iter(pieces))
    else:
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(**asked, timeout=0.1)
    assert idle(server)
    turns = [len(slot._memory.tokens) for slot in server.slots]
    assert max(turns) < 400


def test_errors(client: openai.OpenAI, server: Server) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="other", messages=[user("Hi")])
    assert missing.value.code == "model_not_found"
    for messages, code in (([user("x" * 600)], "context_length_exceeded"), ([], None), ([{"role": "user"}], None)):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as refused:
                create(model="tiny", messages=messages, stream=stream)
            assert (refused.value.type, refused.value.code) == ("invalid_request_error", code)
    for wrong, words in (
        ({"temperature": -1}, "temperature: out of range"),
        ({"temperature": "hot"}, "not a number"),
        ({"n": 2}, "one answer at a time"),
        ({"stop": [1]}, "stop is a text"),
        ({"max_tokens": -1}, "max_tokens: nothing to generate"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            create(model="tiny", messages=[user("Hi")], **wrong)
    with pytest.raises(openai.NotFoundError, match="no such address: /v1/completions"):
        client.completions.create(model="tiny", prompt="Hi")
    assert idle(server)


def test_an_answer_ends_where_the_context_does(client: openai.OpenAI, program: Program) -> None:
    messages = [user("x" * (CONTEXT - 40))]
    found = client.chat.completions.create(model="tiny", messages=messages, temperature=0)
    assert found.choices[0].finish_reason == "length"
    assert found.usage.total_tokens == CONTEXT + 1  # the last token is not read again
