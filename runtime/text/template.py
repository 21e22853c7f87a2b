"""Chat templates: Jinja programs that write a conversation the way a model was trained to read it.

They come with models, so they run in Jinja's sandbox, which lets them reach nothing but their arguments, with what
transformers gives them: `raise_exception`, `strftime_now`, `tojson`, loop controls and `{% generation %}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from ..errors import InputError, require
from .tokenizer import needed_package

_MAX_CHARACTERS = 16 << 20


class ChatTemplate:
    """One template, ready to be filled.

    Args:
        text: The Jinja source.
        special: Names of special tokens and their texts, which templates may use.
        where: What errors name.

    Raises:
        LinattnError: The package jinja2 is missing.
        InputError: Not a template.
    """

    def __init__(self, text: str, special: Mapping[str, str], where: str) -> None:
        self._jinja = needed_package("jinja2")
        self._special = special
        self._where = where
        sandbox = needed_package("jinja2.sandbox").ImmutableSandboxedEnvironment
        extensions = [needed_package("jinja2.ext").loopcontrols, _generation_tag(self._jinja)]
        environment = sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.globals.update(raise_exception=self._refuse, strftime_now=_now)
        environment.filters["tojson"] = _to_json
        self._template: Any = self._guarded(lambda: environment.from_string(text))

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The conversation as text, ready for the answer.

        Args:
            messages: Each with `role` (system, user, assistant, tool) and `content`.
            **variables: Whatever else the template knows, such as `tools` or `enable_thinking`.

        Raises:
            InputError: A message without a role, or one that the template refuses.
        """
        expected = "a list of {'role': ..., 'content': ...}"
        require(messages, (list, tuple), "messages", expected)
        for i, message in enumerate(messages):
            require(message, Mapping, f"messages[{i}]", "{'role': ..., 'content': ...}")
            if not isinstance(message.get("role"), str):
                raise InputError("a message without a role", where=f"messages[{i}]", expected="role and content")
        given = {"messages": [dict(message) for message in messages], "add_generation_prompt": True}

        def write() -> str:
            parts: list[str] = []
            size = 0
            for part in self._template.generate(**self._special, **given, **variables):
                size += len(part)
                if size > _MAX_CHARACTERS:
                    raise InputError("writes too much", where=self._where, got=f"over {_MAX_CHARACTERS} characters")
                parts.append(part)
            return "".join(parts)

        return self._guarded(write)

    def _refuse(self, message: object) -> None:
        raise InputError(f"refuses the messages: {message}", where=self._where)

    def _guarded(self, call: Any) -> Any:
        try:
            return call()
        except InputError:
            raise
        except self._jinja.TemplateError as error:
            raise InputError("fails", where=self._where, got=str(error).partition("\n")[0][:200]) from error
        except Exception as error:  # whatever the expressions of a template raise: a missing field, an overflow
            got = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
            raise InputError("fails", where=self._where, got=got) from error


def _now(form: str) -> str:
    """Transformers' function: the time in a form that the template names."""
    return datetime.now().strftime(form)


def _to_json(value: object, **options: Any) -> str:
    """Transformers' filter: text stays as it is, where Jinja's own escapes it for HTML."""
    return json.dumps(value, ensure_ascii=options.get("ensure_ascii", False), indent=options.get("indent"))


def _generation_tag(jinja: Any) -> type:
    """The extension `{% generation %}...{% endgeneration %}`, marks for training; here it is its text."""

    class Generation(jinja.ext.Extension):
        """The tag."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            """The body between the tags."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation
