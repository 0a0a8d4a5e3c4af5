"""The settings of a run: one flat dataclass for Python, YAML and the command line alike."""

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from fastpg.algorithms import ALGORITHMS, Algorithm, AlgorithmName, GaeOptions, SurrogateOptions
from fastpg.trainer.settings.groups import (
    CreditSettings,
    ModelSettings,
    OptimizerSettings,
    ScoreSettings,
    VllmSettings,
    WatchSettings,
    option,
)
from fastpg.trainer.settings.parsing import InputError, Verbatim, convert, convert_all, did_you_mean
from fastpg.trainer.settings.ranges import MixedPrecision, check_ranges


@dataclass
class RunSettings:
    """The run, its rollouts, and how many optimiser steps are made on each; see `PPOConfig`."""

    algorithm: AlgorithmName = field(
        default="ppo", metadata={"help": f"one of {', '.join(ALGORITHMS)}"}
    )
    output_dir: str = option("out", "directory for metrics, samples, summary and model")
    seed: int = option(0, "seed of prompts, sampling and minibatches")
    num_steps: int = option(100, "rollouts to train on")
    mixed_precision: MixedPrecision = field(
        default="no", metadata={"help": "no, bf16 or fp16: the autocast dtype of the forward"}
    )
    trust_remote_code: bool = option(False, "run the code that comes with the model")
    rollout_batch_size: int = option(64, "episodes per step and process")
    num_generations: int | None = option(
        None, "completions per prompt; by default 8 if the algorithm compares them, else 1"
    )
    max_prompt_length: int | None = option(
        None, "longer prompts lose their beginning, which is counted; by default none is cut"
    )
    max_new_tokens: int = option(128, "tokens of a completion at most")
    temperature: float = option(1.0, "temperature of sampling and of every log-probability")
    top_k: int = option(0, "sample of so many likeliest tokens, to which log-probs hold; 0: of all")
    top_p: float = option(
        1.0, "sample of the likeliest tokens that reach this probability, likewise"
    )
    stop_strings: list[Verbatim] | None = field(
        default=None, metadata={"help": "strings that end a completion, besides the EOS"}
    )
    num_ppo_epochs: int | None = option(
        None, "passes over each rollout; by default 4, or 1 if the surrogate is reinforce"
    )
    num_mini_batches: int | None = option(
        None, "optimiser steps per pass; by default 2, or 1 if the surrogate is reinforce"
    )
    micro_batch_size: int | None = option(None, "sequences per forward and backward; by default 16")
    micro_batch_tokens: int | None = option(
        None, "tokens per forward and backward at most, in place of micro_batch_size"
    )


