"""Errors against fp64 beside speed, on inputs whose digits are at stake."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from . import baselines
from .problem import OURS, PLAIN, Problem
from .problems import DOUBLING, VOCAB, Settings, advantages, clipped_surrogate, log_probs


def in_its_own_type(logits: Tensor, labels: Tensor) -> Tensor:
    """The softmax in bf16, as a model's logits come."""
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def nearly_certain(settings: Settings) -> Problem:
    """Labels whose 1 - p is about e^-15, as late in training: the log-probs are -(1 - p)."""
    easy = log_probs(settings, 64, 32768, torch.float32, backward=True)
    logits, labels = easy.inputs
    logits = logits.scatter(1, labels[:, None], logits.amax(-1, keepdim=True) + 25.0)
    return replace(
        easy,
        name="p -> 1, fwd + bwd, 64 x 32768 fp32",
        inputs=(logits, labels),
        few=(),
        exact=baselines.log_probs_of_the_likely,
    )


def from_bf16(settings: Settings) -> Problem:
    """Logits in bf16."""
    rows = 16 if settings.quick else 64
    easy = log_probs(settings, rows, VOCAB, torch.bfloat16, backward=False)
    return replace(
        easy,
        name=f"from bf16, fwd, {rows} x {VOCAB}",
        solutions=easy.solutions | {"PyTorch, in bf16": in_its_own_type},
    )


def long_sum(settings: Settings) -> Problem:
    """A loss of millions of tokens. Its gradient has no sum in it."""
    tokens = 4 * settings.tokens
    problem = clipped_surrogate(settings, tokens)
    return replace(problem, name=f"fwd, {tokens} tokens", leaves=())


def problems(settings: Settings) -> Iterator[Problem]:
    """Rounded logits, a difference of nearly equal numbers, a long recurrence, a long sum."""
    length = 4096 if settings.quick else 65536
    for problem in (
        from_bf16(settings),
        nearly_certain(settings),
        advantages(settings, 4, length, 1.0),
        long_sum(settings),
    ):
        kept = (OURS, PLAIN, DOUBLING, "PyTorch, in bf16")
        solutions = {name: s for name, s in problem.solutions.items() if name in kept}
        yield replace(problem, solutions=solutions)
