"""The optimiser of a run, and the schedule of its learning rates."""

import functools
import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from fastpg.trainer.models.policy import PolicyWithValue
from fastpg.trainer.settings.config import PPOConfig
from fastpg.trainer.settings.ranges import LearningRateSchedule


def make_optimizer(
    model: PolicyWithValue, args: PPOConfig, device: torch.device
) -> torch.optim.AdamW:
    """Make the optimiser of the policy, and of the value head or value model.

    Args:
        model: The model.
        args: The settings, for rates and decay.
        device: The device that the model will be on.
    """
    groups = _groups(model.policy, args.learning_rate, args.weight_decay)
    critic = model.value_head if model.value_model is None else model.value_model
    if critic is not None:
        groups += _groups(critic, args.resolved().value_learning_rate, args.weight_decay)
    # With torch's second beta, 0.999, one outlier in a rollout of otherwise equal rewards
    # moves every weight by several learning rates, for steps on end.
    return torch.optim.AdamW(
        groups,
        betas=(0.9, 0.95),
        eps=args.adam_epsilon,
        weight_decay=0.0,
        # In one pass over the memory: a loop takes five times as long on a CPU.
        fused=device.type in ("cpu", "cuda"),
    )


def _groups(module: torch.nn.Module, rate: float, decay: float) -> list[dict[str, Any]]:
    """Return the parameters of a module in one group, or two if some are to decay."""
    parameters = list(module.parameters())
    if decay == 0:
        return [{"params": parameters, "lr": rate}]
    # Biases and the scales of norms have no reason to be small.
    return [
        {"params": [p for p in parameters if p.dim() > 1], "lr": rate, "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() <= 1], "lr": rate},
    ]


def make_schedule(optimizer: torch.optim.Optimizer, args: PPOConfig) -> LambdaLR:
    """Make the schedule of all learning rates. Its state is the number of the step alone.

    Args:
        optimizer: The optimiser.
        args: The settings, for the kind of schedule, its warm-up and its length.
    """
    factor = functools.partial(
        rate_factor, args.lr_scheduler_type, warmup=args.warmup_steps, total=args.num_steps
    )
    return LambdaLR(optimizer, factor)


def rate_factor(kind: LearningRateSchedule, step: int, warmup: int, total: int) -> float:
    """Return the share of the learning rate in a step.

    Args:
        kind: "linear" or "cosine", down to 0, or "constant".
        step: The number of steps before this one.
        warmup: Steps in which the rate rises; the first of them already moves the weights.
        total: Steps of the run, those of the warm-up among them.

    Returns:
        A number between 0 and 1.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    left = max(0, total - step) / max(1, total - warmup)
    return left if kind == "linear" else 0.5 * (1 - math.cos(math.pi * left))
