"""preference_loss of a batch of pairs, against the line that trainers write."""

import torch

import fastpg
from fastpg import preference_loss
from fastpg.bench.timing import Case

from .._example import Example

PAIRS = 65536


def eager(chosen, rejected):
    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def cases(device):
    chosen, rejected = torch.randn(2, PAIRS, device=device).unbind()

    def gate():
        want = eager(chosen.double(), rejected.double())
        error = (preference_loss(chosen, rejected)[0] - want).abs().item()
        assert error < 1e-6, f"off by {error}"

    yield Case(
        "preference_loss",
        f"{PAIRS} pairs",
        gate,
        {
            "fastpg": lambda: preference_loss(chosen, rejected),
            "eager, without statistics": lambda: eager(chosen, rejected),
        },
        device=device,
    )


def examples(device):
    """Small calls of the op."""
    chosen, rejected = torch.randn(2, 5, device=device).unbind()
    yield Example(
        fastpg.preference_loss,
        {"chosen_scores": chosen, "rejected_scores": rejected},
        differentiable=("chosen_scores", "rejected_scores"),
    )
