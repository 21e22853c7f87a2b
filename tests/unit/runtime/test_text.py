"""Text around a session: whole characters, stops, templates, defaults, files, and states that are used again."""

from __future__ import annotations

import inspect
import io
import json
import random
import zipfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linattn.runtime import InputError, Program, Sampling, StateError, TextGenerator
from linattn.runtime.text.defaults import read_defaults
from linattn.runtime.text.files import LIMITS, PREFIX, TOKENIZER, TextFiles, read_folder, read_module
from linattn.runtime.text.memory import Turn
from linattn.runtime.text.stops import StopTexts
from linattn.runtime.text.template import ChatTemplate
from linattn.runtime.text.tokenizer import Tokenizer, load_tokenizer
from tiny_hybrid import Hybrid, reference

from samples.byte_tokenizer import TEMPLATE, tokenizer_json, write


class FourTokens:
    """A tokenizer for the tiny hybrid, whose vocabulary is 4: its letters are a, b, c and d."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        return ["abcd".index(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join("abcd"[token] for token in ids)

    def stream(self) -> Any:
        return lambda token: "abcd"[token]

    def token_id(self, token: str) -> int | None:
        return None


def tokenizer() -> Tokenizer:
    return load_tokenizer(json.dumps(tokenizer_json()).encode(), "test")


def greedy_reference(prompt: str, count: int) -> str:
    ids = [["abcd".index(letter) for letter in prompt]]
    for _ in range(count):
        ids[0].append(int(reference(np.array(ids))[0][0, -1].argmax()))
    return "".join("abcd"[token] for token in ids[0][len(prompt) :])


def test_pieces_are_whole_characters() -> None:
    text = "Häuser 🙂🙂 für € 5, naïve 東京\n"
    ids = tokenizer().encode(text)
    assert ids == list(text.encode())
    push = tokenizer().stream()
    pieces = [push(token) for token in ids]
    assert "".join(pieces) == text
    assert pieces[ids.index(0xF0)] == ""  # the first byte of four says nothing yet
    assert not any("\ufffd" in piece for piece in pieces)


def test_any_bytes_can_be_streamed() -> None:
    numbers = random.Random(0)
    for _ in range(200):
        data = bytes(numbers.randrange(256) for _ in range(numbers.randrange(1, 60)))
        push = tokenizer().stream()
        assert data.decode(errors="replace").startswith("".join(push(token) for token in data))


@settings(max_examples=200, deadline=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_texts(text: str, stops: list[str], data: st.DataObject) -> None:
    """However a text is cut into pieces, what comes out ends before the first of the stops."""
    ends = [text.find(stop) for stop in stops if stop in text]
    found, out, rest = StopTexts(stops), "", text
    while rest and not found.found:
        cut = data.draw(st.integers(1, len(rest)))
        out += found.push(rest[:cut])
        rest = rest[cut:]
    earliest_end = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    if earliest_end is None:
        assert out + found.finish() == text
    else:
        assert found.found
        assert text.startswith(out)
        assert len(out) <= max(ends)
        assert not any(stop in out for stop in stops)


def test_generates_what_the_reference_does(cpu: Program) -> None:
    stream = TextGenerator(cpu, FourTokens()).generate("abca", max_tokens=9)
    assert "".join(stream) == greedy_reference("abca", 9)
    assert (stream.prompt_tokens, stream.reused_tokens, len(stream.ids)) == (4, 0, 9)
    assert stream.finish_reason == "length"


def test_goes_on_from_what_it_has_read(cpu: Program) -> None:
    generator = TextGenerator(cpu, FourTokens())
    first = "".join(generator.generate("abca", max_tokens=5))
    longer = "abca" + first + "bd"
    stream = generator.generate(longer, max_tokens=4)
    assert "".join(stream) == greedy_reference(longer, 4)
    assert stream.reused_tokens == 8  # the last token of an answer has not been fed
    other = generator.generate("bb", max_tokens=3)
    assert "".join(other) == greedy_reference("bb", 3)
    assert other.reused_tokens == 0


def test_forks_share_what_was_read() -> None:
    """Ends of prompts and answers, and where prompts part, if that is far enough; forgotten when one is reset."""
    program = Program.load(Hybrid(max_context=128).compile(), "local-sync")
    first, system = TextGenerator(program, FourTokens(), keep=3), "abcd" * 9
    forks = [first.fork() for _ in range(3)]
    for generator, text, reused in (
        (first, system + "a", 0),
        (forks[0], system + "b", 0),  # marks where the two part
        (forks[1], system + "c", 36),
        (forks[2], system + "ca", 37),
        (first, "b", 0),
    ):
        stream = generator.generate(text, max_tokens=3)
        assert "".join(stream) == greedy_reference(text, 3)
        assert stream.reused_tokens == reused
    forks[2].reset()
    stream = forks[1].generate(system + "d", max_tokens=2)
    assert "".join(stream) == greedy_reference(system + "d", 2)
    assert stream.reused_tokens == 0


def test_the_same_prompt_again() -> None:
    """Table 2 #20: what is kept may end exactly where the prompt does, and is of use all the same."""
    program = Program.load(Hybrid(max_context=128).compile(), "local-sync")
    generator, prompt, reused = TextGenerator(program, FourTokens()), "abcd" * 10, list[int]()
    for _ in range(4):
        stream = generator.generate(prompt, max_tokens=3)
        assert "".join(stream) == greedy_reference(prompt, 3)
        reused.append(stream.reused_tokens)
    assert reused == [0, 0, 39, 39]  # the second one marks what it has in common with the first


