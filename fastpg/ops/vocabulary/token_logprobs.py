"""Per-token log-probs and entropies from logits, without a softmax in memory.

    z    = softcap(x) / temperature,   softcap(x) = softcap · tanh(x / softcap)
    logp = z_y − logsumexp(z) = (z_y − max z) − log Σ_j exp(z_j − max z)
    H    = −Σ_j p_j log p_j = log Σ_j e^{d_j} − Σ_j e^{d_j} d_j / Σ_j e^{d_j},   d = z − max z

Where the label has the maximum, logp is −log1p(Σ_{j≠y} e^{d_j}): in a sum with its 1 the others
would be rounded away as p_y → 1, and 1 − p_y with them.

    ∂logp/∂z_j = 1[j = y] − p_j          ∂H/∂z_j = −p_j (log p_j + H)

Forward reads the logits once and keeps (max, log Σ e^d) per row; backward reads them once more and
writes their gradient.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ..._autograd import Differentiable
from ..._library import empty_like
from ..common.checks import (
    check_label_values,
    check_labels,
    check_tensors,
    compute_dtype,
    integer,
    label_temperature,
    positive,
)
from .logit_rows import RowSizes, RowsOp, may_overwrite, row_sizes
from .shards import finite_max

OP = "token_logprobs"


class Inputs(NamedTuple):
    """Rows of logits, and the label and the temperature of each."""

    logits: Tensor  # [..., V], any strides
    labels: Tensor  # int64 [...]; ignore_index: the row is not read
    temperature: Tensor  # [...] or [], in the compute dtype: fp32, or fp64 for fp64 logits
    softcap: float  # 0: none
    ignore_index: int
    with_entropy: bool


class Outputs(NamedTuple):
    logp: Tensor  # [...], in the compute dtype
    entropy: Tensor  # [...]; without elements, if it is not wanted
    stats: Tensor  # [2, ...]: max c, with c the logits after softcap, and log Σ e^d of each row


class BackwardInputs(NamedTuple):
    inputs: Inputs  # logits may be a slice of the rows: a label outside of it is nowhere
    grad_logp: Tensor  # [...]
    grad_entropy: Tensor | None  # [...]; None: 0
    entropy: Tensor | None  # [...], of the whole row; None if there is no grad_entropy
    stats: Tensor  # [2, ...], of the whole row


class Gradient(NamedTuple):
    grad_logits: Tensor  # like logits, contiguous


class BackwardOutInputs(NamedTuple):
    backward: BackwardInputs
    out: Tensor  # for the gradient: like logits, contiguous. It may be the logits themselves.


class NoOutputs(NamedTuple):
    """An op that only writes to one of its inputs has no outputs."""


class ScaledRows(NamedTuple):
    """The rows of the reference; one that is ignored counts as zeros."""

    kept: Tensor  # [...]: it is not ignored
    capped: Tensor  # [..., V]: c, the logits after softcap
    top: Tensor  # [...]: the maximum of c
    d: Tensor  # [..., V]: z - max z


def scaled(x: Inputs, top: Tensor | None = None) -> ScaledRows:
    """Brings rows to d = z - max z, where `top`, if it is given, is their maximum."""
    kept = x.labels != x.ignore_index
    capped = torch.where(kept[..., None], x.logits.to(x.temperature.dtype), 0.0)
    if x.softcap:
        capped = x.softcap * torch.tanh(capped / x.softcap)
    if top is None:
        top = capped.amax(-1)
    d = (capped - finite_max(top)[..., None]) / x.temperature[..., None]
    return ScaledRows(kept, capped, top, d)


def reference(x: Inputs) -> Outputs:
    """The specification: the formulas at the top of this page, in fp64."""
    vocab, dtype = x.logits.shape[-1], x.temperature.dtype
    kept, _, top, d = scaled(x._replace(temperature=x.temperature.double()))
    legal = kept & (x.labels >= 0) & (x.labels < vocab)
    check_label_values(OP, x.labels, legal, kept, vocab, x.ignore_index, x.temperature)
    label = torch.where(legal, x.labels, 0)[..., None]
    d_label, e = d.gather(-1, label)[..., 0], d.exp()
    others, total = e.scatter(-1, label, 0.0).sum(-1), e.sum(-1)
    log_sum = torch.where(d_label == 0, others.log1p(), total.log())
    log_sum = torch.where(total == 0, 0.0, log_sum)
    log_sum = torch.where(legal, log_sum, math.nan)  # spoils what a device cannot raise about
    logp = torch.where(kept, d_label - log_sum, 0.0).to(dtype)
    stats = torch.where(kept, torch.stack([top, log_sum]), 0.0).to(dtype)
    if not x.with_entropy:
        return Outputs(logp, logp.new_empty(0), stats)
    weighted = (e * torch.where(e == 0, 0.0, d)).sum(-1)
    entropy = torch.where(total == 0, 0.0, log_sum - weighted / total).clamp(min=0.0)
    return Outputs(logp, torch.where(kept, entropy, 0.0).to(dtype), stats)


def reference_backward(x: BackwardInputs) -> Gradient:
    """The second pair of formulas at the top of this page."""
    inputs = x.inputs
    labels, softcap = inputs.labels, inputs.softcap
    top, log_sum = x.stats
    kept, capped, _, d = scaled(inputs, top)
    logp = d - log_sum[..., None]
    p = logp.exp()
    g = torch.where(kept, x.grad_logp, 0.0)[..., None]
    is_label = torch.arange(capped.shape[-1], device=labels.device) == labels[..., None]
    # 1 - p_y as -expm1(logp_y) keeps its digits as p_y -> 1.
    grad = g * torch.where(is_label, -torch.expm1(logp), -p)
    if x.grad_entropy is not None and x.entropy is not None:
        g = torch.where(kept, x.grad_entropy, 0.0)[..., None]
        grad = grad - g * p * (torch.where(p == 0, 0.0, logp) + x.entropy[..., None])
    grad = torch.where(capped == -math.inf, 0.0, grad)
    if softcap:
        grad = grad * (1 - (capped / softcap) ** 2)
    grad = torch.where(kept[..., None], grad / inputs.temperature[..., None], 0.0)
    return Gradient(grad.to(inputs.logits.dtype).contiguous())


def reference_backward_out(x: BackwardOutInputs) -> NoOutputs:
    """Writes the gradient to `out`."""
    x.out.copy_(reference_backward(x.backward).grad_logits)
    return NoOutputs()


def allocate(x: Inputs) -> Outputs:
    """Makes empty log-probs, entropies and statistics."""
    labels, dtype = x.labels, x.temperature.dtype
    logp = empty_like(labels, dtype)
    entropy = empty_like(logp) if x.with_entropy else logp.new_empty(0)
    return Outputs(logp, entropy, logp.new_empty((2, *labels.shape)))


def allocate_gradient(x: BackwardInputs) -> Gradient:
    """Makes an empty gradient."""
    return Gradient(empty_like(x.inputs.logits))


def allocate_nothing(x: BackwardOutInputs) -> NoOutputs:
    """Makes nothing: `out` is there."""
    return NoOutputs()


def sizes(x: Inputs) -> RowSizes:
    """Tells C++ where each row of addressable logits begins."""
    return row_sizes(x.logits, x.labels, x.temperature)


def backward_sizes(x: BackwardInputs) -> RowSizes:
    """Tells the backward op the same."""
    return sizes(x.inputs)


def backward_out_sizes(x: BackwardOutInputs) -> RowSizes:
    """Tells the backward op the same."""
    return sizes(x.backward.inputs)


token_logprobs_op = RowsOp(
    "token_logprobs",
    Inputs,
    Outputs,
    page=__name__,
    reference=reference,
    allocate=allocate,
    sizes=sizes,
)
token_logprobs_backward_op = RowsOp(
    "token_logprobs_backward",
    BackwardInputs,
    Gradient,
    page=__name__,
    reference=reference_backward,
    allocate=allocate_gradient,
    sizes=backward_sizes,
)
token_logprobs_backward_out_op = RowsOp(
    "token_logprobs_backward_out",
    BackwardOutInputs,
    NoOutputs,
    page=__name__,
    reference=reference_backward_out,
    allocate=allocate_nothing,
    sizes=backward_out_sizes,
    mutates="out",
)


class Saved(NamedTuple):
    """What backward needs."""

    inputs: Inputs
    entropy: Tensor | None  # None: it was not wanted
    stats: Tensor


def _forward(x: Inputs) -> tuple[tuple[Tensor, ...], Saved]:
    logp, entropy, stats = token_logprobs_op(x)
    if x.with_entropy:
        return (logp, entropy), Saved(x, entropy, stats)
    return (logp,), Saved(x, None, stats)


def _backward_inputs(
    x: Saved, grad_logp: Tensor | None, grad_entropy: Tensor | None
) -> BackwardInputs:
    if grad_logp is None:
        grad_logp = torch.zeros_like(x.stats[0])
    return BackwardInputs(x.inputs, grad_logp, grad_entropy, x.entropy, x.stats)


def backward(x: Saved, grad_logp: Tensor | None, grad_entropy: Tensor | None = None) -> Gradient:
    """The gradient of the logits."""
    return token_logprobs_backward_op(_backward_inputs(x, grad_logp, grad_entropy))


def backward_inplace(
    x: Saved, grad_logp: Tensor | None, grad_entropy: Tensor | None = None
) -> Gradient:
    """The same, over the logits."""
    # torch counts that the logits are written to: whoever saved them and needs them later raises,
    # and so does a second backward through here.
    out = x.inputs.logits.detach()
    inputs = _backward_inputs(x, grad_logp, grad_entropy)
    token_logprobs_backward_out_op(BackwardOutInputs(inputs, out))
    return Gradient(out)


differentiable = partial(
    Differentiable, OP, inputs=Inputs, saved=Saved, differentiable=("logits",), forward=_forward
)
_token_logprobs = differentiable(backward=backward)
_token_logprobs_inplace = differentiable(backward=backward_inplace)


def checked_inputs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    with_entropy: bool,
    group: dist.ProcessGroup | None = None,
) -> Inputs:
    """The inputs of the op, from the arguments of the public function."""
    check_tensors(OP, logits=logits, labels=labels)
    if logits.dim() == 0 or (logits.shape[-1] == 0 and group is None):
        raise ValueError(f"{OP}: logits must be [..., V], got {tuple(logits.shape)}")
    check_labels(OP, labels, logits)
    dtype = compute_dtype(OP, logits=logits)
    return Inputs(
        logits=logits,
        labels=labels if labels.dtype is torch.int64 else labels.long(),
        temperature=label_temperature(OP, temperature, dtype, labels),
        softcap=0.0 if softcap is None else positive(OP, "softcap", softcap, dtype),
        ignore_index=integer(OP, "ignore_index", ignore_index),
        with_entropy=bool(with_entropy),
    )


@overload
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
    process_group: dist.ProcessGroup | None = ...,
    inplace_backward: bool = ...,
    support: tuple[Tensor, Tensor] | None = ...,
) -> Tensor: ...


@overload
def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    ignore_index: int = ...,
    return_entropy: Literal[True],
    process_group: dist.ProcessGroup | None = ...,
    inplace_backward: bool = ...,
    support: tuple[Tensor, Tensor] | None = ...,
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    process_group: dist.ProcessGroup | None = None,
    inplace_backward: bool = False,
    support: tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Log-probs of labels under softmax(softcap(logits) / temperature), and the entropy.

    The log-prob of label y is z_y − logsumexp(z) with z = softcap(logits) / temperature, and the
    entropy is −Σ_j p_j log p_j with p = softmax(z). The logits are read once, and once more for the
    gradient; no softmax is held in memory.

    Args:
        logits: [..., V], bf16, fp16, fp32 or fp64, with any strides; differentiable. A -inf logit
            has probability 0 (softcap makes it an ordinary one). NaN makes its own row NaN.
        labels: [...], integers in [0, V), or ignore_index.
        temperature: A number > 0, or a tensor that broadcasts to labels, or [..., 1]; a constant.
        softcap: A number > 0: a logit x becomes softcap · tanh(x / softcap), as in Gemma. None: x.
        ignore_index: A row with this label is not read; its results and its gradient are 0.
        return_entropy: Whether to return the entropy, which comes from the same pass and is
            differentiable.
        process_group: If given, the vocabulary is in shards, one on each rank in turn: logits are
            [..., V_rank], labels count in the whole vocabulary and are the same on each rank. Each
            rank gets the same results, and the gradient of its shard.
        inplace_backward: Whether backward may write the gradient over the logits, which then must
            be contiguous and no leaf of the graph: half the memory. Whatever else needs their
            values in a later backward raises, a second backward through this op too. They stay
            where no gradient is wanted, in torch.compile, whose own matter this is, and in a
            checkpoint or under other hooks of saved tensors.
        support: A pair (token_ids, offsets), the tokens that a sampler kept in each row, flat and
            in the CSR form: row n keeps token_ids[offsets[n]:offsets[n + 1]], integers that rise.
            The softmax is then over what is kept, and nothing else is read. A label outside its set
            has log-prob -inf and no gradient; an empty set means the whole vocabulary. A GPU is
            waited for. It goes with neither process_group nor inplace_backward.

    Returns:
        logp [...], or (logp, entropy), each [...], in nats; fp32, or fp64 for fp64 logits.

    Raises:
        TypeError: logits or labels are no tensors, or have a dtype that they cannot have.
        ValueError: A shape, a device, temperature or softcap does not fit, or logits cannot be
            overwritten; the message names it.
        IndexError: A label is outside [0, V) and not ignore_index. Only the CPU raises at once;
            elsewhere the row of such a label is NaN, and `fastpg.check()` raises.

    Example:
        >>> logits, labels = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([0, 2])
        >>> fastpg.token_logprobs(logits, labels)
        tensor([-0.4076, -1.0986])
        >>> logp, entropy = fastpg.token_logprobs(logits, labels, return_entropy=True)
        >>> entropy
        tensor([0.8324, 1.0986])

    Reference:
        Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", arXiv:1805.02867.
    """
    inputs = checked_inputs(
        logits,
        labels,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        with_entropy=return_entropy,
        group=process_group,
    )
    inplace = inplace_backward and may_overwrite(OP, "inplace_backward", logits)
    results: tuple[Tensor, ...]
    if support is not None:
        from .token_support import logprobs  # it is made of this page

        results = logprobs(inputs, support, process_group, inplace=inplace_backward)
    elif process_group is not None:
        from .logit_shards import logprobs_of_shard  # and so is it

        results = logprobs_of_shard(inputs, process_group, inplace=inplace)
    else:
        results = _token_logprobs_inplace(inputs) if inplace else _token_logprobs(inputs)
    return results if return_entropy else results[0]
