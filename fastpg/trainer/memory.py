"""What keeps the memory of an optimiser step low on a CPU."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from fastpg.trainer.forward import causal_lm


def give_back_freed() -> None:
    """Let the C library return memory that is free to the system, where it knows how to."""
    # Sampling leaves holes between small blocks that are kept, 0.2 GB for a vocabulary of 151936,
    # and the large blocks of an update do not fit into them.
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


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
