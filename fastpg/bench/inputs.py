"""Sample inputs, shared by benchmarks and tests. They are made on the default device."""

from __future__ import annotations

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    """A generator of random numbers on the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def logits_and_labels(
    rows: int | tuple[int, ...],
    vocab: int,
    dtype: torch.dtype = torch.float32,
    *,
    scale: float = 3.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Logits [*rows, vocab] of a peaked distribution, and labels [*rows] sampled from it."""
    random = generator(seed)
    rows = (rows,) if isinstance(rows, int) else rows
    logits = (torch.randn(*rows, vocab, generator=random) * scale).to(dtype)
    gumbel = -torch.empty(*rows, vocab).exponential_(generator=random).log()
    return logits, (logits.float() + gumbel).argmax(-1)


def head_and_labels(
    rows: tuple[int, ...],
    vocab: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    scale: float = 2.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [*rows, width], a head's weight and bias, labels [*rows]."""
    random = generator(seed)
    hidden = torch.randn(*rows, width, generator=random)
    weight = torch.randn(vocab, width, generator=random) * (scale / width**0.5)
    bias = torch.randn(vocab, generator=random)
    labels = torch.randint(vocab, tuple(rows), generator=random)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels


def log_ratios(*shape: int) -> Tensor:
    """log(π / π_old) as after a few updates of PPO.

    Every 16th is -0.5, of which a negative advantage makes a clipped token: 3 of 100. The others
    are within 0.1 of 0. None is so near a bound that rounding decides on which side of it.
    """
    ratios = 0.2 * torch.rand(shape) - 0.1
    ratios.view(-1)[::16] = -0.5
    return ratios
