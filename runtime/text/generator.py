"""Text from a program: a prompt or a conversation in, pieces of text out, the state kept for what follows."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from os import PathLike
from typing import Any

from ..errors import InputError, require, require_list, require_whole
from ..generation.feeding import Embed
from ..generation.loop import generate, greedy
from ..generation.sampling import Sampling
from ..generation.speculative import Draft, drafted_by
from ..program import Program
from .defaults import read_defaults
from .files import CONFIG, TEMPLATE, TOKENIZER, find
from .memory import Marks, Memory
from .stops import StopTexts
from .template import ChatTemplate
from .tokenizer import Tokenizer, load_tokenizer

DEFAULT_MAX_TOKENS = 512

_log = logging.getLogger("linattn.text")


class TextGenerator:
    """Generates text with one sequence of states, which it keeps from call to call.

    A prompt or conversation that goes on from the last one prefills only what is new. For conversations side by side
    `fork` it.

    Args:
        program: A model with one input of token ids and one output of logits.
        tokenizer: A folder or a `tokenizer.json`, or an object that is a `Tokenizer`; None: the one inside the
            module, or beside it.
        keep: How many snapshots it and its forks keep, at the ends of prompts and answers; each keeps a session's
            states from being freed.
        embed: For a model that takes embeddings: as of `linattn.generate`.
        draft: Guesses tokens, of which one call verifies several: as of `linattn.generate`, but that it is given all
            tokens of the text or conversation. Answers are those without it.

    Raises:
        LinattnError: The packages tokenizers or jinja2 are missing.
        InputError: No tokenizer, or a damaged file.
    """

    def __init__(
        self,
        program: Program,
        tokenizer: str | PathLike[str] | Tokenizer | None = None,
        *,
        keep: int = 8,
        embed: Embed | None = None,
        draft: Draft | Program | None = None,
    ) -> None:
        require(program, Program, "program", "Program.load(...)")
        self._template: ChatTemplate | None = None
        self._embed = embed
        self._drafting = draft
        self._draft = _guesses(draft)
        self._stop: frozenset[int] = frozenset()
        self.sampling = Sampling()
        """How tokens are drawn where a call does not say: what the model's files say, else the largest logit."""
        if tokenizer is None or isinstance(tokenizer, (str, PathLike)):
            files = find(program.file, tokenizer)
            self._tokenizer: Tokenizer = load_tokenizer(files.contents[TOKENIZER], files.place(TOKENIZER))
            defaults = read_defaults(files, self._tokenizer)
            self._stop, self.sampling = defaults.stop, defaults.sampling
            own = files.contents.get(TEMPLATE)
            template = own.decode(errors="replace") if own is not None else defaults.template
            if template is not None:
                where = files.place(TEMPLATE if own is not None else f"{CONFIG}: chat_template")
                self._template = ChatTemplate(template, defaults.special, where)
        else:
            self._tokenizer = tokenizer
        session = program.session(batch=1 if program.manifest.batch is None else None)
        self._memory = Memory(session, Marks(keep), embed)

    def fork(self) -> TextGenerator:
        """Another generator, for another conversation: what one has read the other need not read again.

        The two may run in different threads. What prompts begin with in common, such as the same instructions, is
        read once; the states there are kept, as are those at the ends of the last prompts and answers.
        """
        other = copy.copy(self)
        other._memory = self._memory.fork()
        other._draft = _guesses(self._drafting)
        return other

    @property
    def can_chat(self) -> bool:
        """Whether the model brings a chat template."""
        return self._template is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns text into tokens and back."""
        return self._tokenizer

    def reset(self) -> None:
        """Forgets what was read and written, by its forks too."""
        self._memory.reset()

    def generate(
        self,
        text: str,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> TextStream:
        """Continues a text.

        Args:
            text: The prompt.
            max_tokens: Most tokens to generate.
            sampling: How they are drawn; None: `self.sampling`.
            stop: Texts that end the answer; they are not part of it.

        Returns:
            An iterator over the pieces of the answer; nothing is computed before the first is asked for.

        Raises:
            InputError: An empty prompt or no tokens wanted.
        """
        require(text, str, "prompt", "a text")
        return self._start(self._tokenizer.encode(text), max_tokens, sampling, stop)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        **variables: Any,
    ) -> TextStream:
        """Answers the last message of a conversation; give all of its messages every time.

        Args:
            messages: Each with `role` and `content`, the first one first.
            max_tokens: Most tokens to generate.
            sampling: How they are drawn; None: `self.sampling`.
            stop: Texts that end the answer; they are not part of it.
            **variables: What the chat template knows besides, such as `tools` or `enable_thinking`.

        Returns:
            An iterator over the pieces of the answer.

        Raises:
            InputError: The model has no chat template, or it refuses the messages.
        """
        if self._template is None:
            hint = "write the conversation as the model was trained to read it, and continue that as a prompt"
            raise InputError("the model has no chat template", where="chat", hint=hint)
        text = self._template.render(messages, **variables)
        return self._start(self._tokenizer.encode(text, special=False), max_tokens, sampling, stop)

    def _start(self, ids: list[int], count: int, sampling: Sampling | None, stop: Sequence[str]) -> TextStream:
        if not ids:
            raise InputError("the prompt must have tokens", where="prompt", got="none")
        require_whole(count, "max_tokens")
        require(sampling, (Sampling, type(None)), "sampling", "a Sampling, such as Sampling(temperature=0.7)")
        if count < 1:
            raise InputError("nothing to generate", where="max_tokens", got=count, expected="at least 1")
        if not isinstance(stop, str):
            require_list(stop, "stop", "a list of texts")
            for one in stop:
                require(one, str, "stop", "texts")
        own = StopTexts((stop,) if isinstance(stop, str) else tuple(stop))
        how = sampling or self.sampling
        return TextStream(self._memory, self._tokenizer, ids, count, how, self._stop, own, self._embed, self._draft)


class TextStream(Iterator[str]):
    """The pieces of one answer, each as soon as its characters are whole.

    A later answer of the same generator ends this one. `"".join(stream)` is the whole answer.
    """

    def __init__(
        self,
        memory: Memory,
        tokenizer: Tokenizer,
        ids: list[int],
        count: int,
        sampling: Sampling,
        stop: frozenset[int],
        texts: StopTexts,
        embed: Embed | None = None,
        draft: Draft | None = None,
    ) -> None:
        self._memory, self._tokenizer, self._texts, self._embed = memory, tokenizer, texts, embed
        self._draft = draft
        self._prompt, self._count, self._sampling, self._stop = ids, count, sampling, stop
        self.reused_tokens = 0
        """Tokens of the prompt that the states held already."""
        self.ids: list[int] = []
        """Tokens generated so far, the one that stopped the answer included."""
        self.prompt_seconds = 0.0
        """From the first call to the first token."""
        self.answer_seconds = 0.0
        """From the first token to the last."""
        self.finish_reason: str | None = None
        """`stop`, `length` (as many tokens as were asked for, or the context is full); None while it goes on."""
        self._pieces = self._run()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self._prompt)

    def __next__(self) -> str:
        """The next piece, never empty."""
        return next(self._pieces)

    def close(self) -> None:
        """Ends the answer here; the states are those after its last token but one."""
        self._pieces.close()

    def _run(self) -> Generator[str]:
        start = time.perf_counter()
        turn = self._memory.begin(self._prompt)
        self.reused_tokens = turn.reused
        _log.info("prompt of %d tokens, %d of them reused", self.prompt_tokens, turn.reused)
        push, decoded = self._tokenizer.stream(), ""
        new, held = self._prompt[turn.start :], self._prompt[: turn.start]
        count = min(self._count, self._memory.room(self.prompt_tokens))
        draft = None if self._draft is None else partial(_guess_after, self._draft, held)
        tokens = generate(turn.session, new, count, self._sampling, self._stop, held, embed=self._embed, draft=draft)
        # Closed here: Python 3.12 leaves what a generator without a handler loops over open after its `close`.
        with closing(turn.follow(tokens)) as steps:
            for token in steps:
                now = time.perf_counter()
                if not self.ids:
                    self.prompt_seconds, start = now - start, now
                self.answer_seconds = now - start
                self.ids.append(token)
                if token in self._stop:
                    self.finish_reason = "stop"
                    break
                whole = push(token)
                decoded += whole
                piece = self._texts.push(whole)
                if piece:
                    yield piece
                if self._texts.found:
                    self.finish_reason = "stop"
                    return
        self.finish_reason = self.finish_reason or "length"
        text = self._tokenizer.decode(self.ids[:-1] if self.ids[-1] in self._stop else self.ids)
        cut_off = text[len(decoded) :] if text.startswith(decoded) else ""  # a character that was never completed
        rest = self._texts.push(cut_off) + self._texts.finish()
        if rest:
            yield rest


def _guess_after(draft: Draft, held: Sequence[int], tokens: Sequence[int], number: int) -> Sequence[int]:
    """What a draft guesses after tokens that a turn began with and those since."""
    return draft([*held, *tokens], number)


def _guesses(draft: Draft | Program | None) -> Draft | None:
    """What guesses; a program does so in a session of its own."""
    return drafted_by(draft, greedy) if isinstance(draft, Program) else draft


__all__ = ["DEFAULT_MAX_TOKENS", "TextGenerator", "TextStream"]
