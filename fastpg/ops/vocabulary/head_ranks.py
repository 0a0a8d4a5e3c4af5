"""The ranks that hold the parts of a head, which all have to go on, or all to raise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from ..._op import is_dtensor
from .head import Head
from .placeholders import gathered_again, is_of_zero3


def of_all_ranks(
    op: str, given: Sequence[Tensor | None], gathered: Head
) -> AbstractContextManager[None]:
    """What an op is to be in, once the head that it was given is gathered.

    Args:
        op: The public name of the op, for messages.
        given: The weights and the bias that the user passed.
        gathered: What was made of them.
    """
    tensors = [x for x in given if x is not None]
    spread = [x for x in tensors if is_dtensor(x) or is_of_zero3(x)]
    # A graph that torch compiles cannot hold what an exception decides.
    if not spread or torch.compiler.is_compiling():
        return nullcontext()
    return _together(op, groups_of(spread), gathered)


@contextmanager
def _together(op: str, groups: list[dist.ProcessGroup], head: Head) -> Iterator[None]:
    with all_or_none(op, groups, head.hidden[0].device), gathered_again(head.tensors()):
        yield


def groups_of(spread: Sequence[Tensor]) -> list[dist.ProcessGroup]:
    """The process groups over which these parameters are spread: DTensors, or of ZeRO-3."""
    groups: list[dist.ProcessGroup] = []
    for x in spread:
        if is_dtensor(x):
            mesh = x.device_mesh  # type: ignore[attr-defined]
            groups += [mesh.get_group(axis) for axis in range(mesh.ndim)]
        else:
            groups.append(x.ds_process_group)  # type: ignore[attr-defined]
    # Weight and bias are often in the same group, which is asked once.
    return list(dict.fromkeys(groups))


@contextmanager
def all_or_none(op: str, groups: list[dist.ProcessGroup], device: torch.device) -> Iterator[None]:
    """Within it, a rank that raises makes the others raise at the end; a collective call on a CPU.

    They would wait for it for ever, in the next gather. On a GPU it is not waited for: there a bad
    label makes its row NaN.
    """
    if device.type != "cpu":
        yield
        return
    try:
        yield
    except Exception:
        # The others ask the same question at their end, and learn of it.
        _any_failed(groups, failed=True)
        raise
    if _any_failed(groups, failed=False):
        raise RuntimeError(f"{op}: another rank that has a part of weight raised an error")


def _any_failed(groups: list[dist.ProcessGroup], *, failed: bool) -> bool:
    """Whether any rank has failed. Along one axis of a mesh after the other, all ranks learn it."""
    flag = torch.tensor([int(failed)], device="cpu")
    for group in groups:
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
    return bool(flag)
