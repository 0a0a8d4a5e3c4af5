"""Rewards are plain callables: `reward(prompts, completions, **columns) -> list[float]`."""

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastpg.trainer.parsing import InputError, did_you_mean

RewardFunction = Callable[..., Sequence[float | None]]
"""A function of prompts, completions and columns of the dataset, each by name and of length B.

A value of None says that it does not apply to a completion.
"""


def load_reward(spec: str) -> RewardFunction:
    """Import a reward function. Modules in the working directory are found too.

    Args:
        spec: The function as "module:function".

    Returns:
        The function.

    Raises:
        InputError: There is no such module or function.
    """
    # "module:" and ":function" have a colon too, but name nothing.
    module_name, colon, name = spec.partition(":")
    if not (module_name and colon and name):
        raise InputError(f"A reward is named as module:function, not {spec!r}.")
    # The installed `fastpg` command, unlike `python -m fastpg`, does not search the working
    # directory by itself.
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
    """Return the name under which a reward is logged.

    Args:
        reward: A function, or an object that can be called.

    Returns:
        Its own name, or that of its class.
    """
    return getattr(reward, "__name__", type(reward).__name__)


def score(
    reward: RewardFunction, examples: Sequence[dict[str, Any]], completions: Sequence[Any]
) -> torch.Tensor:
    """Call a reward function and check what it returns.

    Args:
        reward: The function. It gets the columns that it names, or all if it has `**columns`.
        examples: B dicts of the dataset. A column that one of them lacks is None there.
        completions: B texts or lists of chat messages.

    Returns:
        float32 [B], on the CPU; NaN where the function returned None, for "does not apply".

    Raises:
        InputError: The function needs a column that is not there, or does not return B values
            that are finite numbers or None.
    """
    # A dict and not a set: the order of the columns is then that of the dataset.
    names = dict.fromkeys(name for example in examples for name in example if name != "prompt")
    columns = {name: [example.get(name) for example in examples] for name in names}
    columns["prompts"] = [example["prompt"] for example in examples]
    columns["completions"] = list(completions)
    values = reward(**accepted(reward, columns))
    return _checked(name_of(reward), values, len(examples))


def accepted(reward: RewardFunction, columns: dict[str, list]) -> dict[str, list]:
    """Return the columns that a reward takes by name: all of them if it has `**columns`.

    Args:
        reward: The function.
        columns: The columns by name, prompts and completions among them.

    Raises:
        InputError: The function needs another one.
    """
    # TRL passes every column to every reward; here a function need not name what it does not use.
    parameters = inspect.signature(reward).parameters
    for name, parameter in parameters.items():
        is_named = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if is_named and parameter.default is parameter.empty and name not in columns:
            raise InputError(
                f"Reward {name_of(reward)} needs a dataset column {name!r}; "
                f"there is {', '.join(sorted(columns))}."
            )
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return columns
    return {name: column for name, column in columns.items() if name in parameters}


def _checked(name: str, values: Any, count: int) -> torch.Tensor:
    """Return the values of the reward `name` as float32 [count], NaN for None."""
    refusal = InputError(f"Reward {name} must return a list of numbers, not {values!r}.")
    # A dict can be iterated, but that would take its keys for rewards.
    if isinstance(values, dict):
        raise refusal
    try:
        numbers = [None if value is None else _as_float(value) for value in values]
    except (TypeError, ValueError):
        raise refusal from None
    if len(numbers) != count:
        raise InputError(f"Reward {name} returned {len(numbers)} values for {count} completions.")
    # Training sees float32, in which a finite number such as 1e39 becomes infinite.
    known = [math.nan if number is None else number for number in numbers]
    rewards = torch.tensor(known, dtype=torch.float64).float()
    for i, (number, reward) in enumerate(zip(numbers, rewards.tolist(), strict=True)):
        if number is not None and not math.isfinite(reward):
            raise InputError(f"Reward {name} returned {reward} for completion {i}.")
    return rewards


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        # An int can be larger than any float.
        return math.inf