# The fields of the last base come first, in help and config.yaml.
@dataclass
class PPOConfig(
    WatchSettings,
    ScoreSettings,
    CreditSettings,
    OptimizerSettings,
    VllmSettings,
    ModelSettings,
    RunSettings,
):
    """Settings of `PPOTrainer`. The names are those of TRL where it has them.

    A *step* is one rollout of `rollout_batch_size` episodes and the optimisation on it:
    `num_ppo_epochs` passes of `num_mini_batches` optimiser steps each. `micro_batch_size`, or
    `micro_batch_tokens`, only bounds memory: it changes no result beyond rounding.

    A setting whose default depends on the algorithm is None until `resolved` is called, so that a
    saved file, or `dataclasses.replace`, can be given another algorithm.

    Args:
        algorithm: The algorithm, a key of `fastpg.algorithms.ALGORITHMS`: "reinforce", "vpg",
            "ppo", "grpo", "dr_grpo", "dapo", "rloo", "reinforce++", "gspo", "cispo" or "sapo".
        output_dir: Directory for metrics, samples, summary and model.
        seed: Seed of prompts, sampling and minibatches, below 2**31.
        num_steps: Rollouts to train on.
        mixed_precision: Autocast dtype of the forward: "no", "bf16" or "fp16".
        trust_remote_code: Whether code that comes with the model may run.
        rollout_batch_size: Episodes per step and process.
        num_generations: Completions per prompt. None: 8 if the algorithm compares them, else 1.
        max_prompt_length: Prompts of more tokens lose their beginning; a warning counts them. None:
            no prompt is cut, and one that leaves the model no room is refused.
        max_new_tokens: Most tokens of a completion.
        temperature: Temperature of sampling and of every log-probability.
        top_k: Only so many of the likeliest tokens are sampled; 0: all. Every log-probability, KL
            and entropy is then that of the distribution over the tokens that were left.
        top_p: Only the likeliest tokens are sampled whose probabilities reach this, after `top_k`;
            above 0 and up to 1, and with the same consequence.
        stop_strings: Strings that end a completion as an EOS does. The token that completes one is
            its last.
        num_ppo_epochs: Passes over each rollout. None: 4, or 1 if the surrogate is "reinforce".
        num_mini_batches: Optimiser steps per pass. None: 2, or 1 if the surrogate is "reinforce".
        micro_batch_size: Sequences per forward and backward. None: 16, unless `micro_batch_tokens`
            is given.
        micro_batch_tokens: Tokens per forward and backward at most, padding included; a sequence of
            more has one of its own. A prompt that sequences share counts once. None:
            `micro_batch_size` counts.
        use_vllm, vllm_gpu_memory_utilization, vllm_importance_sampling_clip_max: See
            `VllmSettings`.
        learning_rate, value_learning_rate, lr_scheduler_type, warmup_steps, weight_decay,
            adam_epsilon, max_grad_norm: See `OptimizerSettings`.
        dtype, gradient_checkpointing, value_model, lora_rank, lora_alpha, lora_target_modules: See
            `ModelSettings`.
        gamma, lam, kl_coef, adaptive_kl_target, adaptive_kl_horizon, target_kl, cliprange,
            cliprange_high, cliprange_value, vf_coef, entropy_coef: See `CreditSettings`.
        reward_weights, reward_clip, missing_eos_penalty, whiten_rewards,
            mask_truncated_completions, bootstrap_truncated: See `ScoreSettings`.
        eval_steps, num_eval_samples, save_best_model, num_logged_completions, report_to,
            save_steps, save_total_limit: See `WatchSettings`.

    Raises:
        InputError: A value has the wrong type, is out of range or means nothing to the algorithm.
            The sentence names the setting and the value.

    Example:
        >>> from fastpg.trainer import PPOConfig
        >>> args = PPOConfig(algorithm="grpo", learning_rate=1e-5)
        >>> args.num_generations, args.resolved().num_generations
        (None, 8)
    """

    def __post_init__(self) -> None:
        # HfArgumentParser and plain Python give values of any type, so they are converted here too.
        convert_all(self)
        # The order matters: resolving, for the sizes, needs a known algorithm and legal values.
        self._check_algorithm()
        check_ranges(self)
        self._check_companions()
        self._check_sizes()

    def _check_algorithm(self) -> None:
        """Refuse an unknown algorithm, and settings that mean nothing to it."""
        self.algorithm = algorithm_key(self.algorithm)
        if self.algorithm not in ALGORITHMS:
            raise InputError(
                f"Unknown algorithm {self.algorithm!r}{did_you_mean(self.algorithm, ALGORITHMS)}"
            )
        algorithm = ALGORITHMS[self.algorithm]
        clip_given = self.cliprange is not None or self.cliprange_high is not None
        if clip_given and "clip" not in algorithm.surrogate:
            raise InputError(f"cliprange means nothing to algorithm={self.algorithm}.")
        if algorithm.critic:
            return
        for name in ("lam", "cliprange_value", "bootstrap_truncated", "value_model"):
            if getattr(self, name) not in (None, False):
                raise InputError(
                    f"{name} needs a critic, which algorithm={self.algorithm} has not."
                )

    def _check_companions(self) -> None:
        """Refuse a setting that means nothing without another."""
        for name in ("lora_alpha", "lora_target_modules"):
            if getattr(self, name) is not None and self.lora_rank is None:
                raise InputError(f"{name} means nothing without lora_rank.")
        if self.use_vllm and self.top_p < 1 and self.top_k == 0:
            raise InputError(
                f"top_p={self.top_p} with use_vllm needs a top_k, without which vLLM does not "
                "return the sets of tokens that it kept."
            )
        if self.adaptive_kl_target is not None and self.resolved().algorithm.kl_coef == 0:
            raise InputError("adaptive_kl_target needs a kl_coef to begin with, above 0.")
        adapts = self.adaptive_kl_target is not None
        if adapts and self.rollout_batch_size > self.adaptive_kl_horizon:
            raise InputError(
                f"adaptive_kl_horizon={self.adaptive_kl_horizon:g} is less than "
                f"rollout_batch_size={self.rollout_batch_size}."
            )

    def _check_sizes(self) -> None:
        """Refuse sizes that do not fit together."""
        resolved = self.resolved()
        if self.micro_batch_size is not None and self.micro_batch_tokens is not None:
            raise InputError(
                f"micro_batch_size={self.micro_batch_size} and micro_batch_tokens="
                f"{self.micro_batch_tokens} both say how large a micro-batch is; one of them has "
                "to be none."
            )
        if resolved.num_mini_batches > self.rollout_batch_size:
            raise InputError(
                f"num_mini_batches={resolved.num_mini_batches} is more than "
                f"rollout_batch_size={self.rollout_batch_size}."
            )
        if self.rollout_batch_size % resolved.num_generations:
            raise InputError(
                f"rollout_batch_size={self.rollout_batch_size} must be a multiple of "
                f"num_generations={resolved.num_generations}."
            )
        if resolved.algorithm.center is not None and resolved.num_generations < 2:
            raise InputError(f"algorithm={self.algorithm} needs num_generations of 2 or more.")

    def resolved(self) -> "ResolvedConfig":
        """Decide what these settings leave to the algorithm.

        Returns:
            The algorithm with these settings in place of its own, and the sizes that it decides
            where nobody gave them. These settings themselves stay as they are.
        """
        algorithm = ALGORITHMS[self.algorithm]
        # Without a bound on the ratio, a second step on the same rollout has nothing to hold it.
        one_step = algorithm.surrogate["surrogate"] == "reinforce"
        return ResolvedConfig(
            algorithm=dataclasses.replace(
                algorithm,
                kl_coef=_given_or(self.kl_coef, algorithm.kl_coef),
                gae=GaeOptions(gamma=self.gamma, lam=_given_or(self.lam, algorithm.gae["lam"])),
                surrogate=self._surrogate(algorithm),
            ),
            num_generations=_given_or(self.num_generations, 1 if algorithm.center is None else 8),
            num_ppo_epochs=_given_or(self.num_ppo_epochs, 1 if one_step else 4),
            num_mini_batches=_given_or(self.num_mini_batches, 1 if one_step else 2),
            micro_batch_size=_given_or(self.micro_batch_size, 16),
            value_learning_rate=_given_or(
                self.value_learning_rate,
                # As much faster as OpenRLHF and verl let their critics learn.
                1e-3 if self.value_model is None else 10 * self.learning_rate,
            ),
        )

    def _surrogate(self, algorithm: Algorithm) -> SurrogateOptions:
        """Return the options of `policy_loss` with the clip range of these settings, if any."""
        surrogate = algorithm.surrogate.copy()
        if "clip" not in surrogate:
            return surrogate
        # One given range is for both sides, also where the algorithm's own two differ (DAPO).
        low, high = surrogate["clip"]
        if self.cliprange is not None:
            low, high = self.cliprange, self.cliprange
        if self.cliprange_high is not None:
            high = self.cliprange_high
        surrogate["clip"] = (low, high)
        return surrogate


