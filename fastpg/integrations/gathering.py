"""Parameters of ZeRO-3, which takes their memory away between forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def gathered_again(
    parameters: Sequence[Tensor | None], gather: Callable[[Tensor], AbstractContextManager[object]]
) -> saved_tensors_hooks:
    """Within it, the graph keeps no memory of the parameters; backward gathers them again.

    Args:
        parameters: The parameters, gathered now. What else is saved is kept as ever.
        gather: Takes a parameter; returns the context in which it is whole.

    Returns:
        The context manager for the forward pass.
    """
    by_address = {x.data_ptr(): x for x in parameters if x is not None}

    def pack(saved: Tensor) -> Any:
        parameter = by_address.get(saved.data_ptr())
        if parameter is None or parameter.shape != saved.shape:
            return saved, None
        return None, parameter

    def unpack(kept: Any) -> Tensor:
        saved, parameter = kept
        if parameter is None:
            return saved
        with gather(parameter):
            return parameter.detach().clone()

    return saved_tensors_hooks(pack, unpack)
