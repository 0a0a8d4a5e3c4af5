"""Rewards are plain callables: `reward(prompts, completions, **columns) -> list[float]`."""

import asyncio
import importlib
import inspect
import math
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fastpg.trainer.rewards.reward_model import RewardModel
from fastpg.trainer.settings.parsing import InputError, did_you_mean

RewardFunction = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]
"""A function of prompts, completions and columns of the dataset, each by name and of length B.

A value of None says that it does not apply to a completion. The function may be `async`.
"""


def load_reward(spec: str, trust_remote_code: bool = False) -> RewardFunction:
    """Load a reward model, or import a reward function, also from the working directory.

    Args:
        spec: The function as "module:function", or the directory of a reward model.
        trust_remote_code: Whether code that comes with a reward model may run.

    Returns:
        The function; a reward model can be called as one.

    Raises:
        InputError: There is no such model, module or function.
    """
    # A name with a slash and no colon is one of the Hub, unless it is a directory.
    if Path(spec).is_dir() or ("/" in spec and ":" not in spec):
        return RewardModel.load(spec, trust_remote_code)
    # "module:" and ":function" have a colon too, but name nothing.
    module_name, colon, name = spec.partition(":")
    # So has "./module.py:function", a path, which is no name of a module either.
    if not (module_name and colon and name) or module_name.startswith(".") or "/" in module_name:
        raise InputError(
            f"A reward is module:function or the directory of a reward model, not {spec!r}."
        )
    # The installed `fastpg` command, unlike `python -m fastpg`, does not search the working
    # directory by itself. A reward may import more after it has changed that directory.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        # A module can raise anything while it is imported, and a script may even end the process.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"Cannot import the module of the reward {spec!r}: {reason}.") from error
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
    reward_funcs: Sequence[RewardFunction], columns: dict[str, list[Any]]
) -> dict[str, torch.Tensor]:
    """Call reward functions and check what they return. Those that are async wait together.

    Args:
        reward_funcs: The functions. Each gets the columns that it names, or all if it has
            `**columns`.
        columns: B values by name, "completions" among them.

    Returns:
        By the name of the function, float32 [B] on the CPU; NaN where the function returned None,
        for "does not apply".

    Raises:
        InputError: A function needs a column that is not there, or does not return B values that
            are finite numbers or None.
    """
    names = [name_of(reward) for reward in reward_funcs]
    try:
        results = _results(reward_funcs, columns)
    except SystemExit as end:
        # The run would end without a word, and with whatever exit code this says.
        raise InputError(f"A reward ({', '.join(names)}) called sys.exit({end.code!r}).") from end
    count = len(columns["completions"])
    return {
        name: _checked(name, values, count) for name, values in zip(names, results, strict=True)
    }


def _results(reward_funcs: Sequence[RewardFunction], columns: dict[str, list[Any]]) -> list[Any]:
    """Return what the functions return, in their order; those that are async wait together."""
    results = [reward(**accepted(reward, columns)) for reward in reward_funcs]
    pending = {i: result for i, result in enumerate(results) if inspect.isawaitable(result)}
    if pending:
        finished = _run(_gathered(list(pending.values())))
        results = [finished.pop(0) if i in pending else result for i, result in enumerate(results)]
    return results


async def _gathered(results: list[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*results)


def _run(results: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    """Wait for coroutines, also where an event loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(results)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, results).result()


def accepted(reward: RewardFunction, columns: dict[str, list]) -> dict[str, list]:
    """Return the columns that a reward takes by name: all of them if it has `**columns`.

    Args:
        reward: The function.
        columns: The columns by name, prompts and completions among them.

    Raises:
        InputError: The function needs another one.
    """
    # TRL passes every column to every reward; here a function need not name what it does not use.
    try:
        parameters = inspect.signature(reward).parameters
    except (TypeError, ValueError):
        # Some builtins have no signature.
        raise InputError(f"Reward {name_of(reward)} does not tell the names it takes.") from None
    for name, parameter in parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise InputError(
                f"Reward {name_of(reward)} does not take {name!r} by name, as columns are given."
            )
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
    # Arrays are written in several lines.
    written = " ".join(repr(values).split())
    refusal = InputError(f"Reward {name} must return a list of numbers, not {written}.")
    # A dict and a text can be iterated, but that would take keys and digits for rewards.
    if isinstance(values, dict | str):
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
