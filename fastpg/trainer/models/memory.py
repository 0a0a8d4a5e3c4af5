"""What keeps the memory of an optimiser step low on a CPU."""

import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor, nn

from fastpg.trainer.models.forward import causal_lm

logger = get_logger(__name__)

WORTH_A_FILE = 2**26
"""The bytes of a model from which on it is put aside."""

_ALIGNMENT = 64  # of weights in a file, in bytes


def give_back_freed() -> None:
    """Let the C library return memory that is free to the system, where it knows how to."""
    # Sampling leaves holes between small blocks that are kept, 0.2 GB for a vocabulary of 151936,
    # and the large blocks of an update do not fit into them.
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class Aside:
    """A frozen model that needs no memory while another one is trained.

    Its weights move into a file without a name. The system reads them from there when the model
    computes, and whenever it wants to it may forget them again, which `put` makes it do at once.
    Their values are the same. Only the weights on a CPU under Linux move.

    Args:
        model: The model. What is none, the policy without its adapter for one, has no weights.
        directory: Where the file is put, when there is one.
    """

    def __init__(self, model: object, directory: Path) -> None:
        weights = list(model.parameters()) if isinstance(model, nn.Module) else []
        on_cpu = all(weight.device.type == "cpu" for weight in weights)
        is_large = sum(weight.nbytes for weight in weights) >= WORTH_A_FILE
        self.weights = weights if on_cpu and is_large and sys.platform == "linux" else []
        self.directory = directory
        self._memory: mmap.mmap | None = None

    def put(self) -> None:
        """Let the weights leave memory; without room for a file they stay there, with a warning."""
        if self.weights and self._memory is None:
            try:
                self._memory = _moved_to_file(self.weights, self.directory)
            except OSError as error:
                logger.warning(f"The reference stays in memory while the policy learns: {error}.")
                self.weights = []
        if self._memory is not None:
            self._memory.madvise(mmap.MADV_DONTNEED)


def _moved_to_file(weights: list[nn.Parameter], directory: Path) -> mmap.mmap:
    """Move weights into a file that is gone with the last of them. Returns its memory.

    Raises:
        OSError: There is no room for it.
    """
    starts = [0]
    for weight in weights:
        starts.append(starts[-1] + -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT)
    with tempfile.TemporaryFile(dir=directory) as file:
        # Writing to a page of a file for which the disk has no room would kill the process.
        os.posix_fallocate(file.fileno(), 0, starts[-1])
        memory = mmap.mmap(file.fileno(), starts[-1])
    for weight, start in zip(weights, starts[:-1], strict=True):
        place = torch.frombuffer(memory, dtype=weight.dtype, count=weight.numel(), offset=start)
        weight.data = place.view(weight.shape).copy_(weight.data)
    return memory


@contextmanager
def one_gradient(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Add the gradient of the embeddings to that of the head, for the losses of a with block.

    Autograd would make a second tensor of the size of the weight, with few rows that are not zero,
    to add it up with the first. On a GPU, and where processes exchange gradients, it still does.

    Args:
        accelerator: The accelerator of the run.
        model: A prepared `PolicyWithValue`, whose forward and backward are in the block. A policy
            without tied embeddings is left alone.
    """
    policy = causal_lm(accelerator.unwrap_model(model).policy)
    embeddings: Any = policy.get_input_embeddings()
    head: Any = policy.get_output_embeddings()
    if accelerator.num_processes > 1 or not _is_tied(embeddings, head):
        yield
        return
    rows: list[tuple[Tensor, Tensor]] = []

    def cut(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        states = output.detach().requires_grad_()
        rows.append((inputs[0], states))
        return states

    hook = embeddings.register_forward_hook(cut)
    try:
        yield
    finally:
        hook.remove()
    for ids, states in rows:
        _add_rows(embeddings, ids, states.grad)


def _add_rows(embeddings: nn.Embedding, ids: Tensor, gradient: Tensor | None) -> None:
    """Add the gradient of looked-up states to that of the weight, which its head has made."""
    if gradient is None:
        return
    if embeddings.padding_idx is not None:
        gradient = gradient.masked_fill((ids == embeddings.padding_idx)[..., None], 0.0)
    assert embeddings.weight.grad is not None
    embeddings.weight.grad.index_add_(0, ids.flatten(), gradient.flatten(0, -2))


def _is_tied(embeddings: Any, head: Any) -> bool:
    """Whether a weight of both is trained; other kinds of embeddings are left to autograd."""
    weight = getattr(embeddings, "weight", None)
    # On a GPU the order of such a sum would change from run to run.
    is_here = type(embeddings) is nn.Embedding and embeddings.weight.device.type == "cpu"
    return is_here and weight is getattr(head, "weight", None) and embeddings.weight.requires_grad