@dataclass(frozen=True)
class ResolvedConfig:
    """The choices that `PPOConfig` leaves to other settings, made. Nothing here is optional.

    Args:
        algorithm: The algorithm with the settings of the run in place of its own: discount,
            lambda, KL coefficient and clip range.
        num_generations: Completions per prompt.
        num_ppo_epochs: Passes over each rollout.
        num_mini_batches: Optimiser steps per pass.
        micro_batch_size: Sequences per forward, where tokens are not counted.
        value_learning_rate: Learning rate of the value head or value model after warm-up.
    """

    algorithm: Algorithm
    num_generations: int
    num_ppo_epochs: int
    num_mini_batches: int
    micro_batch_size: int
    value_learning_rate: float


# Counts stay int and coefficients stay float; a union would lose which of the two it is.
Setting = TypeVar("Setting", int, float)


def algorithm_key(name: str) -> AlgorithmName:
    """Return the key of an algorithm, which may be spelled as its authors spell it.

    Args:
        name: The name. One that is unknown is returned in small letters.
    """
    plain = _plain(name)
    keys: list[AlgorithmName] = [
        key
        for key, algorithm in ALGORITHMS.items()
        if plain in (_plain(key), _plain(algorithm.title))
    ]
    # The nearest known name is looked for in small letters.
    return keys[0] if keys else cast(AlgorithmName, name.lower())


def _plain(name: str) -> str:
    """Return the letters, digits and plus signs of a name: Dr.GRPO, dr_grpo and Dr GRPO are one."""
    return re.sub(r"[^a-z0-9+]", "", name.lower())


def _given_or(given: Setting | None, default: Setting) -> Setting:
    return default if given is None else given


Config = TypeVar("Config")


def from_mapping(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """Build settings from names and values.

    Args:
        config_class: The dataclass of the settings.
        values: The value of each setting by its name. Values may still be text ("1e-5", "none").

    Returns:
        The settings, an instance of `config_class`.

    Raises:
        InputError: A name is no setting (the sentence names the nearest one), or a value is bad.
    """
    hints = typing.get_type_hints(config_class)
    for name in values:
        if name not in hints:
            raise InputError(f"Unknown setting {name!r}{did_you_mean(str(name), hints)}")
    typed = {name: convert(name, value, hints[name]) for name, value in values.items()}
    return config_class(**typed)
