"""Reward functions written for verl or OpenRLHF, called as those call them."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from inspect import Parameter, Signature
from typing import Any

from fastpg.trainer.rewards.functions import name_of
from fastpg.trainer.settings.parsing import InputError


def adapted(reward: Callable[..., Any]) -> Callable[..., Any]:
    """Give a reward of verl or OpenRLHF the signature of ours; the names of its arguments tell.

    Args:
        reward: A function of prompts and completions, which is returned as it is; verl's
            `compute_score(data_source, solution_str, ground_truth, extra_info)`; or OpenRLHF's
            `reward_func(queries, prompts, labels)`.

    Returns:
        A function of columns. That of verl needs a column "ground_truth", or verl's own
        "reward_model"; that of OpenRLHF needs a column "label".
    """
    names = _parameters(reward)
    if {"solution_str", "ground_truth"} <= names.keys():
        return VerlReward(reward)
    if {"queries", "prompts"} <= names.keys():
        return OpenRLHFReward(reward)
    return reward


def _parameters(reward: Callable[..., Any]) -> dict[str, Parameter]:
    try:
        return dict(inspect.signature(reward).parameters)
    except (TypeError, ValueError):
        # Some builtins have no signature. They are no adapted rewards either.
        return {}


class VerlReward:
    """Calls `compute_score` for each completion.

    Args:
        compute_score: The function. It returns a number, or a dict with the "score", and may be
            async.
    """

    def __init__(self, compute_score: Callable[..., Any]) -> None:
        self.compute_score = compute_score
        self.__name__ = name_of(compute_score)
        self.taken = _parameters(compute_score)
        # verl always passes `extra_info`, and None where the data has none.
        defaults = {name: p.default for name, p in self.taken.items()} | (
            {"extra_info": None} if "extra_info" in self.taken else {}
        )
        columns = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=defaults[name])
            for name, p in self.taken.items()
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and name != "solution_str"
        ]
        completions = Parameter("completions", Parameter.KEYWORD_ONLY)
        self.__signature__ = Signature([completions, *columns])

    def __call__(self, completions: list[Any], **columns: list[Any]) -> Any:
        """Return the scores of B completions, to be awaited if the function is async."""
        results = []
        for i, completion in enumerate(completions):
            row = {name: column[i] for name, column in columns.items()}
            if "extra_info" in self.taken:
                row.setdefault("extra_info", None)
            text = completion if isinstance(completion, str) else completion[-1]["content"]
            results.append(self.compute_score(solution_str=text, **row))
        if any(map(inspect.isawaitable, results)):
            return self._awaited(results)
        return [_entry(self.__name__, result, "score") for result in results]

    async def _awaited(self, results: list[Awaitable[Any]]) -> list[Any]:
        finished = await asyncio.gather(*results)
        return [_entry(self.__name__, result, "score") for result in finished]


class OpenRLHFReward:
    """Calls `reward_func` with texts.

    Args:
        reward_func: The function. It returns B rewards, or a dict with the "rewards", and may be
            async.
    """

    def __init__(self, reward_func: Callable[..., Any]) -> None:
        self.reward_func = reward_func
        self.__name__ = name_of(reward_func)
        self.has_labels = "labels" in _parameters(reward_func)
        names = ["texts", "prompt_texts", *(["label"] if self.has_labels else [])]
        self.__signature__ = Signature([Parameter(n, Parameter.KEYWORD_ONLY) for n in names])

    def __call__(
        self, texts: list[str], prompt_texts: list[str], label: list[Any] | None = None
    ) -> Any:
        """Return the rewards of B texts, to be awaited if the function is async."""
        labels = {"labels": label} if self.has_labels else {}
        result = self.reward_func(queries=texts, prompts=prompt_texts, **labels)
        if inspect.isawaitable(result):
            return self._awaited(result)
        return _entry(self.__name__, result, "rewards")

    async def _awaited(self, result: Awaitable[Any]) -> Any:
        return _entry(self.__name__, await result, "rewards")


def _entry(reward: str, result: Any, key: str) -> Any:
    """Return what a reward returned, or the entry of it if that is a dict."""
    if not isinstance(result, dict):
        return result
    if key not in result:
        raise InputError(f"Reward {reward} returned a dict without {key!r}: {result!r}.")
    return result[key]
