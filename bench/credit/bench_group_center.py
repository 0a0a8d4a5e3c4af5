"""group_center at a large batch of completions, against the grouped form that trainers use."""

import torch

import fastpg
from fastpg import group_center
from fastpg.bench.timing import Case

from .._example import Example

GROUPS, SIZE = 4096, 16


def eager(scores):
    grouped = scores.view(GROUPS, SIZE)
    return (grouped - grouped.mean(1, keepdim=True)).flatten()


def cases(device):
    scores = torch.randn(GROUPS * SIZE, device=device)
    group = torch.arange(GROUPS, device=device).repeat_interleave(SIZE)

    def gate():
        error = (group_center(scores, group) - eager(scores.double())).abs().max().item()
        assert error < 1e-6, f"off by {error}"

    yield Case(
        "group_center",
        f"{GROUPS} groups of {SIZE}",
        gate,
        {
            "fastpg": lambda: group_center(scores, group),
            "eager, equal groups in order": lambda: eager(scores),
        },
        device=device,
    )


def examples(device):
    """Small calls of the op."""
    yield Example(
        fastpg.group_center,
        {
            "scores": torch.randn(6, device=device),
            "group": torch.tensor([0, 0, 1, 1, 1, 2], device=device),
            "scale": "std",
        },
        differentiable=("scores",),
    )
