"""A loss of tokens from hidden states and the LM head, with gradients made while the logits exist.

    logp, entropy = token_logprobs(hidden @ weightᵀ + bias, ...),   L = token_loss(logp, entropy)

Chunk by chunk of rows: the logits, once; the loss, whose own backward pass gives a coefficient for
each log-prob and entropy; the logits turned in place into their gradient g, by these; and

    dhidden = g @ weight,   dweight += gᵀ @ hidden,   dbias += Σ g

with dweight in one tensor of fp32, if there are several chunks. That is 6 N V H operations, as many
as it takes with the logits kept. Ignored rows, and those of coefficient 0 (clipped, or of advantage
0), are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.autograd import once_differentiable
from ..common.checks import constant
from .head import (
    ALL,
    LEAST_ROWS,
    ROWS,
    Factors,
    chunks,
    kept_rows,
    length,
    logp_and_statistics,
    parts,
    reached,
    tiles,
    write_gradients,
)
from .head_arguments import head_arguments, labels_of_shard
from .linear_token_logprobs import logprobs

OP = "linear_token_loss"

# Rows of a chunk, by the bytes of a logit. Fewer would read weight, and add to its gradient, more
# often than is cheap: of bf16 above all, whose sums in fp32 a CPU's BLAS does not add up itself.
CHUNK_ROWS = {"cpu": {2: 1024, 4: 256, 8: 128}, "cuda": {2: 8192, 4: 4096, 8: 2048}}


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


def _chunk(token_loss, head, into, per_row, softcap, memory, group, *, add):
    """The loss and stats of some rows; their gradients go into those of the whole."""
    rows, labels, legal, temperature = per_row
    logits = [*tiles(head, memory.dtype, memory)]
    given = labels, legal, temperature, softcap
    logp, entropy, *of_row = logp_and_statistics(logits, *given, group)
    loss, stats, *grads = _coefficients(token_loss, logp, entropy, rows)
    per_row = *grads, entropy, *of_row, rows, labels, temperature
    _write_chunk(logits, kept_rows(reached(*grads)), head, into, per_row, softcap, add)
    return loss, stats


def _write_chunk(logits, live, head, into, per_row, softcap, add):
    *upstream, top, log_sum, rows, labels, temperature = parts(live, *per_row)
    upstream.append(torch.stack([top, log_sum]))
    dhidden = [x if x is None else x.new_empty(len(rows), x.shape[1]) for x in into.hidden]
    head, of_chunk = head.tile(live, ALL), into._replace(hidden=dhidden)
    for _, tokens, x in logits:
        given = labels - tokens.start, temperature, softcap
        tile = head.tile(ALL, tokens), of_chunk.tile(ALL, tokens)
        write_gradients(x[live], upstream, given, *tile, add=(tokens.start > 0, add))
    for whole, part in zip(into.hidden, dhidden, strict=True):
        if whole is not None:
            whole[rows] = part


def _scaled(grad: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * by in dtype: in place, if no second backward can ask for grad again."""
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    if by.device.type == "cpu" and by == 1:  # which a GPU would have to wait for
        return grad.to(dtype, copy=kept)
    if kept or grad.dtype is not dtype:
        return torch.mul(grad, by, out=grad.new_empty(grad.shape, dtype=dtype))
    return grad.mul_(by)


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token_loss, group, labels, temperature, softcap, ignore_index, dtype, *head):
        head, device = Factors.of(head), labels.device
        vocab = len(head.weight[0])
        where = group, labels, vocab, temperature, ignore_index
        kept, legal, local = labels_of_shard(OP, *where)
        of_all = torch.arange(len(labels), device=device), local, legal, temperature
        rows = kept_rows(kept)
        of_kept, per_row = head.tile(rows, ALL), parts(rows, *of_all)
        size = min(CHUNK_ROWS[device.type][dtype.itemsize], ROWS[device.type])
        of_chunks = chunks(len(per_row[0]), size)
        sums = head.weight[0].dtype if len(of_chunks) == 1 else temperature.dtype
        into = head.memory(temperature.dtype, sums, ctx.needs_input_grad[7:])
        most = max(LEAST_ROWS, *map(length, of_chunks))
        memory = head.weight[0].new_empty(most * vocab, dtype=dtype)
        results = []
        for chunk in of_chunks:
            args = of_kept.tile(chunk, ALL), into, parts(chunk, *per_row), softcap, memory, group
            results.append(_chunk(token_loss, *args, add=chunk.start > 0))
        for x in into.hidden if group is not None else ():
            if x is not None:
                dist.all_reduce(x, group=group)
        losses, stats = zip(*results, strict=True)
        ctx.save_for_backward(*into.flat())
        ctx.dtype = head.weight[0].dtype
        return torch.stack(losses).sum(), list(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        grads = (x if x is None else _scaled(x, grad_loss, ctx.dtype) for x in ctx.saved_tensors)
        return *(None,) * 7, *grads


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
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
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

    The gradients of hidden, weight and bias are held until backward, in fp32 (fp64 for fp64), but
    those of weight and bias in their dtype where one chunk is all; beside them a chunk takes for
    each token of the vocabulary 2 KiB in bf16 and 1 KiB in fp32, on a GPU 16. A GPU is waited for:
    for the number of rows that are not ignored, and once a chunk for that of those that have a
    gradient. torch.compile cannot take the gradient of a callable within a graph: there every level
    goes the way of "sequence"; and so it does for fp16, whose gradients underflow unless made after
    a GradScaler has scaled the loss.
    """
    if not callable(token_loss):
        raise TypeError(f"{OP}: token_loss must be callable, got {type(token_loss).__name__}")
    if level not in ("token", "sequence"):
        raise ValueError(f"{OP}: level must be token or sequence, got {level!r}")
    head, *args = head_arguments(
        OP, hidden, weight, labels, bias, temperature, softcap, logit_scale, ignore_index,
        logits_dtype, process_group,
    )  # fmt: skip
    wanted = torch.is_grad_enabled() and not constant(*head.flat())
    early = head.weight[0].dtype is not torch.float16 and not torch.compiler.is_compiling()
    early &= labels.device.type in CHUNK_ROWS  # elsewhere the reference serves
    if level == "token" and wanted and early:
        return _LinearTokenLoss.apply(token_loss, process_group, *args, *head.flat())
    rows = torch.arange(labels.numel(), device=labels.device)
    logp, entropy = logprobs(process_group, head, *args)
    if not wanted or torch.compiler.is_compiling():
        loss, stats = _checked(token_loss(logp, entropy, rows))
        return loss if wanted else loss.detach(), [stats]
    loss, stats, *grads = _coefficients(token_loss, logp, entropy, rows)
    return _LossWithGradients.apply(loss, logp, entropy, *grads), [stats]
