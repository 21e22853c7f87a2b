"""The files of text beside an ONNX model go into its module: tokenizer, chat template, defaults of generation."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import IO

from linattn.runtime.errors import InputError
from linattn.runtime.sizes import size_text
from linattn.runtime.text.files import PREFIX, TOKENIZER, TextFiles, read_folder

from .plan.report import CompileReport

BESIDE = "beside"
"""Take the tokenizer.json beside the ONNX file, if there is one."""


def text_files(wanted: Path | str | None, model: Path | None) -> TextFiles | None:
    """The files that a module will carry.

    Args:
        wanted: A folder, a tokenizer.json, `BESIDE`, or None for none.
        model: The ONNX file, None if the model was handed over in memory.

    Raises:
        InputError: if a file is missing, too large or not a tokenizer.
    """
    if wanted == BESIDE and (model is None or not (model.parent / TOKENIZER).is_file()):
        return None
    if wanted is None:
        return None
    folder = model.parent if wanted == BESIDE and model is not None else Path(wanted)
    files = read_folder(folder)
    try:
        content: object = json.loads(files.contents[TOKENIZER])
    except (ValueError, RecursionError) as error:
        content = str(error).partition("\n")[0]
    if not isinstance(content, dict) or "model" not in content:
        hint = "give another with --tokenizer, or --tokenizer none"
        got = content if isinstance(content, str) else "other JSON"
        raise InputError("not a tokenizer", where=files.place(TOKENIZER), got=got, hint=hint)
    return files


def add_text(module: Path | IO[bytes], files: TextFiles) -> None:
    """Adds the files to a module that has been written and has no seal yet.

    Args:
        module: The `.vmfb`, which is a zip archive too.
        files: What to add; the same bytes every time.
    """
    with zipfile.ZipFile(module, "a") as archive:
        for name, data in files.contents.items():
            archive.writestr(zipfile.ZipInfo(PREFIX + name), data, zipfile.ZIP_DEFLATED)


def with_text(data: bytes, files: TextFiles) -> bytes:
    """The bytes of a module with the files added."""
    module = io.BytesIO(data)
    add_text(module, files)
    return module.getvalue()


def report_text(files: TextFiles, report: CompileReport) -> None:
    """Says in the report what the module carries."""
    size = sum(len(data) for data in files.contents.values())
    report.notes.append(f"text from {files.where} inside: {', '.join(files.contents)} ({size_text(size)})")
