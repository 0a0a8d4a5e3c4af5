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

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..._autograd import Differentiable, needs_no_gradient
from . import linear_support
from .head import (
    ALL,
    LEAST_ROWS,
    ROWS,
    Head,
    HeadGradients,
    Part,
    RowLabels,
    Tile,
    Upstream,
    chunks,
    empty_gradients,
    kept_rows,
    length,
    overwrite,
    reached,
    row_results,
    take,
    tiles,
    write_products,
)
from .head_arguments import HeadInputs, as_list, head_inputs, labels_of_shard
from .head_ranks import of_all_ranks
from .linear_rows import logprobs
from .support import Support, checked_support
from .token_loss import OP, MadeLoss, TokenLoss, checked, differentiated, made_loss

# The rows of a chunk, by the bytes of a logit. With fewer, head_weight would be read, and its
# gradient added to, more often than is cheap: above all in bf16, for which a CPU's BLAS does not
# add up in fp32 itself.
CHUNK_ROWS = {"cpu": {2: 1024, 4: 256, 8: 128}, "cuda": {2: 8192, 4: 4096, 8: 2048}}


class LossInputs(NamedTuple):
    rows: HeadInputs
    token_loss: TokenLoss


class ChunkRows(NamedTuple):
    """The rows of a chunk [n]."""

    rows: Tensor  # int64, their places in the flattened labels
    labels: Tensor  # counted from the first token of this head
    legal: Tensor
    temperature: Tensor  # [n] or []


class Plan(NamedTuple):
    """The rows that are not ignored, cut into chunks, and the memory that all chunks use."""

    head: Head  # of these rows
    rows: ChunkRows  # all of them
    chunks: list[slice]
    gradients: HeadGradients  # of every row, the ignored ones too
    memory: Tensor  # the logits of one chunk


def prepare(x: HeadInputs) -> Plan:
    """Leaves out what is ignored, cuts the rest into chunks and allocates memory."""
    head, device = x.head, x.labels.device
    dtype, compute_dtype = x.head_weight[0].dtype, x.temperature.dtype
    kept, legal, local = labels_of_shard(OP, x)
    places = torch.arange(len(x.labels), device=device)
    part = kept_rows(kept)
    rows = take(ChunkRows(places, local, legal, x.temperature), part)
    size = min(CHUNK_ROWS[device.type][x.logits_dtype.itemsize], ROWS[device.type])
    all_chunks = chunks(len(rows.labels), size)
    gradients = empty_gradients(
        head,
        [tensor is not None and tensor.requires_grad for tensor in head.tensors()],
        hidden_dtype=compute_dtype,
        # A sum over several chunks is to be rounded once.
        weight_dtype=dtype if len(all_chunks) == 1 else compute_dtype,
    )
    height = max(LEAST_ROWS, max(map(length, all_chunks)))
    vocab = len(x.head_weight[0])
    memory = x.head_weight[0].new_empty(height * vocab, dtype=x.logits_dtype)
    return Plan(head.tile(part, ALL), rows, all_chunks, gradients, memory)


def run_chunk(x: LossInputs, plan: Plan, chunk: slice) -> tuple[Tensor, object]:
    """The loss and the stats of a chunk; its gradients go into those of the plan."""
    head, rows = plan.head.tile(chunk, ALL), take(plan.rows, chunk)
    logits = list(tiles(head, plan.memory.dtype, plan.memory))
    labels = RowLabels(rows.labels, rows.legal, rows.temperature)
    softcap = x.rows.softcap
    logp, entropy, top, log_sum = row_results(logits, labels, softcap, x.rows.group)
    loss, stats, grad_logp, grad_entropy = differentiated(x.token_loss, logp, entropy, rows.rows)
    live = kept_rows(reached(grad_logp, grad_entropy))
    upstream = Upstream(
        grad_logp, grad_entropy, entropy, top, log_sum, rows.labels, rows.temperature
    )
    write_chunk(
        logits,
        live=live,
        places=rows.rows[live],
        upstream=take(upstream, live),
        softcap=softcap,
        head=head.tile(live, ALL),
        gradients=plan.gradients,
        add=chunk.start > 0,
    )
    return loss, stats


