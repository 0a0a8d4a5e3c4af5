"""fastpg in torchtitan: the log-probs and entropies of its RL losses, by fastpg's kernels.

    from fastpg.integrations import torchtitan as fastpg_torchtitan

    print(fastpg_torchtitan.patch())

torchtitan makes an fp32 copy of the logits [B, L, V], and another of their softmax; fastpg reads
them as they are. Logits in shards of the vocabulary, which torchtitan gathers, are left to it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

import fastpg

from .patching import Change, Patches, PatchReport, Replacement

LOSS = "torchtitan.components.loss"
TARGET = f"{LOSS}.compute_logprobs"

_patches = Patches("torchtitan")


def patch(*, strict: bool = False) -> PatchReport:
    """Replaces `compute_logprobs` of torchtitan, in every module that holds it.

    Args:
        strict: Whether to raise unless it was replaced, and later if a call has to be left to
            torchtitan.

    Returns:
        What was replaced, what was not, and why. A call that is left to torchtitan, for sharded
        logits, adds a row later.

    Raises:
        PatchError: strict, and it was not replaced.

    Example:
        >>> from fastpg.integrations import torchtitan
        >>> print(torchtitan.patch())  # doctest: +SKIP
    """
    return _patches.apply(_changes(), strict=strict)


def unpatch() -> None:
    """Puts torchtitan's own function back."""
    _patches.undo()


def patched(*, strict: bool = False) -> AbstractContextManager[PatchReport]:
    """Like `patch`, for a with block."""
    return _patches.during(_changes(), strict=strict)


def is_patched() -> bool:
    """Whether torchtitan's function is replaced in this process."""
    return _patches.applied


def _changes() -> list[Change]:
    return [*_patches.untested("0.3"), Replacement(TARGET, compute_logprobs)]


def compute_logprobs(original: Callable[..., Any]) -> Callable[..., Any]:
    """What stands for torchtitan's function."""
    names = original.__globals__  # those that tell whether its logits are a part of the vocabulary

    def from_fastpg(
        logits: Tensor, labels: Tensor, *, return_entropy: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        spmd = names["get_spmd_backend"]() == "spmd_types" and names["spmd_mesh_size"]("tp") > 1
        if spmd or isinstance(logits, DTensor):
            _patches.leave(TARGET, "logits in shards are left to torchtitan")
            return original(logits, labels, return_entropy=return_entropy)
        ignored = names["IGNORE_INDEX"]
        if not return_entropy:
            return fastpg.token_logprobs(logits, labels, ignore_index=ignored)
        logp, entropy = fastpg.token_logprobs(
            logits, labels, ignore_index=ignored, return_entropy=True
        )
        return logp, entropy.detach()

    return from_fastpg
