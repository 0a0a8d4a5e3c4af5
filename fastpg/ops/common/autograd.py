"""The gradient of an op is a number: to differentiate it again is refused, never left out."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch


def once_differentiable(backward: Callable) -> Callable:
    """The backward of the autograd.Function of a page whose gradient cannot be differentiated.

    torch's decorator of this name refuses only where the incoming gradient requires one: that of a
    plain loss does not, and a penalty on its gradient would be dropped in silence.
    """
    op = backward.__module__.rpartition(".")[2]
    message = f"{op}: its gradient is not differentiable, double backward is not supported"

    @wraps(backward)
    def wrapper(ctx, *grads):
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *grads)  # nobody asked with create_graph, or nobody could
        with torch.no_grad():
            out = backward(ctx, *grads)
        out = out if isinstance(out, tuple) else (out,)
        leaves = (x if x is None else x.detach().requires_grad_() for x in out)
        return torch._C._functions.DelayedError(message.encode(), len(out))(*leaves)

    return wrapper