def write_chunk(
    logits: list[Tile],
    *,
    live: Part,
    places: Tensor,
    upstream: Upstream,
    softcap: float,
    head: Head,
    gradients: HeadGradients,
    add: bool,
) -> None:
    """Turns the logits of a chunk into its gradients.

    Args:
        logits: The tiles of all rows of the chunk.
        live: Those of its rows that have a gradient.
        places: Where these are in the flattened labels.
        upstream: What is known of these.
        softcap: That of the rows; 0: none.
        head: Of these rows.
        gradients: Of all rows.
        add: Whether the gradients of head_weight and bias hold those of other chunks already.
    """
    chunk = gradients._replace(
        hidden=[
            None if x is None else x.new_empty(len(places), x.shape[1]) for x in gradients.hidden
        ]
    )
    for tile in logits:
        tile = tile._replace(logits=tile.logits[live])
        overwrite(tile, upstream, softcap)
        write_products(
            tile.logits,
            head.tile(ALL, tile.tokens),
            chunk.tile(ALL, tile.tokens),
            add_hidden=tile.tokens.start > 0,
            add_weight=add,
        )
    for whole, part in zip(gradients.hidden, chunk.hidden, strict=True):
        if whole is not None and part is not None:
            whole[places] = part


class Saved(NamedTuple):
    """The gradients of the loss; backward only multiplies them."""

    gradients: list[Tensor]  # those that are wanted
    wanted: list[bool]  # for each hidden, each head_weight and bias, whether there is one
    dtype: torch.dtype  # that of the results


def _forward(x: LossInputs) -> tuple[tuple[Tensor, list], Saved]:
    plan, group = prepare(x.rows), x.rows.group
    results = [run_chunk(x, plan, chunk) for chunk in plan.chunks]
    if group is not None:  # every rank has hidden, and a part of its gradient
        for grad in plan.gradients.hidden:
            if grad is not None:
                dist.all_reduce(grad, group=group)
    loss = torch.stack([loss for loss, _ in results]).sum()
    gradients = plan.gradients.tensors()
    saved = Saved(
        [grad for grad in gradients if grad is not None],
        [grad is not None for grad in gradients],
        x.rows.head_weight[0].dtype,
    )
    return (loss, [stats for _, stats in results]), saved


