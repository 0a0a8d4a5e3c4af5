"""Rewards are plain callables: `reward(prompts, completions, **columns) -> list[float]`."""

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastpg.trainer.config import InputError, did_you_mean

RewardFunction = Callable[..., Sequence[float]]


def load_reward(spec: str) -> RewardFunction:
    """Import the function that `"module:function"` names; the working directory is searched too.

    Raises `InputError` when there is no such module or function.
    """
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise InputError(f"A reward is named as module:function, not {spec!r}.")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise InputError(f"Cannot import the module of the reward {spec!r}: {error}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, f in vars(module).items() if callable(f)]
        raise InputError(f"{module_name} has no function {name!r}{did_you_mean(name, known)}")
    return function


def name_of(reward: RewardFunction) -> str:
    """The name under which a reward is logged."""
    return getattr(reward, "__name__", type(reward).__name__)


def score(
    reward: RewardFunction, rows: Sequence[dict[str, Any]], completions: Sequence[Any]
) -> torch.Tensor:
    """Call `reward` on B dataset rows and their completions. Returns float32 [B], on the CPU.

    Raises `InputError` unless it returns B finite numbers.
    """
    names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
    columns = {name: [row.get(name) for row in rows] for name in names}
    columns |= {"prompts": [row["prompt"] for row in rows], "completions": list(completions)}
    values = reward(**_accepted(reward, columns))
    return _checked(name_of(reward), values, len(rows))


def _accepted(reward: RewardFunction, columns: dict[str, list]) -> dict[str, list]:
    """The columns that `reward` takes by name: all of them if it has `**columns`."""
    parameters = inspect.signature(reward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return columns
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in columns:
            raise InputError(
                f"Reward {name_of(reward)} needs a dataset column {name!r}; "
                f"there is {', '.join(sorted(columns))}."
            )
    return {name: column for name, column in columns.items() if name in parameters}


def _checked(name: str, values: Any, count: int) -> torch.Tensor:
    refusal = InputError(f"Reward {name} must return a list of numbers, not {values!r}.")
    if isinstance(values, dict):  # iterating it would give its keys
        raise refusal
    try:
        numbers = [_as_float(value) for value in values]
    except (TypeError, ValueError):
        raise refusal from None
    if len(numbers) != count:
        raise InputError(f"Reward {name} returned {len(numbers)} values for {count} completions.")
    # float32 is what training sees: 1e39 is finite only before
    rewards = torch.tensor(numbers, dtype=torch.float64).float()
    for i, reward in enumerate(rewards.tolist()):
        if not math.isfinite(reward):
            raise InputError(f"Reward {name} returned {reward} for completion {i}.")
    return rewards


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # a huge int
        return math.inf
