"""Completions with the log-probs that a rollout engine gave them, as read from a file."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from fastpg.trainer.data.datasets import Row, load_rows
from fastpg.trainer.settings.parsing import InputError

# The names of a column in the outputs of vLLM, TRL and verl.
PROMPT = ("prompt_token_ids", "prompt_ids", "prompts")
COMPLETION = ("token_ids", "completion_ids", "responses")
LOGPROBS = ("logprobs", "rollout_log_probs")
CHAT = ("messages", "prompt")

# Rounding may put the log-prob of a token that is certain this far above 0.
ABOVE_ZERO = 1e-3


class Rollout(NamedTuple):
    """A prompt, what was sampled after it, and the engine's log-probs of that."""

    where: str  # for errors
    prompt: list[int]
    completion: list[int]
    logp: list[float]
    chat: str | list[Any] | None  # the text or messages of the prompt, if the file has them


def load_rollouts(path: str, token_count: int) -> tuple[list[Rollout], int]:
    """Reads rollouts.

    Args:
        path: What `load_rows` reads, as a .jsonl or .parquet file. A row is a completion, with the
            columns "prompt_token_ids", "token_ids" and "logprobs", or as TRL or verl call them;
            the prompt's messages or text are in "messages" or "prompt", if at all.
        token_count: Rows are taken from the start until they have so many completion tokens.

    Returns:
        The rollouts, and how many rows there are in the file.

    Raises:
        InputError: The file cannot be read, or a row lacks a column or has a bad one.
    """
    rows = load_rows(path)
    rollouts, tokens = [], 0
    for row in rows:
        if tokens >= token_count:
            break
        rollout = _rollout(row)
        if rollout.completion:
            rollouts.append(rollout)
        tokens += len(rollout.completion)
    if not tokens:
        raise InputError(f"The rollouts {path} have no completion tokens.")
    return rollouts, len(rows)


def _rollout(row: Row) -> Rollout:
    """Checks a row."""
    completion = _ids(row, COMPLETION)
    name, logp = _column(row, LOGPROBS)
    if len(logp) != len(completion):
        raise InputError(
            f"{row.where}: {name!r} has {len(logp)} numbers for {len(completion)} tokens."
        )
    for x in logp:
        if not isinstance(x, int | float) or not math.isfinite(x) or x > ABOVE_ZERO:
            raise InputError(f"{row.where}: {name!r} must hold log-probs, of at most 0, not {x!r}.")
    chat = next((row.values[name] for name in CHAT if name in row.values), None)
    prompt = _ids(row, PROMPT)
    if not prompt:
        raise InputError(f"{row.where}: {PROMPT[0]!r} is empty; it begins with BOS at least.")
    return Rollout(row.where, prompt, completion, [float(x) for x in logp], chat)


def _ids(row: Row, names: tuple[str, ...]) -> list[int]:
    """A column of token ids."""
    name, ids = _column(row, names)
    for x in ids:
        if not isinstance(x, int) or isinstance(x, bool) or x < 0:
            raise InputError(f"{row.where}: {name!r} must hold token ids, not {x!r}.")
    return ids


def _column(row: Row, names: tuple[str, ...]) -> tuple[str, list[Any]]:
    """The first of some columns that is a list, and its name."""
    for name in names:
        if isinstance(row.values.get(name), list):
            return name, row.values[name]
    raise InputError(f"{row.where}: no list {names[0]!r} (or {', '.join(names[1:])}).")
