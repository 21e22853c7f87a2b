"""The tokenizer of a model, by the library `tokenizers` from its `tokenizer.json`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from linattn.install import install_hint

from ..errors import InputError, LinattnError

_Result = TypeVar("_Result")


class Tokenizer(Protocol):
    """What text is turned into tokens with; `load_tokenizer` makes one, any object that has these will do."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The tokens of a text.

        Args:
            text: Any text; special tokens that are spelled out in it count as such.
            special: Add what the tokenizer puts around a text, such as a token for its beginning.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        ...

    def stream(self) -> Callable[[int], str]:
        """A function that is given one token after the other and returns the text that is whole by then.

        No character is ever split: the bytes of one that is not complete wait for the next token.
        """
        ...

    def token_id(self, token: str) -> int | None:
        """The id of a token that is spelled so."""
        ...


def load_tokenizer(data: bytes, where: str) -> Tokenizer:
    """A tokenizer from the content of a `tokenizer.json`.

    Args:
        data: The file's bytes.
        where: What errors name.

    Raises:
        LinattnError: The package tokenizers is missing.
        InputError: Not such a file.
    """
    library = needed_package("tokenizers")
    return _HuggingFace(_guarded(lambda: library.Tokenizer.from_buffer(data), where, "not a tokenizer"), library, where)


def needed_package(name: str) -> Any:
    """A package of the extra `text`.

    Raises:
        LinattnError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise LinattnError(f"text needs the package {name}", hint=install_hint("text")) from error


class _HuggingFace:
    def __init__(self, tokenizer: Any, library: Any, where: str) -> None:
        self._tokenizer = tokenizer
        self._library = library
        self._where = where
        tokenizer.no_truncation()  # as trained; a prompt is never cut or filled up
        tokenizer.no_padding()

    def encode(self, text: str, special: bool = True) -> list[int]:
        return _guarded(
            lambda: list(self._tokenizer.encode(text, add_special_tokens=special).ids), self._where, "cannot encode"
        )

    def decode(self, ids: Sequence[int]) -> str:
        return _guarded(lambda: self._tokenizer.decode(list(ids)), self._where, "cannot decode")

    def stream(self) -> Callable[[int], str]:
        stream = self._library.decoders.DecodeStream(skip_special_tokens=True)

        def push(token: int) -> str:
            return _guarded(lambda: stream.step(self._tokenizer, token) or "", self._where, "cannot decode")

        return push

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


def _guarded(call: Callable[[], _Result], where: str, message: str) -> _Result:
    """What the library returns; its errors, and the panics of its Rust code, in one line."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # PanicException is no Exception
        raise InputError(
            message, where=where, got=(str(error) or type(error).__name__).partition("\n")[0][:200]
        ) from error
