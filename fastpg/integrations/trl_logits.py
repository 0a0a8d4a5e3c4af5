"""The functions of TRL that make log-probs and entropies from logits, by fastpg.

All releases from 0.16 on have `selective_log_softmax`, many `entropy_from_logits`, and those from
1.14 on `selective_log_softmax_and_entropy`. Up to 1.13 the trainer divides the logits by the
temperature; from 1.14 on the functions take it, and the mask of the rows that count.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

import fastpg

from .patching import Refused

UTILS = "trl.trainer.utils"  # the module where TRL has all that is replaced
IGNORED = -100


def selective_log_softmax(original: Callable) -> Callable:
    """The log-probs of `index`, or of K tokens for each row, index [..., K]."""
    check_arguments(original, ("logits", "index"), ("temperature", "row_mask"))

    def from_fastpg(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Tensor:
        return fastpg.token_logprobs(logits, masked(index, row_mask), temperature=temperature)

    return from_fastpg


def selective_log_softmax_and_entropy(original: Callable) -> Callable:
    """The log-probs of `index`, and the entropies."""
    optional = ("entropy_requires_grad", "temperature", "row_mask")
    check_arguments(original, ("logits", "index"), optional)

    def from_fastpg(
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        logp, entropy = fastpg.token_logprobs(
            logits, masked(index, row_mask), temperature=temperature, return_entropy=True
        )
        return logp, entropy if entropy_requires_grad else entropy.detach()

    return from_fastpg


def entropy_from_logits(original: Callable) -> Callable:
    """The entropies. TRL's chunks are not needed."""
    check_arguments(original, ("logits",), ("chunk_size",))

    def from_fastpg(logits: Tensor, chunk_size: int = 128) -> Tensor:
        labels = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
        return fastpg.token_logprobs(logits, labels, return_entropy=True)[1]

    return from_fastpg


def masked(index: Tensor, row_mask: Tensor | None) -> Tensor:
    """The labels, with those marked that do not count: their results are 0."""
    return index if row_mask is None else index.masked_fill(row_mask == 0, IGNORED)


def check_arguments(original: Callable, needed: tuple[str, ...], optional: tuple[str, ...]) -> None:
    """Raises `Refused` unless a function takes what is needed, and the first of the optional."""
    names = tuple(inspect.signature(original).parameters)
    known = needed + optional
    if len(names) < len(needed) or names != known[: len(names)]:
        raise Refused(f"it takes {', '.join(names)}, in place of {', '.join(known)}")


REPLACEMENTS = {
    "selective_log_softmax": selective_log_softmax,
    "selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
    "entropy_from_logits": entropy_from_logits,
}
