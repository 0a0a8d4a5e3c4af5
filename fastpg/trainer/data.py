"""Datasets from files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpg.trainer.parsing import InputError


def load_jsonl(path: str, columns: Sequence[str] = ("prompt",)) -> list[dict[str, Any]]:
    """Read a JSONL dataset. Blank lines are skipped.

    Args:
        path: The file, UTF-8 text of one JSON object a line.
        columns: What each object must hold, as text or a list of chat messages.

    Returns:
        The objects.

    Raises:
        InputError: The file cannot be read or is empty, or a line is bad (the sentence says which).
    """
    try:
        # Lines are those of the file: splitlines() also splits at U+2028, which JSON may hold.
        # Some editors begin UTF-8 text with a byte order mark, which is no part of the JSON.
        with Path(path).open(encoding="utf-8-sig") as file:
            lines = list(file)
    except UnicodeDecodeError:
        raise InputError(f"The dataset {path} is not UTF-8 text.") from None
    except OSError as error:
        raise InputError(f"Cannot read the dataset {path}: {error.strerror}.") from None
    examples = [
        _example(line, columns, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not examples:
        raise InputError(f"The dataset {path} is empty.")
    return examples


def _example(line: str, columns: Sequence[str], where: str) -> dict[str, Any]:
    """Return the object of one line; `where` names the line in errors."""
    try:
        example = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg}).") from None
    except (ValueError, RecursionError) as error:
        # Python bounds the digits of a number and the depth of brackets.
        raise InputError(f"{where}: JSON that Python cannot read ({error}).") from None
    for name in columns:
        if not isinstance(example, dict) or not isinstance(example.get(name), str | list):
            raise InputError(f"{where}: no {name!r} that is text or a list of chat messages.")
    return example
