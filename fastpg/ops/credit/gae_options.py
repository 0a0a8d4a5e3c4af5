"""The options of gae, checked, in the one form in which the kernels take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common import checks


def steps(mask: Tensor | None, rewards: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """Marks all but the padding after the last unmasked token, which a bootstrap follows."""
    if mask is None:
        return None
    if cu_seqlens is not None and not torch.compiler.is_compiling():
        checks.check_cu_seqlens("gae", cu_seqlens, rewards)  # before they are read here
    return checks.unmasked_from(mask, cu_seqlens) > 0


def discount(
    name: str,
    x: float | Tensor,
    rewards: Tensor,
    read: Tensor | None,
    count: int,
    dtype: torch.dtype,
) -> tuple[Tensor | None, float]:
    """gamma or lam, checked: a tensor per sequence or per token and 0, or None and a float.

    Args:
        name: "gamma" or "lam".
        x: What the user passes.
        rewards: The rewards, padded or packed.
        read: Marks the tokens at which it is read; None: all of them.
        count: How many sequences there are.
        dtype: The dtype to compute in.
    """
    if not isinstance(x, Tensor):
        checks.check_number("gae", name, x)
        if not 0 <= x <= 1:
            raise ValueError(f"gae: {name} must be in [0, 1], got {x}")
        return None, float(x)
    # A 0-d tensor, as a compiled graph may hold it, is one number for every sequence.
    x = x.expand(count) if x.dim() == 0 else x
    checks.check_shape("gae", name, x, rewards, (count,), rewards.shape)
    return checks.fractions("gae", name, x, read, dtype), 0.0


def ratio(name: str, x: Tensor | None, rewards: Tensor, dtype: torch.dtype) -> Tensor | None:
    """rho or c as a constant; None stands for 1."""
    if x is None:
        return None
    checks.check_shape("gae", name, x, rewards, rewards.shape)
    checks.compute_dtype("gae", **{name: x})
    return checks.cast(x.detach(), dtype)


class Endings(NamedTuple):
    """How the episodes end, as the op takes it: the fields of its inputs that have these names."""

    bootstrap: Tensor | None  # like rewards with `truncated`, else [B]; None: 0
    terminated: Tensor | None  # bool, like rewards; None: no token inside a sequence is
    truncated: Tensor | None  # bool, like rewards; None: no token is


def endings(
    rewards: Tensor,
    *,
    bootstrap: Tensor | None,
    mask: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    cu_seqlens: Tensor | None,
    count: int,
) -> Endings:
    """How the episodes end, from the flags per token or per sequence that the user passes.

    A flag per sequence is one of its last unmasked token.
    """
    per_sequence, per_token = (count,), rewards.shape
    checks.check_shape("gae", "terminated", terminated, rewards, per_sequence, per_token)
    checks.check_shape("gae", "truncated", truncated, rewards, per_sequence, per_token)
    follows = per_sequence if truncated is None else truncated.shape
    checks.check_shape("gae", "bootstrap", bootstrap, rewards, follows)
    if truncated is not None and bootstrap is None:
        raise ValueError("gae: truncated needs bootstrap, the value that follows")
    terminated = checks.as_bool("gae", "terminated", terminated)
    truncated = checks.as_bool("gae", "truncated", truncated)
    if truncated is not None and truncated.shape != per_token:
        # A bootstrap per sequence is read unless its last token is terminated. So what is not
        # truncated is terminated, unless the user says which sequences are.
        return with_bootstrap_per_sequence(
            rewards, bootstrap, ~truncated if terminated is None else terminated
        )
    if truncated is None:
        return with_bootstrap_per_sequence(rewards, bootstrap, terminated)
    if terminated is not None and terminated.shape != per_token:
        if not torch.compiler.is_compiling():  # A graph cannot branch on values; the op checks too.
            checks.check_cu_seqlens("gae", cu_seqlens, rewards)
        last = checks.is_last(torch.ones_like(truncated) if mask is None else mask, cu_seqlens)
        terminated = last & checks.to_tokens(terminated, rewards, cu_seqlens)
    return Endings(bootstrap, terminated, truncated)


def with_bootstrap_per_sequence(
    rewards: Tensor, bootstrap: Tensor | None, terminated: Tensor | None
) -> Endings:
    """The endings without flags of truncated tokens; a bootstrap [B] is read once a sequence."""
    if terminated is None or terminated.shape == rewards.shape:
        return Endings(bootstrap, terminated, None)
    # To terminate a sequence is to make its bootstrap 0.
    if bootstrap is not None:
        bootstrap = bootstrap.masked_fill(terminated, 0.0)
    return Endings(bootstrap, None, None)
