"""A loss of tokens from hidden states and the LM head, with gradients made while the logits exist.

    logp, entropy = token_logprobs(hidden @ weightᵀ + bias, ...),   L = token_loss(logp, entropy)

Chunk by chunk of rows: the logits, once; the loss, whose own backward pass gives a coefficient for
each log-prob and entropy; the logits turned in place into their gradient g, by these; and

    dhidden = g @ weight,   dweight += gᵀ @ hidden,   dbias += Σ g

with dweight in one tensor of fp32. That is 6 N V H operations, as many as it takes with the logits
kept. Ignored rows, and those of coefficient 0 (clipped, or of advantage 0), are left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ._autograd import once_differentiable
from ._checks import constant
from ._head import (
    LEAST_ROWS,
    head_arguments,
    kept_rows,
    labels_of_shard,
    logits_of_slices,
    logp_and_statistics,
    reached,
    write_gradients,
)
from .linear_token_logprobs import logprobs

OP = "linear_token_loss"

# Bytes of a chunk per token of the vocabulary: 512 rows in bf16 and 256 in fp32; on a GPU 4096 and
# 2048. That is less than dweight takes, and fewer rows would add to it more often than is cheap.
CHUNK_BYTES = {"cpu": 1024, "cuda": 8192}


def _checked(result) -> tuple[Tensor, object]:
    """What token_loss returned, if it is a scalar and its stats."""
    loss = result[0] if isinstance(result, tuple) and len(result) == 2 else None
    if not isinstance(loss, Tensor) or loss.dim() > 0:
        got = type(result).__name__ if loss is None else f"a loss {getattr(loss, 'shape', loss)}"
        raise TypeError(f"{OP}: token_loss must return (0-d tensor, stats), got {got}")
    return result


def _coefficients(token_loss, logp, entropy, rows):
    """loss, stats, dL/dlogp, dL/dentropy: None if the loss does not look at it."""
    with torch.enable_grad():
        leaves = logp.detach().requires_grad_(), entropy.detach().requires_grad_()
        loss, stats = _checked(token_loss(*leaves, rows))
        by_logp, by_entropy = None, None
        if loss.requires_grad:
            by_logp, by_entropy = torch.autograd.grad(loss, leaves, allow_unused=True)
        if by_logp is None and by_entropy is None:
            raise ValueError(f"{OP}: token_loss returned a loss without a graph back to logp")
    return loss.detach(), stats, torch.zeros_like(logp) if by_logp is None else by_logp, by_entropy


def _chunk(token_loss, rows, inputs, head, into, memory, group, *, add):
    """The loss and stats of some rows; their gradients go to dhidden, dweight and dbias."""
    hidden, labels, legal, temperature = inputs
    weight, bias, softcap = head
    slices = [*logits_of_slices(hidden, weight, bias, memory.dtype, memory)]
    logp, entropy, *of_row = logp_and_statistics(slices, labels, legal, temperature, softcap, group)
    loss, stats, *grads = _coefficients(token_loss, logp, entropy, rows)
    per_row = *grads, entropy, *of_row, hidden, labels, temperature, rows
    live, per_row = kept_rows(reached(*grads), *per_row)
    *upstream, top, log_sum, hidden, labels, temperature, rows = per_row
    upstream.append(torch.stack([top, log_sum]))
    if len(live) < len(logp):
        slices = ((begin, end, x[live]) for begin, end, x in slices)
    all_dhidden, dweight, dbias = into
    dhidden = None if all_dhidden is None else all_dhidden.new_empty(hidden.shape)
    given = hidden, labels, temperature, softcap
    write_gradients(slices, upstream, given, weight, (dhidden, dweight, dbias), add=add)
    if dhidden is not None:
        all_dhidden[rows] = dhidden
    return loss, stats


def _scaled(grad: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * by, in dtype, in one pass; and in none where that is seen without waiting."""
    if by.device.type == "cpu" and by == 1:
        return grad.to(dtype)
    return torch.mul(grad, by, out=grad.new_empty(grad.shape, dtype=dtype))


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token_loss, group, hidden, weight, bias, labels, temperature, *options):
        softcap, ignore_index, dtype = options
        where = group, labels, weight, temperature, ignore_index
        kept, legal, local = labels_of_shard(OP, *where)
        rows, inputs = kept_rows(kept, hidden, local, legal, temperature)
        dhidden, dweight, dbias = ctx.needs_input_grad[2:5]
        into = (
            temperature.new_zeros(hidden.shape) if dhidden else None,
            temperature.new_empty(weight.shape) if dweight else None,
            temperature.new_empty(weight.shape[:1]) if dbias else None,
        )
        size = CHUNK_BYTES[weight.device.type] // dtype.itemsize
        most = max(min(size, len(rows)), LEAST_ROWS)
        memory = weight.new_empty(most * len(weight), dtype=dtype)
        results = []
        for begin in range(0, max(len(rows), 1), size):
            part = slice(begin, begin + size)
            chunk = [x[part] if x.dim() else x for x in inputs]
            args = rows[part], chunk, (weight, bias, softcap), into, memory, group
            results.append(_chunk(token_loss, *args, add=begin > 0))
        if group is not None and dhidden:
            dist.all_reduce(into[0], group=group)
        losses, stats = zip(*results, strict=True)
        ctx.save_for_backward(*into)
        ctx.dtype = hidden.dtype
        return torch.stack(losses).sum(), list(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        grads = (x if x is None else _scaled(x, grad_loss, ctx.dtype) for x in ctx.saved_tensors)
        return None, None, *grads, None, None, None, None, None


class _LossWithGradients(torch.autograd.Function):
    """The loss, which looks at logp and entropy, and at nothing else that gets a gradient."""

    @staticmethod
    def forward(ctx, loss, logp, entropy, by_logp, by_entropy):
        ctx.save_for_backward(by_logp, by_entropy)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grads = (x if x is None else x * grad_loss for x in ctx.saved_tensors)
        return None, *grads, None, None


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_loss: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, object]],
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    logits_dtype: torch.dtype | None = None,
    level: str = "token",
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, list]:
    """token_loss(*linear_token_logprobs(...)) with its gradients made on the way.

    token_loss(logp, entropy, rows) -> (loss, stats): of the tokens `rows`, int64 indices into the
        flattened labels, each tensor [n] of them; loss is 0-d. It is called once a chunk, and its
        losses must add up over chunks, as all of fastpg do: policy_loss(logp, advantages[rows],
        weight[rows], ...). An ignored token may be in rows or not: its weight must be 0. Nothing
        else that it looks at gets a gradient, at any level; a graph of torch.compile, where the
        loss is differentiated as it stands, is the exception.
    level: "sequence" for a loss that needs all tokens at once (that of policy_loss with the same
        level): then it is called once, rows are all of labels, and gradients are made in backward.
        logp and entropy are flat there too, [N]: of labels [B, T], policy_loss(logp.view(B, T),
        advantages, weight, level="sequence"); of packed ones, with its cu_seqlens.
    The other arguments are those of linear_token_logprobs. With a process_group every rank must
        call with a token_loss that computes the same: it is evaluated on each, on the same bits.
    Returns the loss, and the list of the stats that token_loss returned, for merge_stats.

    The gradients of hidden, weight and bias are held, in fp32, until backward; beside them a chunk
    takes 1 KiB (on a GPU 8) for each token of the vocabulary. A GPU is waited for once a chunk: for
    the number of rows that have a gradient. torch.compile cannot take the gradient of a callable
    within a graph: there every level goes the way of "sequence"; and so it does for fp16, whose
    gradients underflow unless made after a GradScaler has scaled the loss.
    """
    if not callable(token_loss):
        raise TypeError(f"{OP}: token_loss must be callable, got {type(token_loss).__name__}")
    if level not in ("token", "sequence"):
        raise ValueError(f"{OP}: level must be token or sequence, got {level!r}")
    args = head_arguments(
        OP, hidden, weight, labels, bias, temperature, softcap, logit_scale, ignore_index,
        logits_dtype, process_group,
    )  # fmt: skip
    wanted = torch.is_grad_enabled() and not constant(*args[:3])
    early = args[0].dtype is not torch.float16 and not torch.compiler.is_compiling()
    if level == "token" and wanted and early:
        return _LinearTokenLoss.apply(token_loss, process_group, *args)
    rows = torch.arange(labels.numel(), device=labels.device)
    logp, entropy = logprobs(process_group, *args)
    if not wanted or torch.compiler.is_compiling():
        loss, stats = _checked(token_loss(logp, entropy, rows))
        return loss if wanted else loss.detach(), [stats]
    loss, stats, *grads = _coefficients(token_loss, logp, entropy, rows)
    return _LossWithGradients.apply(loss, logp, entropy, *grads), [stats]
