"""Datasets from files, directories and the Hub, and the forms that prompts have in them."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from fastpg.trainer.settings.parsing import InputError

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""Names of ShareGPT for the roles of a chat; others are kept."""

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
"""Whatever ends so is meant to be a file."""


class Row(NamedTuple):
    """A row of a dataset, and where it is, for errors."""

    where: str
    values: dict[str, Any]


def load_prompts(path: str, column: str | None = None) -> list[dict[str, Any]]:
    """Read a dataset of prompts.

    Args:
        path: What `load_rows` reads.
        column: The column of the prompts. None: "prompt", "messages" or "conversations", the first
            of them that there is.

    Returns:
        The rows, each with a "prompt" that is text or a list of messages with role and content.
        The answers at the end of a chat in another column than "prompt" are no part of the prompt:
        the last of them is in the column "answer", unless the data has one of that name.

    Raises:
        InputError: The data cannot be read, or a row has no such prompt.
    """
    rows = load_rows(path)
    name = column or next(
        (name for name in ("prompt", "messages", "conversations") if name in rows[0].values),
        "prompt",
    )
    return [_with_prompt(row, name) for row in rows]


def _with_prompt(row: Row, column: str) -> dict[str, Any]:
    """Return the values of a row with the prompt of `column` as "prompt"."""
    where, values = row
    value = values.get(column)
    if isinstance(value, str):
        return {**values, "prompt": value}
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: no {column!r} that is text or a list of chat messages.")
    chat = [_message(message, where) for message in value]
    if column == "prompt":
        return {**values, "prompt": chat}
    # Data for supervised training has the answers too. Under the name of "prompt", an answer that
    # is begun is one to go on with.
    begun = len(chat)
    while begun > 0 and chat[begun - 1]["role"] == "assistant":
        begun -= 1
    if begun == 0:
        raise InputError(f"{where}: {column!r} has no message before the assistant's.")
    others = {name: other for name, other in values.items() if name != column}
    answer = {"answer": chat[-1]["content"]} if begun < len(chat) else {}
    return {**answer, **others, "prompt": chat[:begun]}


def _message(message: Any, where: str) -> dict[str, Any]:
    """Return a message with role and content; ShareGPT has from and value."""
    if isinstance(message, dict) and {"from", "value"} <= message.keys():
        role = message["from"]
        known = ROLES.get(role, role) if isinstance(role, str) else role
        message = {"role": known, "content": message["value"]}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(f"{where}: a message needs 'role' and 'content', not {message!r}.")
    content = message.get("content")
    # What calls a tool may say nothing. Text may come in parts.
    more = [value for key, value in message.items() if key not in ("role", "content")]
    # A parquet file has every key of any message in all of them.
    has_more = content is None and any(value is not None for value in more)
    is_parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
    if not (isinstance(content, str) or is_parts or has_more):
        raise InputError(f"{where}: a message needs 'role' and 'content', not {message!r}.")
    return message


def load_pairs(path: str) -> list[dict[str, Any]]:
    """Read a dataset of preference pairs.

    Args:
        path: What `load_rows` reads.

    Returns:
        The rows, with the messages of "chosen", "rejected" and "prompt" in one form.

    Raises:
        InputError: The data cannot be read, or a row lacks "chosen" or "rejected".
    """
    pairs = []
    for where, values in load_rows(path):
        for name in ("chosen", "rejected"):
            if not isinstance(values.get(name), str | list):
                raise InputError(f"{where}: no {name!r} that is text or a list of chat messages.")
        chats = {
            name: [_message(message, where) for message in values[name]]
            for name in ("chosen", "rejected", "prompt")
            if isinstance(values.get(name), list)
        }
        pairs.append({**values, **chats})
    return pairs


def load_rows(path: str) -> list[Row]:
    """Read the rows of a dataset.

    Args:
        path: A .jsonl file of one object a line, which any other name is read as too; a .json file
            of a list of objects; a .csv file with a header; a .parquet file; a directory of
            `datasets.save_to_disk`; or the name of a dataset on the Hub, "org/name" or
            "org/name:split". The split is "train" unless given.

    Returns:
        At least one row.

    Raises:
        InputError: It cannot be read or is empty.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", ".csv", ".parquet") and not _is_for_datasets(path):
        rows = _jsonl_rows(path)
    else:
        kinds = {".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
        read = _rows_of_datasets if _is_for_datasets(path) else kinds[suffix]
        rows = [Row(f"{path}, row {i}", row) for i, row in enumerate(read(path), start=1)]
    if not rows:
        raise InputError(f"The dataset {path} is empty.")
    return rows


def _is_for_datasets(path: str) -> bool:
    """Whether this is a directory, or looks like a name on the Hub and is no file."""
    place = Path(path)
    # Names on the Hub may have dots: org/data-v1.5.
    is_name = path.count("/") == 1 and place.suffix.lower() not in SUFFIXES
    return place.is_dir() or (not place.exists() and is_name)


def _rows_of_datasets(path: str) -> list[dict[str, Any]]:
    """Read what the package `datasets` has saved, or finds on the Hub."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"The dataset {path} needs datasets: pip install datasets.") from None
    name, _, split = path.partition(":")
    try:
        if Path(path).is_dir():
            data = datasets.load_from_disk(path)
        else:
            data = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        # Errors of the network, of the file system and of datasets itself end here.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"Cannot read the dataset {path}: {reason}") from error
    if isinstance(data, dict):
        if "train" not in data:
            raise InputError(f"The dataset {path} has no split 'train', only {', '.join(data)}.")
        data = data["train"]
    return list(data)


def _parquet_rows(path: str) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(f"The dataset {path} needs pyarrow: pip install pyarrow.") from None
    try:
        return parquet.read_table(path).to_pylist()
    except Exception as error:
        # pyarrow has errors of its own for files that are not what they should be.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"Cannot read the dataset {path}: {reason}") from error


def _read(path: str) -> str:
    """Return the text of a file."""
    try:
        # Some editors begin UTF-8 text with a byte order mark, which is no part of the data.
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError:
        raise InputError(f"The dataset {path} is not UTF-8 text.") from None
    except OSError as error:
        raise InputError(f"Cannot read the dataset {path}: {error.strerror}.") from None


def _csv_rows(path: str) -> list[dict[str, Any]]:
    # A cell may hold a whole article.
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(_read(path), newline=""), strict=True)
    try:
        names = reader.fieldnames or []
        rows: list[dict[str, Any]] = list(reader)
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV ({error}).") from None
    if len(set(names)) < len(names):
        raise InputError(f"The dataset {path} has two columns of one name: {', '.join(names)}.")
    for i, row in enumerate(rows):
        if None in row or None in row.values():
            raise InputError(f"{path}, row {i + 1}: other columns than the header names.")
    return rows


def _json_rows(path: str) -> list[dict[str, Any]]:
    rows = _parsed(_read(path), path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"The dataset {path} must be a list of objects, as .json says.")
    return rows


def _jsonl_rows(path: str) -> list[Row]:
    rows = []
    # Lines are those of the file: splitlines() also splits at U+2028, which JSON may hold.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            row = _parsed(line, where)
            if not isinstance(row, dict):
                raise InputError(f"{where}: not a JSON object.")
            rows.append(Row(where, row))
    return rows


def _parsed(text: str, where: str) -> Any:
    """Return the JSON of a text; `where` names it in errors."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg}).") from None
    except (ValueError, RecursionError) as error:
        # Python bounds the digits of a number and the depth of brackets.
        raise InputError(f"{where}: JSON that Python cannot read ({error}).") from None
