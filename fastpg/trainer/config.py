"""The settings of a run: one flat dataclass, from Python, YAML and the command line alike."""

import copy
import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fastpg.algorithms import ALGORITHMS, Algorithm


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one plain sentence."""


def option(default: Any, text: str) -> Any:
    """A dataclass field whose help `HfArgumentParser` and `fastpg train --help` show."""
    return field(default=default, metadata={"help": text})


@dataclass
class PPOConfig:
    """Settings of `PPOTrainer`. The names are those of TRL where it has them.

    A *step* is one rollout of `rollout_batch_size` episodes and the optimisation on it:
    `num_ppo_epochs` passes of `num_mini_batches` optimiser steps each. `micro_batch_size` only
    bounds memory: it changes no result beyond rounding.

    Raises `InputError` naming the field and the value when one is out of range.
    """

    algorithm: str = option("ppo", f"one of {', '.join(ALGORITHMS)}")
    output_dir: str = option("out", "directory for metrics, samples, summary and model")
    seed: int = option(0, "seed of prompts, sampling and minibatches")
    num_steps: int = option(100, "rollouts to train on")
    mixed_precision: str = option("no", "no, bf16 or fp16: the autocast dtype of the forward")

    rollout_batch_size: int = option(64, "episodes per step and process")
    num_generations: int | None = option(
        None, "completions per prompt; by default 8 if the algorithm compares them, else 1"
    )
    max_prompt_length: int = option(512, "tokens of a prompt; longer ones lose their beginning")
    max_new_tokens: int = option(128, "tokens of a completion at most")
    temperature: float = option(1.0, "of sampling, and of every log-probability")

    num_ppo_epochs: int | None = option(
        None, "passes over each rollout; by default 4, or 1 if the surrogate is reinforce"
    )
    num_mini_batches: int | None = option(
        None, "optimiser steps per pass; by default 2, or 1 if the surrogate is reinforce"
    )
    micro_batch_size: int = option(16, "sequences per forward and backward")
    learning_rate: float = option(1e-6, "of the policy at the first step; decays linearly to 0")
    value_learning_rate: float = option(1e-3, "of the value head, likewise")
    adam_epsilon: float = option(1e-5, "epsilon of AdamW")
    max_grad_norm: float = option(1.0, "the gradient is clipped to this norm")

    gamma: float = option(1.0, "discount per token")
    lam: float | None = option(
        None, "lambda of generalised advantage estimation; by default the algorithm's"
    )
    kl_coef: float | None = option(
        None,
        "weight of the KL penalty to the starting model, of which no copy is kept if it is 0; by "
        "default the algorithm's",
    )
    cliprange: float | None = option(
        None, "the ratio is clipped to 1 - cliprange, 1 + cliprange; by default the algorithm's"
    )
    cliprange_high: float | None = option(None, "1 + cliprange_high, if the two sides differ")
    cliprange_value: float | None = option(None, "clip range of the values; none by default")
    vf_coef: float = option(0.1, "weight of the value loss")
    entropy_coef: float = option(0.0, "weight of the entropy bonus")
    missing_eos_penalty: float = option(0.0, "taken off the score of an unfinished completion")
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "one per reward function; all 1 by default"}
    )

    eval_steps: int | None = option(None, "evaluate every so many steps, besides start and end")
    num_eval_samples: int = option(64, "prompts of an evaluation")
    num_logged_completions: int = option(8, "completions written to a file at each step")

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            setattr(self, name, _convert(name, getattr(self, name), hint))
        self._check_algorithm()
        settings = self.resolved()
        for wanted, (holds, names) in _BOUNDS.items():
            for name in names.split():
                value = getattr(settings, name)
                if value is not None and not holds(value):
                    raise InputError(f"{name} must be {wanted}, not {value!r}.")
        settings._check_sizes()

    def _check_algorithm(self) -> None:
        """Refuse an unknown algorithm, and settings that mean nothing to it."""
        if self.algorithm not in ALGORITHMS:
            raise InputError(
                f"Unknown algorithm {self.algorithm!r}{did_you_mean(self.algorithm, ALGORITHMS)}"
            )
        row = ALGORITHMS[self.algorithm]
        if "clip" not in row.surrogate and (self.cliprange, self.cliprange_high) != (None, None):
            raise InputError(f"cliprange means nothing to algorithm={self.algorithm}.")
        for name in () if row.critic else ("lam", "cliprange_value"):
            if getattr(self, name) is not None:
                raise InputError(
                    f"{name} needs a critic, which algorithm={self.algorithm} has not."
                )

    def _check_sizes(self) -> None:
        if self.num_mini_batches > self.rollout_batch_size:
            raise InputError(
                f"num_mini_batches={self.num_mini_batches} is more than "
                f"rollout_batch_size={self.rollout_batch_size}."
            )
        if self.rollout_batch_size % self.num_generations:
            raise InputError(
                f"rollout_batch_size={self.rollout_batch_size} must be a multiple of "
                f"num_generations={self.num_generations}."
            )
        if ALGORITHMS[self.algorithm].center is not None and self.num_generations < 2:
            raise InputError(f"algorithm={self.algorithm} needs num_generations of 2 or more.")

    def resolved(self) -> "PPOConfig":
        """These settings with the algorithm's own for those that nobody gave.

        The settings themselves keep None there, so that a saved file, or `dataclasses.replace`,
        can be given another algorithm.
        """
        row = ALGORITHMS[self.algorithm]
        low, high = row.surrogate.get("clip", (None, None))
        on_policy = row.surrogate["surrogate"] == "reinforce"
        own = {
            "num_generations": 1 if row.center is None else 8,
            "num_ppo_epochs": 1 if on_policy else 4,
            "num_mini_batches": 1 if on_policy else 2,
            "lam": row.gae["lam"],
            "kl_coef": row.kl_coef,
            "cliprange": low,
            "cliprange_high": high if self.cliprange is None else self.cliprange,
        }
        settings = copy.copy(self)
        for name, value in own.items():
            if getattr(self, name) is None:
                setattr(settings, name, value)
        return settings

    @property
    def row(self) -> Algorithm:
        """The algorithm with these settings in place of its own."""
        settings = self.resolved()
        row = ALGORITHMS[self.algorithm]
        surrogate = dict(row.surrogate)
        if "clip" in surrogate:
            surrogate["clip"] = (settings.cliprange, settings.cliprange_high)
        gae = {"gamma": settings.gamma, "lam": settings.lam}
        return dataclasses.replace(row, kl_coef=settings.kl_coef, gae=gae, surrogate=surrogate)

    def save(self, path: Path) -> None:
        """Write the settings as they were given, as YAML, in the order they are declared."""
        path.write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False))


_BOUNDS = {
    "positive": (
        lambda x: x > 0,
        "num_steps rollout_batch_size max_prompt_length max_new_tokens temperature num_ppo_epochs "
        "num_mini_batches micro_batch_size max_grad_norm cliprange cliprange_high cliprange_value "
        "eval_steps num_eval_samples num_generations",
    ),
    "0 or more": (
        lambda x: x >= 0,
        "learning_rate value_learning_rate adam_epsilon kl_coef vf_coef num_logged_completions "
        "missing_eos_penalty",
    ),
    "between 0 and 1": (lambda x: 0 <= x <= 1, "gamma lam"),
    # Numpy takes 32 bits, and each process adds its number.
    "between 0 and 2**31 - 1": (lambda x: 0 <= x < 2**31, "seed"),
    "no, bf16 or fp16": (("no", "bf16", "fp16").count, "mixed_precision"),
}
"""What a value must be: the words, the test, the settings."""


Config = TypeVar("Config", bound=PPOConfig)


def from_mapping(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a config from names and values, which may still be text (`"1e-5"`, `"none"`).

    Raises `InputError` for a name that is no field (with the nearest one) or a wrong type.
    """
    hints = typing.get_type_hints(config_class)
    for name in values:
        if name not in hints:
            raise InputError(f"Unknown setting {name!r}{did_you_mean(str(name), hints)}")
    return config_class(**{k: _convert(k, v, hints[k]) for k, v in values.items()})


