"""The options of gae, checked, in the one form in which the kernels take them."""

from __future__ import annotations

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
    mask: Tensor | None,
    count: int,
    dtype: torch.dtype,
) -> tuple[Tensor | None, float]:
    """gamma or lam, checked: a tensor per sequence or per token, or None and a float."""
    if not isinstance(x, Tensor):
        checks.check_number("gae", name, x)
        if not 0 <= x <= 1:
            raise ValueError(f"gae: {name} must be in [0, 1], got {x}")
        return None, float(x)
    # A 0-d tensor, as a compiled graph may hold it, is one number for every sequence.
    x = x.expand(count) if x.dim() == 0 else x
    checks.check_shape("gae", name, x, rewards, (count,), rewards.shape)
    return checks.fractions("gae", name, x, mask, dtype), 0.0


def ratio(name: str, x: Tensor | None, rewards: Tensor, dtype: torch.dtype) -> Tensor | None:
    """rho or c as a constant; None stands for 1."""
    if x is None:
        return None
    checks.check_shape("gae", name, x, rewards, rewards.shape)
    checks.compute_dtype("gae", **{name: x})
    return checks.cast(x.detach(), dtype)


def endings(
    rewards: Tensor,
    bootstrap: Tensor | None,
    mask: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    cu_seqlens: Tensor | None,
    count: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns bootstrap, 0 where it is not read; terminated and truncated per token, or None.

    A flag per sequence is one of its last unmasked token.
    """
    checks.check_shape("gae", "terminated", terminated, rewards, (count,), rewards.shape)
    checks.check_shape("gae", "truncated", truncated, rewards, (count,), rewards.shape)
    follows = (count,) if truncated is None else truncated.shape
    checks.check_shape("gae", "bootstrap", bootstrap, rewards, follows)
    if truncated is not None and bootstrap is None:
        raise ValueError("gae: truncated needs bootstrap, the value that follows")
    terminated = checks.as_bool("gae", "terminated", terminated)
    truncated = checks.as_bool("gae", "truncated", truncated)
    if truncated is not None and truncated.shape != rewards.shape:
        # A bootstrap per sequence says the same: it is read unless the sequence is terminated.
        terminated = ~truncated if terminated is None else terminated
        truncated = None
    # From here on `terminated` may still be per sequence; `truncated` is per token, or None.
    if terminated is None or terminated.shape == rewards.shape:
        return bootstrap, terminated, truncated
    if truncated is None:
        # The bootstrap is read once per sequence, so to terminate it is to make it 0.
        return None if bootstrap is None else bootstrap.masked_fill(terminated, 0.0), None, None
    if not torch.compiler.is_compiling():  # A graph cannot branch on values; the op checks again.
        checks.check_cu_seqlens("gae", cu_seqlens, rewards)
    last = checks.is_last(torch.ones_like(truncated) if mask is None else mask, cu_seqlens)
    return bootstrap, last & checks.to_tokens(terminated, rewards, cu_seqlens), truncated