def _backward(x: Saved, grad_loss: Tensor, _stats: None) -> tuple[list[Tensor | None]]:
    scaled_gradients = iter([scaled(grad, grad_loss, x.dtype) for grad in x.gradients])
    return ([next(scaled_gradients) if want else None for want in x.wanted],)


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * factor in dtype: in place, if no second backward can ask for grad again."""
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    if factor.device.type == "cpu" and factor == 1:  # to look at it, a GPU would be waited for
        return grad.to(dtype, copy=kept)
    if kept or grad.dtype is not dtype:
        return torch.mul(grad, factor, out=grad.new_empty(grad.shape, dtype=dtype))
    return grad.mul_(factor)


_linear_token_loss = Differentiable(
    OP,
    inputs=LossInputs,
    saved=Saved,
    differentiable=("hidden", "head_weight", "bias"),
    forward=_forward,
    backward=_backward,
)


def loss_of_all_rows(
    inputs: HeadInputs, support: Support | None, token_loss: TokenLoss, *, wanted: bool
) -> tuple[Tensor, list]:
    """The loss by one call of token_loss; its gradients are made in backward."""
    rows = torch.arange(len(inputs.labels), device=inputs.labels.device)
    if support is None:
        logp, entropy = logprobs(inputs)
    else:
        logp, entropy = linear_support.logprobs(inputs, support)
    if not wanted or torch.compiler.is_compiling():
        loss, stats = checked(token_loss(logp, entropy, rows))
        return loss if wanted else loss.detach(), [stats]
    loss, stats, grad_logp, grad_entropy = differentiated(token_loss, logp, entropy, rows)
    (loss,) = made_loss(MadeLoss(loss, logp, entropy, grad_logp, grad_entropy))
    return loss, [stats]


def linear_token_loss(
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    labels: Tensor,
    token_loss: TokenLoss,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    logits_dtype: torch.dtype | None = None,
    level: Literal["token", "sequence"] = "token",
    process_group: dist.ProcessGroup | None = None,
    support: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, list]:
    """A loss of the tokens' log-probs, with its gradients made while the logits exist.

    The loss is that of token_loss(*linear_token_logprobs(..., return_entropy=True)). With
    its gradients it takes 6 N V H operations where linear_token_logprobs takes 8.

    Args:
        hidden: As in linear_token_logprobs; differentiable.
        weight: As in linear_token_logprobs; differentiable.
        labels: As in linear_token_logprobs, [...], N in all.
        token_loss: A function (logp, entropy, rows) -> (loss, stats) of the tokens `rows`, int64
            indices into the flattened labels; logp and entropy are [n], of these tokens, and loss
            is 0-d. It is called once a chunk, and its losses must add up over chunks, as all of
            fastpg do: policy_loss(logp, advantages[rows], weight[rows], ...). An ignored token may
            be in rows or not: its weight must be 0. Nothing else that it looks at gets a gradient,
            at any level; a graph of torch.compile, where the loss is differentiated as it stands,
            is the exception.
        bias: As in linear_token_logprobs; differentiable.
        temperature: As in linear_token_logprobs.
        softcap: As in linear_token_logprobs.
        logit_scale: As in linear_token_logprobs.
        ignore_index: As in linear_token_logprobs.
        logits_dtype: As in linear_token_logprobs.
        level: "token", or "sequence" for a loss that needs all tokens at once, such as policy_loss
            with that level. Then token_loss is called once, rows are all of labels, and gradients
            are made in backward. logp and entropy are flat there too, [N]: of labels [B, T],
            policy_loss(logp.view(B, T), advantages, weight, level="sequence"); of packed ones, with
            its cu_seqlens.
        process_group: As in linear_token_logprobs. Every rank must pass a token_loss that computes
            the same: it is evaluated on each, on the same bits.
        support: As in linear_token_logprobs. token_loss is then called once, as for "sequence".

    Returns:
        The loss, 0-d, and the list of the stats that token_loss returned, for merge_stats.

    Raises:
        TypeError: token_loss is not callable, or does not return (0-d tensor, stats).
        ValueError: level is unknown, or the loss has no graph back to logp.
        Exception: All that linear_token_logprobs raises.

    Note:
        The gradients of hidden, weight and bias are held until backward, in fp32 (fp64 for fp64),
        but those of weight and bias in their dtype where one chunk is all. Beside them a chunk
        takes for each token of the vocabulary 2 KiB in bf16 and 1 KiB in fp32, on a GPU 16. A GPU
        is waited for: for the number of rows that are not ignored, and once a chunk for the number
        of those that have a gradient. torch.compile cannot take the gradient of a callable within a
        graph: there every level goes the way of "sequence"; and so it does for fp16, whose
        gradients underflow unless made after a GradScaler has scaled the loss.

    Example:
        >>> hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
        >>> weight, labels = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0])
        >>> def token_loss(logp, entropy, rows):
        ...     return -logp.sum(), None
        >>> loss, stats = fastpg.linear_token_loss(hidden, weight, labels, token_loss)
        >>> loss.backward()
        >>> hidden.grad
        tensor([[-0.2384,  0.2384]])

    Reference:
        Wijmans et al. 2024, "Cut your losses in large-vocabulary language models",
        arXiv:2411.09009. Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989.
    """
    if not callable(token_loss):
        raise TypeError(f"{OP}: token_loss must be callable, got {type(token_loss).__name__}")
    if level not in ("token", "sequence"):
        raise ValueError(f"{OP}: level must be token or sequence, got {level!r}")
    inputs = head_inputs(
        OP,
        hidden,
        weight,
        labels,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        logits_dtype=logits_dtype,
        group=process_group,
    )
    with of_all_ranks(OP, [*as_list(weight), bias], inputs.head):
        return _of_whole_head(inputs, labels, token_loss, level, support)


def _of_whole_head(
    inputs: HeadInputs,
    labels: Tensor,
    token_loss: TokenLoss,
    level: str,
    support: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, list]:
    """What the public function returns."""
    wanted = torch.is_grad_enabled() and not needs_no_gradient(*inputs.head.tensors())
    sets = None
    if support is not None:
        sets = checked_support(OP, support, labels, inputs.group)
    if level == "token" and sets is None and wanted and can_differentiate_early(inputs):
        loss, stats = _linear_token_loss(LossInputs(inputs, token_loss))
        return loss, stats
    return loss_of_all_rows(inputs, sets, token_loss, wanted=wanted)


def can_differentiate_early(x: HeadInputs) -> bool:
    """Whether forward may make the gradients: not in fp16, nor in torch.compile, as Note says."""
    if x.hidden[0].dtype is torch.float16 or torch.compiler.is_compiling():
        return False
    return x.labels.device.type in CHUNK_ROWS  # elsewhere the reference serves