def load_yaml(path: str) -> dict[str, Any]:
    """The names and values of a YAML file. Raises `InputError` if it holds anything else."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise InputError(f"The config file {path} is not UTF-8 text.") from None
    except OSError as error:
        raise InputError(f"Cannot read the config file {path}: {error.strerror}.") from None
    except yaml.YAMLError as error:
        line = error.problem_mark.line + 1 if isinstance(error, yaml.MarkedYAMLError) else 1
        raise InputError(f"The config file {path} is not valid YAML at line {line}.") from None
    if not isinstance(values or {}, dict):
        raise InputError(f"The config file {path} must hold `name: value` lines.")
    return values or {}


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: a full stop, or the nearest known name."""
    nearest = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else "."


def _convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint` of a field: a key of `_PARSERS`, or one of them `| None`."""
    optional = type(None) in typing.get_args(hint)
    kind = typing.get_args(hint)[0] if optional else hint
    if optional and (value is None or value in ("none", "null")):
        return None
    wanted, parse = _PARSERS[kind]
    try:
        return parse(value)
    except (TypeError, ValueError, OverflowError, yaml.YAMLError):
        raise InputError(f"{name} must be {wanted}, not {value!r}.") from None


def _integer(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    # YAML 1.1 reads `1e-5` as text, hence float() rather than a check of the type.
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _text(value: Any) -> str:
    # and it reads a bare `no` as False, which is a value of mixed_precision
    if value is False:
        return "no"
    if not isinstance(value, str):
        raise ValueError
    return value


def _numbers(value: Any) -> list[float]:
    return [_number(x) for x in (yaml.safe_load(value) if isinstance(value, str) else value)]


_PARSERS = {
    int: ("a whole number", _integer),
    float: ("a number", _number),
    str: ("text", _text),
    list[float]: ("a list of numbers", _numbers),
}
