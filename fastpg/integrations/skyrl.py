"""fastpg in SkyRL: its log-probs and entropies of logits, and its advantages, by fastpg's ops.

    from fastpg.integrations import skyrl as fastpg_skyrl

    print(fastpg_skyrl.patch())  # in each process that builds a model or computes advantages

Patch before models are built: one that is built keeps SkyRL's entropy function. SkyRL's registry of
advantages may live in an actor of Ray, which has what was there when it was made.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

import fastpg

from .patching import Change, Patches, PatchReport, replaced_by

LOGITS = "skyrl.backends.skyrl_train.utils.torch_utils"
CREDIT = "skyrl.backends.skyrl_train.utils.ppo_utils"

_patches = Patches("skyrl")


def patch(*, strict: bool = False) -> PatchReport:
    """Replaces functions of SkyRL in this process.

    Args:
        strict: Whether to raise unless everything was replaced.

    Returns:
        What was replaced, what was not, and why.

    Raises:
        PatchError: strict, and something was not replaced. Then nothing is.

    Example:
        >>> from fastpg.integrations import skyrl
        >>> print(skyrl.patch())  # doctest: +SKIP
    """
    return _patches.apply(_changes(), strict=strict)


def unpatch() -> None:
    """Puts SkyRL's own functions back."""
    _patches.undo()


def patched(*, strict: bool = False) -> AbstractContextManager[PatchReport]:
    """Like `patch`, for a with block."""
    return _patches.during(_changes(), strict=strict)


def is_patched() -> bool:
    """Whether anything of SkyRL is replaced in this process."""
    return _patches.applied


def _changes() -> list[Change]:
    return [
        *_patches.untested("0.3"),
        replaced_by(f"{LOGITS}.logprobs_from_logits", logprobs_from_logits),
        replaced_by(f"{LOGITS}.chunked_entropy_from_logits", chunked_entropy_from_logits),
        replaced_by(f"{CREDIT}.compute_gae_advantage_return", compute_gae_advantage_return),
        replaced_by(
            f"{CREDIT}.AdvantageEstimatorRegistry._functions[gae]", compute_gae_advantage_return
        ),
    ]


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probs [B, T], fp32.

    The logits stay as they are: an entropy with a gradient needs them after the backward of this.
    """
    return fastpg.token_logprobs(logits, labels)


def chunked_entropy_from_logits(
    logits: Tensor,
    requires_grad: bool = False,
    attention_mask: Tensor | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """Entropies [B, T], fp32; 0 where the mask is. Nothing is held that chunks would be less of."""
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
    if attention_mask is not None:
        if attention_mask.shape != labels.shape:
            raise ValueError(
                f"attention_mask must be {tuple(labels.shape)}, as the logits, got "
                f"{tuple(attention_mask.shape)}"
            )
        labels = labels.masked_fill(attention_mask == 0, -100)
    with torch.set_grad_enabled(requires_grad and torch.is_grad_enabled()):
        return fastpg.token_logprobs(logits, labels, return_entropy=True)[1]


def compute_gae_advantage_return(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lambd: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Advantages, whitened over the mask, and returns, both [B, T].

    As in SkyRL the recursion goes through masked slots. Masked advantages are 0, where SkyRL leaves
    numbers that nobody reads.
    """
    with torch.no_grad():
        advantages, returns = fastpg.gae(token_level_rewards, values, gamma=gamma, lam=lambd)
        return fastpg.whiten(advantages, response_mask), returns
