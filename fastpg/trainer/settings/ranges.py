"""The legal values of the settings that are numbers or one of a few words."""

import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fastpg.trainer.settings.parsing import InputError

MixedPrecision = Literal["no", "bf16", "fp16"]
Dtype = Literal["float32", "bfloat16", "float16"]
LearningRateSchedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class Range:
    """A condition on the values of some settings: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]
    settings: tuple[str, ...]


# `entropy_coef` and `reward_weights` are not here: they may have either sign.
RANGES = (
    Range(
        "positive",
        lambda value: value > 0,
        (
            "num_steps",
            "rollout_batch_size",
            "max_prompt_length",
            "max_new_tokens",
            "temperature",
            "num_ppo_epochs",
            "num_mini_batches",
            "micro_batch_size",
            "micro_batch_tokens",
            "max_grad_norm",
            "cliprange_high",
            "cliprange_value",
            "eval_steps",
            "num_eval_samples",
            "num_generations",
            "save_steps",
            "save_total_limit",
            "num_epochs",
            "batch_size",
            "lora_rank",
            "lora_alpha",
            "adaptive_kl_target",
            "adaptive_kl_horizon",
            "target_kl",
            "reward_clip",
            "vllm_importance_sampling_clip_max",
        ),
    ),
    Range(
        "0 or more",
        lambda value: value >= 0,
        (
            "learning_rate",
            "value_learning_rate",
            "adam_epsilon",
            "kl_coef",
            "vf_coef",
            "num_logged_completions",
            "missing_eos_penalty",
            "warmup_steps",
            "weight_decay",
            "top_k",
        ),
    ),
    Range("between 0 and 1", lambda value: 0 <= value <= 1, ("gamma", "lam")),
    Range(
        "between 0 and 1, and neither",
        lambda value: 0 < value < 1,
        # Every ratio is above 0: a lower bound of 1 - 1 would never hold one.
        ("eval_fraction", "vllm_gpu_memory_utilization", "cliprange"),
    ),
    Range("above 0 and at most 1", lambda value: 0 < value <= 1, ("top_p",)),
    # NumPy's seeds have 32 bits, and each process adds its number to this one.
    Range("between 0 and 2**31 - 1", lambda value: 0 <= value < 2**31, ("seed",)),
    Range(
        "no, bf16 or fp16",
        lambda value: value in typing.get_args(MixedPrecision),
        ("mixed_precision",),
    ),
    Range(
        "float32, bfloat16 or float16",
        lambda value: value in typing.get_args(Dtype),
        ("dtype",),
    ),
    Range(
        "linear, cosine or constant",
        lambda value: value in typing.get_args(LearningRateSchedule),
        ("lr_scheduler_type",),
    ),
)


def check_ranges(config: Any) -> None:
    """Refuse a value out of its range.

    Args:
        config: A dataclass of settings. One that is None has a default to come, which is legal.

    Raises:
        InputError: The sentence names the setting and the value.
    """
    for legal in RANGES:
        for name in legal.settings:
            value = getattr(config, name, None)
            if value is not None and not legal.holds(value):
                raise InputError(f"{name} must be {legal.words}, not {value!r}.")
