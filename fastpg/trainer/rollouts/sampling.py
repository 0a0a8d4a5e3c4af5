"""How tokens are drawn, and which of them top-k, top-p and min-p leave to be drawn."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpg.trainer.settings.parsing import InputError


class Sampling(NamedTuple):
    """How an engine samples. The defaults keep every token.

    temperature: > 0; logits are divided by it.
    top_k: The k likeliest tokens are kept; 0 or -1: all.
    top_p: The likeliest tokens are kept whose probabilities reach this, in (0, 1].
    min_p: Tokens are kept whose probability is this part of the likeliest's, in [0, 1).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def check(self) -> None:
        """Raises InputError for a value that no engine takes."""
        legal = {
            "temperature": (self.temperature > 0, "positive; greedy decoding has no log-ratios"),
            "top_k": (self.top_k >= -1, "at least 1, or 0 for all"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p < 1, "in [0, 1)"),
        }
        for name, (is_legal, words) in legal.items():
            if not is_legal:
                raise InputError(f"{name} must be {words}, got {getattr(self, name)}.")

    @property
    def keeps_all(self) -> bool:
        """Whether no token is cut off."""
        return self.top_k < 1 and self.top_p == 1 and self.min_p == 0

    def __str__(self) -> str:
        cuts = {"top_k": self.top_k > 0, "top_p": self.top_p < 1, "min_p": self.min_p > 0}
        return ", ".join(f"{name}={getattr(self, name)}" for name, cut in cuts.items() if cut)


def is_kept(logits: Tensor, sampling: Sampling) -> Tensor:
    """Mark the tokens that sampling keeps, with min-p before top-k before top-p, as in vLLM.

    Args:
        logits: [..., V], before the temperature; fp32.
        sampling: How.

    Returns:
        bool [..., V]. Tokens as likely as the last of the top k are kept with it.
    """
    z = logits / sampling.temperature
    if sampling.min_p > 0:
        p = z.softmax(-1)
        z = z.masked_fill(p < sampling.min_p * p.amax(-1, keepdim=True), -torch.inf)
    if 0 < sampling.top_k < z.shape[-1]:
        smallest = z.topk(sampling.top_k, dim=-1).values[..., -1:]
        z = z.masked_fill(z < smallest, -torch.inf)
    if sampling.top_p < 1:
        p, order = z.softmax(-1).sort(dim=-1, descending=True)
        is_beyond = p.cumsum(-1) - p >= sampling.top_p  # those before it reach top_p already
        z = z.masked_fill(torch.zeros_like(is_beyond).scatter(-1, order, is_beyond), -torch.inf)
    return z > -torch.inf
