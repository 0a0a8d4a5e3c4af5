"""A weight of which each rank holds a part, gathered for a function that reads all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor, Partial


def gathered(x: Tensor) -> Tensor:
    """The whole of a DTensor, differentiable; any other tensor as it is.

    Backward averages the gradient over the ranks, as FSDP does: under data parallelism each rank
    has one from its own rows. `full_tensor()` alone would take every rank's for the gradient of
    all, and leave each shard with the part that its own rank made. Where all ranks have the same
    rows, as under tensor parallelism, the average is what each of them has.
    """
    if not isinstance(x, DTensor):
        return x
    return x.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)


def gathered_again(
    parameters: Sequence[Tensor | None], gather: Callable[[Tensor], AbstractContextManager[object]]
) -> saved_tensors_hooks:
    """Within it, the graph keeps no memory of ZeRO-3's parameters; backward gathers them again.

    ZeRO-3 takes a parameter's memory away between forward and backward.

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
