"""What the exporters say about generating with a model: where its text ends, and how tokens are drawn.

`generation_config.json` is transformers' file, `genai_config.json` that of onnxruntime-genai, which goes first: it lies
beside exported models and speaks of the export.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from ..errors import InputError
from ..generation.sampling import Sampling
from .files import CONFIG, GENAI, GENERATION, TextFiles
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Defaults:
    """For one model.

    Attributes:
        stop: Ids of the tokens that end a text.
        sampling: How tokens are drawn unless the caller says otherwise.
        special: Name -> text of special tokens (`bos_token`, `eos_token`, ...), for the chat template.
        template: The chat template of `tokenizer_config.json`, if it has one.
    """

    stop: frozenset[int]
    sampling: Sampling
    special: Mapping[str, str]
    template: str | None


def read_defaults(files: TextFiles, tokenizer: Tokenizer) -> Defaults:
    """Reads the three files, as far as they are there.

    Raises:
        InputError: One of them is not JSON, or has a value of another type than it should.
    """
    config, genai, generation = (_read(files, name) for name in (CONFIG, GENAI, GENERATION))
    model, search = _child(genai, "model", files.place(GENAI)), _child(genai, "search", files.place(GENAI))
    special = dict(_special(config))
    stop = {
        *_ids(model, "eos_token_id", files.place(GENAI)),
        *_ids(generation, "eos_token_id", files.place(GENERATION)),
    }
    end = tokenizer.token_id(special["eos_token"]) if "eos_token" in special else None
    if end is not None:
        stop.add(end)
    sampling = _sampling(search, files.place(GENAI)) or _sampling(generation, files.place(GENERATION)) or Sampling()
    return Defaults(frozenset(stop), sampling, special, _template(config))


def _read(files: TextFiles, name: str) -> Mapping[str, Any]:
    data = files.contents.get(name)
    if data is None:
        return {}
    try:
        found: object = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError("not JSON", where=files.place(name), got=str(error).partition("\n")[0][:200]) from error
    if not isinstance(found, dict):
        raise InputError("not a JSON object", where=files.place(name), got=type(found).__name__)
    return cast(Mapping[str, Any], found)


def _child(content: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    found = content.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InputError("not a JSON object", where=f"{where}: {key}", got=type(found).__name__)
    return cast(Mapping[str, Any], found)


def _ids(content: Mapping[str, Any], key: str, where: str) -> list[int]:
    """One id or a list of them."""
    found: Any = content.get(key)
    ids: list[Any] = cast(list[Any], found) if isinstance(found, list) else [] if found is None else [found]
    for value in ids:
        if type(value) is not int:
            raise InputError("not token ids", where=f"{where}: {key}", got=repr(value)[:40], expected="integers")
    return [value for value in ids if value >= 0]  # -1: none


def _sampling(content: Mapping[str, Any], where: str) -> Sampling | None:
    """How tokens are drawn, None where the file does not say."""
    if "do_sample" not in content:
        return None
    names = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    values: dict[str, Any] = {}
    for name, default in names.items():
        value: Any = content.get(name)
        value = default if value is None else value
        if type(value) not in (int, float) or (name == "top_k" and type(value) is not int):
            raise InputError("not a number", where=f"{where}: {name}", got=repr(value)[:40])
        values[name] = value
    penalty = values.pop("repetition_penalty")
    if not content["do_sample"]:
        values = {}
    try:
        return Sampling(**values, repeat_penalty=penalty)
    except InputError as error:
        raise InputError(
            error.message, where=f"{where}: {error.where}", got=error.got, expected=error.expected
        ) from error


def _special(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The special tokens; each is a text, or an object that has it as `content`."""
    for name, value in config.items():
        text: Any = cast(Mapping[str, Any], value).get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            yield name, text


def _template(config: Mapping[str, Any]) -> str | None:
    """The chat template; of several named ones the default."""
    found: Any = config.get("chat_template")
    if isinstance(found, list):
        rows = [cast(Mapping[str, Any], row) for row in cast(list[Any], found) if isinstance(row, dict)]
        found = next((row.get("template") for row in rows if row.get("name") == "default"), None)
    return found if isinstance(found, str) else None
