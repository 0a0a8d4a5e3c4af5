"""The options of gae, checked, in the one form in which the kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import checks


def discount(name, x, rewards, mask, count, dtype):
    """gamma or lam as (tensor or None, float)."""
    if not isinstance(x, Tensor):
        checks.check_number("gae", name, x)
        if not 0 <= x <= 1:
            raise ValueError(f"gae: {name} must be in [0, 1], got {x}")
        return None, float(x)
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


def endings(rewards, bootstrap, mask, terminated, truncated, cu_seqlens, count):
    """bootstrap, 0 where it is not read; terminated and truncated per token, or None."""
    checks.check_shape("gae", "terminated", terminated, rewards, (count,), rewards.shape)
    checks.check_shape("gae", "truncated", truncated, rewards, (count,), rewards.shape)
    follows = (count,) if truncated is None else truncated.shape
    checks.check_shape("gae", "bootstrap", bootstrap, rewards, follows)
    if truncated is not None and bootstrap is None:
        raise ValueError("gae: truncated needs bootstrap, the value that follows")
    terminated, truncated = checks.as_bool(terminated), checks.as_bool(truncated)
    if truncated is not None and truncated.shape != rewards.shape:
        terminated, truncated = ~truncated if terminated is None else terminated, None
    if terminated is None or terminated.shape == rewards.shape:
        return bootstrap, terminated, truncated
    if truncated is None:
        return None if bootstrap is None else bootstrap.masked_fill(terminated, 0.0), None, None
    if not torch.compiler.is_compiling():  # a graph cannot branch on values; the op checks again
        checks.check_cu_seqlens("gae", cu_seqlens, rewards)
    last = checks.is_last(torch.ones_like(truncated) if mask is None else mask, cu_seqlens)
    return bootstrap, last & checks.to_tokens(terminated, rewards, cu_seqlens), truncated
