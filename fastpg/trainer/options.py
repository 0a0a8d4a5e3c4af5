"""`fastpg train` from the command line: flags, the config file, the dataset."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from fastpg.trainer.config import InputError, PPOConfig, did_you_mean, load_yaml, option


@dataclass
class RunConfig(PPOConfig):
    """`PPOConfig`, and by name what Python hands to `PPOTrainer` as objects."""

    model: str | None = option(None, "directory or name of a causal language model")
    dataset: str | None = option(None, "JSONL file of prompts: one object with a 'prompt' a line")
    eval_dataset: str | None = option(None, "likewise; by default the first training prompts")
    reward: str | None = option(None, "module:function, the reward")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message[0].upper()}{message[1:]}.")


def read_options(argv: Sequence[str]) -> dict[str, Any]:
    """The settings that `argv` gives, flags over the `--config` file. Values may still be text.

    Raises `InputError` for an unknown flag, with the nearest known one, or an unreadable file.
    """
    parser = _Parser("fastpg train", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file of `name: value` settings")
    for f in fields(RunConfig):
        parser.add_argument(
            f"--{f.name}",
            metavar=f.name.rpartition("_")[2].upper(),
            default=argparse.SUPPRESS,
            help=f.metadata["help"] + ("" if f.default is None else f" (default: {f.default})"),
        )
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        names = [f.name for f in fields(RunConfig)]
        raise InputError(f"Unknown setting {name!r}{did_you_mean(name, names)}")
    values = vars(flags)
    path = values.pop("config")
    return {**(load_yaml(path) if path else {}), **values}


def load_jsonl(path: str) -> list[dict[str, Any]]:
    """The rows of a JSONL dataset. Raises `InputError` with the line of the first bad one."""
    try:
        # By the file's lines: splitlines() also splits at U+2028, which JSON text may hold.
        with Path(path).open(encoding="utf-8-sig") as file:
            lines = list(file)
    except UnicodeDecodeError:
        raise InputError(f"The dataset {path} is not UTF-8 text.") from None
    except OSError as error:
        raise InputError(f"Cannot read the dataset {path}: {error.strerror}.") from None
    rows = [_row(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InputError(f"The dataset {path} is empty.")
    return rows


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg}).") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str | list):
        raise InputError(f"{where}: no 'prompt' that is text or a list of chat messages.")
    return row