def test_goes_back_to_the_prompt_where_an_answer_comes_back_otherwise(cpu: Program) -> None:
    generator = TextGenerator(cpu, FourTokens())
    first = "".join(generator.generate("abca", max_tokens=5))
    other = "".join("abcd"[("abcd".index(letter) + 1) % 4] for letter in first)
    stream = generator.generate("abca" + other + "bd", max_tokens=4)
    assert "".join(stream) == greedy_reference("abca" + other + "bd", 4)
    assert stream.reused_tokens == 4
    again = generator.generate("abcab", max_tokens=4)  # from the first prompt again
    assert "".join(again) == greedy_reference("abcab", 4)
    assert again.reused_tokens == 4


def test_an_answer_that_is_left_early(cpu: Program) -> None:
    generator = TextGenerator(cpu, FourTokens())
    stream = generator.generate("abca", max_tokens=9)
    begun = next(stream) + next(stream)
    stream.close()
    again = generator.generate("abca" + begun + "c", max_tokens=3)
    assert "".join(again) == greedy_reference("abca" + begun + "c", 3)
    assert again.reused_tokens == 5
    old, new = generator.generate("ab"), generator.generate("ba", max_tokens=4)
    next(old)
    begun = next(new)
    with pytest.raises(StateError, match="another answer has begun"):
        next(old)
    assert begun + "".join(new) == greedy_reference("ba", 4)  # nothing was fed in between


def test_close_closes_what_runs_inside(cpu: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever else holds it: Python 3.12 does itself, so that an answer left early was noted when it was deleted."""
    inner, follow = list[Generator[int]](), Turn.follow

    def kept(self: Turn, steps: Generator[int]) -> Generator[int]:
        inner.append(follow(self, steps))
        return inner[0]

    monkeypatch.setattr(Turn, "follow", kept)
    stream = TextGenerator(cpu, FourTokens()).generate("abca", max_tokens=9)
    next(stream)
    assert inspect.getgeneratorstate(inner[0]) == inspect.GEN_SUSPENDED
    stream.close()
    assert inspect.getgeneratorstate(inner[0]) == inspect.GEN_CLOSED


def test_ends_where_the_context_does(cpu: Program) -> None:
    stream = TextGenerator(cpu, FourTokens()).generate("abca", max_tokens=500)
    assert "".join(stream) == greedy_reference("abca", 21)  # 24 fit; the last one need not be fed
    assert stream.finish_reason == "length"
    with pytest.raises(StateError, match="context full"):
        next(TextGenerator(cpu, FourTokens()).generate("a" * 25))


def test_stops(cpu: Program) -> None:
    whole = greedy_reference("abca", 12)
    generator = TextGenerator(cpu, FourTokens())
    stream = generator.generate("abca", max_tokens=12, stop=[whole[3:5]])
    assert "".join(stream) == whole[: whole.find(whole[3:5])]
    assert stream.finish_reason == "stop"
    with pytest.raises(InputError, match="an empty text"):
        generator.generate("a", stop="")
    with pytest.raises(InputError, match="the prompt must have tokens"):
        generator.generate("")
    with pytest.raises(InputError, match="max_tokens: nothing to generate, got 0"):
        generator.generate("a", max_tokens=0)


def test_seeds(cpu: Program) -> None:
    def text(seed: int) -> str:
        return "".join(generator.generate("ab", max_tokens=12, sampling=Sampling(temperature=9, seed=seed)))

    generator = TextGenerator(cpu, FourTokens())
    assert text(1) == text(1)
    assert len({text(seed) for seed in range(5)}) > 1


def test_chat(cpu: Program) -> None:
    with pytest.raises(InputError, match="the model has no chat template"):
        TextGenerator(cpu, FourTokens()).chat([{"role": "user", "content": "a"}])


def files(**contents: object) -> TextFiles:
    names = {"config": "tokenizer_config.json", "genai": "genai_config.json", "generation": "generation_config.json"}
    return TextFiles("here", {names[name]: json.dumps(content).encode() for name, content in contents.items()})


def test_defaults() -> None:
    found = read_defaults(files(), tokenizer())
    assert (found.stop, found.sampling, found.template) == (frozenset(), Sampling(), None)
    search = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}
    found = read_defaults(
        files(
            genai={"model": {"eos_token_id": [5, -1]}, "search": search},
            generation={"do_sample": True, "eos_token_id": 6},
            config={
                "eos_token": {"content": "a"},
                "bos_token": "b",
                "chat_template": TEMPLATE,
                "added": {"c_token": 1},
            },
        ),
        tokenizer(),
    )
    assert found.stop == {5, 6, ord("a")}
    assert found.sampling == Sampling(0.7, 20, 0.8, 0.0, 1.1)
    assert found.template == TEMPLATE
    assert found.special == {"eos_token": "a", "bos_token": "b"}
    assert read_defaults(files(generation={"do_sample": False, "top_p": 0.5}), tokenizer()).sampling == Sampling()
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    assert read_defaults(files(config={"chat_template": named}), tokenizer()).template == "y"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"generation": [1]}, "here: generation_config.json: not a JSON object, got list"),
        ({"genai": {"model": 3}}, "here: genai_config.json: model: not a JSON object, got int"),
        ({"generation": {"eos_token_id": "x"}}, "eos_token_id: not token ids, got 'x', expected integers"),
        ({"generation": {"do_sample": True, "top_k": "many"}}, "top_k: not a number, got 'many'"),
        ({"generation": {"do_sample": True, "top_p": 7}}, "top_p: out of range, got 7, expected 0 to 1"),
    ],
)
def test_bad_defaults(contents: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_defaults(files(**contents), tokenizer())
    assert message in str(caught.value)


def test_templates_have_what_transformers_gives_them() -> None:
    text = (
        "{{ bos_token }}{% for m in messages %}{% if loop.first and m.role != 'system' %}{% break %}{% endif %}"
        "<{{ m.role }}>{% generation %}{{ m.content | tojson }}{% endgeneration %}\n{% endfor %}"
        "{{ strftime_now('%Y')|length }}{{ enable_thinking }}"
    )
    template = ChatTemplate(text, {"bos_token": "<s>"}, "t")
    messages = [{"role": "system", "content": "é <b>"}, {"role": "user", "content": "x"}]
    assert template.render(messages, enable_thinking=False) == '<s><system>"é <b>"<user>"x"4False'
    assert template.render(messages[1:], enable_thinking=1) == "<s>41"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for %}", "t: fails, got "),
        ("{{ raise_exception('no tools') }}", "t: refuses the messages: no tools"),
        ("{{ messages[9].content.x }}", "t: fails, got "),
        ("{{ 1 / 0 }}", "t: fails, got ZeroDivisionError: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "t: fails, got access to attribute '__class__' of 'str' object is unsafe."),
        (
            "{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}",
            "t: writes too much, got over 16777216 characters",
        ),
        ("{% for i in range(100000000) %}{% endfor %}", "t: fails, got OverflowError: Range too big."),
    ],
)
def test_hostile_templates(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        ChatTemplate(text, {}, "t").render([{"role": "user", "content": "x"}])
    assert message in str(caught.value)


def test_messages_have_roles() -> None:
    with pytest.raises(InputError, match=r"messages\[0\]: a message without a role"):
        ChatTemplate("", {}, "t").render([{"content": "x"}])


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"\xff", b'{"model": {"type": "BPE", "vocab": 3, "merges": []}}', b"[" * 10**5]
)
def test_hostile_tokenizers(data: bytes) -> None:
    with pytest.raises(InputError, match="t: not a tokenizer, got "):
        load_tokenizer(data, "t")


def test_folders_and_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", eos_token_id=3)
    assert set(read_folder(folder).contents) == {TOKENIZER, "tokenizer_config.json", "generation_config.json"}
    assert read_folder(folder / TOKENIZER) == read_folder(folder)
    with pytest.raises(InputError, match="no tokenizer; give its folder"):
        read_folder(tmp_path)
    (folder / "chat_template.jinja").write_bytes(b" " * (LIMITS["chat_template.jinja"] + 1))
    with pytest.raises(InputError, match=r"chat_template\.jinja: too large"):
        read_folder(folder)


def with_members(**members: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(PREFIX + name, content)
    return data.getvalue()


def test_modules_of_other_people(tmp_path: Path) -> None:
    """A bomb, a damaged member, no archive at all."""
    file = tmp_path / "m.vmfb"
    file.write_bytes(with_members(**{"generation_config.json": b" " * (LIMITS["generation_config.json"] + 1)}))
    with pytest.raises(InputError, match=r"generation_config\.json: too large"):
        read_module(file)
    content = json.dumps(tokenizer_json()).encode()
    file.write_bytes(with_members(**{TOKENIZER: content}))
    found = read_module(file)
    assert found is not None
    assert found.contents == {TOKENIZER: content}
    damaged = bytearray(file.read_bytes())
    damaged[60:80] = b"\x55" * 20
    file.write_bytes(damaged)
    with pytest.raises(InputError, match="its text files cannot be read"):
        read_module(file)
    file.write_bytes(Hybrid().compile())
    assert read_module(file) is None
