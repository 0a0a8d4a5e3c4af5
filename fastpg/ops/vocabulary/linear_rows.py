"""Per-token log-probs and entropies from hidden states and the LM head: no logits in memory.

    x = Σ_i hidden_i @ weight_iᵀ + bias,   z = softcap(s x) / T,   s = logit_scale

and from z on as in token_logprobs.py. There s is part of the others, z = softcap'(x) / T' with
softcap' = softcap / s and T' = T / s: it costs nothing and rounds nothing. A plain head is one
product; with a LoRA adapter it is two, (h, s h Aᵀ) and (W, B).

Forward walks the vocabulary in slices: the logits of a slice by BLAS, into a buffer that the next
one overwrites; its statistics by token_logprobs; and those of the slices merge to the row's.
Backward knows the row's and walks again: logits, turned in place into their gradient g, and then

    dhidden += g @ weight_slice,   dweight_slice = gᵀ @ hidden,   dbias_slice = Σ g

so that only dhidden is a sum over slices; it is kept in fp32. That is 8 N V H operations where
eager, which keeps the logits, takes 6. Ignored rows, and backward those that no gradient reaches,
are left out of every product. Rows beyond a few thousand go through a slice in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..._autograd import Differentiable
from ..._op import Op
from . import token_logprobs as page
from .head import Head
from .head_arguments import HeadInputs, legal_labels
from .shards import (
    NEVER,
    LocalLabels,
    Shard,
    Statistics,
    add_over_ranks,
    label_logit,
    over_all_ranks,
    with_bits_of_maximum,
)

OP = "linear_token_logprobs"


class Inputs(NamedTuple):
    """The fields of HeadInputs but for the group, which no operator of torch can take."""

    hidden: list[Tensor]  # [N, H_i] each
    head_weight: list[Tensor]  # [V, H_i] each, like hidden
    bias: Tensor | None  # [V], like hidden
    labels: Tensor  # int64 [N]
    temperature: Tensor  # [N] or [], in the compute dtype
    softcap: float  # 0: none
    ignore_index: int
    logits_dtype: torch.dtype

    @property
    def head(self) -> Head:
        """What makes the logits."""
        return Head(self.hidden, self.head_weight, self.bias)


class Outputs(NamedTuple):
    logp: Tensor  # [N], in the compute dtype, as all that follow
    entropy: Tensor  # [N]
    stats: Tensor  # [2, N], those of token_logprobs


class PartOutputs(NamedTuple):
    """The fields of Statistics, for a head that is a part of the vocabulary's."""

    label_logit: Tensor  # [N]
    top: Tensor  # [N]
    log_sum: Tensor  # [N]
    entropy: Tensor  # [N]


class BackwardInputs(NamedTuple):
    inputs: Inputs
    grad_logp: Tensor  # [N]
    grad_entropy: Tensor | None  # [N]; None: 0
    entropy: Tensor  # [N], of the whole vocabulary
    stats: Tensor  # [2, N], of the whole vocabulary
    wanted: list[bool]  # whether to make the gradient of each hidden, each head_weight and bias


class Gradients(NamedTuple):
    gradients: list[Tensor]  # like each hidden, each head_weight and bias; empty if not wanted


def logits_of(x: Inputs) -> Tensor:
    """The logits [N, V] as a model's own head makes them; kernels make them in tiles."""
    hidden = [h.to(x.logits_dtype) for h in x.hidden]
    head_weight = [w.to(x.logits_dtype) for w in x.head_weight]
    bias = None if x.bias is None else x.bias.to(x.logits_dtype)
    logits = torch.nn.functional.linear(hidden[0], head_weight[0], bias)
    for h, w in zip(hidden[1:], head_weight[1:], strict=True):
        logits = torch.addmm(logits, h, w.t())  # rounded when it is added, not before
    return logits


def rows_of(x: Inputs, logits: Tensor, labels: Tensor) -> page.Inputs:
    """What token_logprobs is given."""
    return page.Inputs(logits, labels, x.temperature, x.softcap, x.ignore_index, with_entropy=True)


def checked_labels(x: Inputs) -> LocalLabels:
    """What is known of the labels; raises for a bad one, and for a bad temperature."""
    return legal_labels(OP, x.labels, len(x.head_weight[0]), x.temperature, x.ignore_index)


def reference(x: Inputs) -> Outputs:
    """The specification: token_logprobs of all the logits."""
    checked_labels(x)
    rows = page.reference(rows_of(x, logits_of(x), x.labels))
    return Outputs(rows.logp, rows.entropy, rows.stats)


def reference_part(x: Inputs) -> PartOutputs:
    """The statistics of rows over a part of the vocabulary, where a label may be elsewhere."""
    logits = logits_of(x)
    # Where the label is elsewhere, any other stands in for it: its log-prob is not used.
    here = (x.labels >= 0) & (x.labels < logits.shape[-1]) | (x.labels == x.ignore_index)
    part = page.reference(rows_of(x, logits, torch.where(here, x.labels, 0)))
    found = label_logit(logits, x.labels, part.stats.dtype, x.softcap)
    found = with_bits_of_maximum(found, here & (x.labels != x.ignore_index), part)
    top, log_sum = part.stats
    return PartOutputs(found, top.clone(), log_sum.clone(), part.entropy)


def products_with(g: Tensor, hidden: list[Tensor], head_weight: list[Tensor]) -> list[Tensor]:
    """The gradients of each hidden, each head_weight and bias, from that of the logits [N, V]."""
    found = [g @ w.to(g.dtype) for w in head_weight]
    found += [g.T @ h.to(g.dtype) for h in hidden]
    return [*found, g.sum(0)]


def products_of_rows(x: Inputs, kept: Tensor, gradient: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The products with the gradient of rows [N], in the compute dtype; only kept rows are read.

    `gradient` takes all the logits, and returns their gradient.
    """
    hidden = [torch.where(kept[:, None], h, 0.0) for h in x.hidden]
    logits = logits_of(x._replace(hidden=hidden))
    g = gradient(logits).to(hidden[0].dtype).to(x.temperature.dtype)
    return products_with(g, hidden, x.head_weight)


def reference_products(x: BackwardInputs) -> list[Tensor]:
    """The products with the gradient that token_logprobs gives the logits."""

    def gradient(logits: Tensor) -> Tensor:
        rows = rows_of(x.inputs, logits, x.inputs.labels)
        upstream = page.BackwardInputs(rows, x.grad_logp, x.grad_entropy, x.entropy, x.stats)
        return page.reference_backward(upstream).grad_logits

    return products_of_rows(x.inputs, x.inputs.labels != x.inputs.ignore_index, gradient)


def rounded(products: list[Tensor], x: Inputs, wanted: list[bool]) -> Gradients:
    """The gradients that are wanted, in the dtype of hidden, from these products."""
    dtype = x.hidden[0].dtype
    return Gradients(
        [
            grad.to(dtype) if want else grad.new_empty(0, dtype=dtype)
            for grad, want in zip(products, wanted, strict=True)
        ]
    )


def reference_backward(x: BackwardInputs) -> Gradients:
    """The specification: the products with the gradient of all the logits, rounded once."""
    return rounded(reference_products(x), x.inputs, x.wanted)


def allocate(x: Inputs) -> Outputs:
    """Makes empty log-probs, entropies and statistics."""
    shape = x.labels.shape
    logp, entropy = x.temperature.new_empty(shape), x.temperature.new_empty(shape)
    return Outputs(logp, entropy, x.temperature.new_empty(2, *shape))


def allocate_part(x: Inputs) -> PartOutputs:
    """Makes empty statistics."""
    empty = [x.temperature.new_empty(x.labels.shape) for _ in PartOutputs._fields]
    return PartOutputs._make(empty)


def allocate_wanted(x: Inputs, wanted: list[bool]) -> Gradients:
    """Makes empty gradients, of those that are wanted."""
    shapes = [tensor.shape for tensor in [*x.hidden, *x.head_weight]]
    shapes.append(x.head_weight[0].shape[:1])  # that of bias, which may be absent
    return Gradients(
        [
            x.head_weight[0].new_empty(shape if want else 0)
            for shape, want in zip(shapes, wanted, strict=True)
        ]
    )


def allocate_gradients(x: BackwardInputs) -> Gradients:
    """Makes empty gradients."""
    return allocate_wanted(x.inputs, x.wanted)


linear_token_logprobs_op = Op(
    "linear_token_logprobs",
    Inputs,
    Outputs,
    page=__name__,
    reference=reference,
    allocate=allocate,
)
linear_token_logprobs_part_op = Op(
    "linear_token_logprobs_part",
    Inputs,
    PartOutputs,
    page=__name__,
    reference=reference_part,
    allocate=allocate_part,
)
linear_token_logprobs_backward_op = Op(
    "linear_token_logprobs_backward",
    BackwardInputs,
    Gradients,
    page=__name__,
    reference=reference_backward,
    allocate=allocate_gradients,
)


def attach_blas(op: Op, name: str) -> None:
    """Attaches a function of `<page>_blas`, which imports the op's page, to an op."""

    @cache
    def function() -> Callable:
        return getattr(import_module(f"{op.page}_blas"), name)

    op.attach_everywhere("BLAS", lambda x: function()(x))


attach_blas(linear_token_logprobs_op, "forward")
attach_blas(linear_token_logprobs_part_op, "part")
attach_blas(linear_token_logprobs_backward_op, "backward")


class Saved(NamedTuple):
    """What backward needs."""

    inputs: Inputs
    entropy: Tensor
    stats: Tensor
    group: dist.ProcessGroup | None


def inputs_of(x: HeadInputs, labels: Tensor, ignore_index: int) -> Inputs:
    """The inputs of the op, with labels as those of this rank's shard."""
    head = x.hidden, x.head_weight, x.bias
    return Inputs(*head, labels, x.temperature, x.softcap, ignore_index, x.logits_dtype)


def _forward(x: HeadInputs) -> tuple[tuple[Tensor, Tensor], Saved]:
    if x.group is not None:
        return _forward_of_shard(x, x.group)
    inputs = inputs_of(x, x.labels, x.ignore_index)
    logp, entropy, stats = linear_token_logprobs_op(inputs)
    return (logp, entropy), Saved(inputs, entropy, stats, None)


def _forward_of_shard(
    x: HeadInputs, group: dist.ProcessGroup
) -> tuple[tuple[Tensor, Tensor], Saved]:
    """The results for whole rows. To backward this shard is a head of its own."""

    def statistics(labels: Tensor) -> Statistics:
        part = linear_token_logprobs_part_op(inputs_of(x, labels, NEVER))
        return Statistics(part.label_logit, part.top, part.log_sum, part.entropy)

    size = len(x.head_weight[0])
    shard = Shard(OP, group, size, x.labels, x.temperature, x.ignore_index)
    (logp, entropy, stats), local = over_all_ranks(shard, statistics)
    assert entropy is not None  # `statistics` has one
    return (logp, entropy), Saved(inputs_of(x, local, NEVER), entropy, stats, group)


def backward(
    x: Saved, grad_logp: Tensor | None, grad_entropy: Tensor | None, *, wanted: list[bool]
) -> tuple[list[Tensor | None]]:
    """The gradients of each hidden, each head_weight and bias."""
    if grad_logp is None:
        grad_logp = torch.zeros_like(x.entropy)
    (found,) = linear_token_logprobs_backward_op(
        BackwardInputs(x.inputs, grad_logp, grad_entropy, x.entropy, x.stats, wanted)
    )
    grads = [grad if want else None for grad, want in zip(found, wanted, strict=True)]
    if x.group is not None:  # every rank has hidden, and a part of its gradient
        for i in range(len(x.inputs.hidden)):
            if wanted[i]:
                grads[i] = add_over_ranks(found[i], x.group, x.entropy.dtype)
    return (grads,)


_linear_token_logprobs = Differentiable(
    OP,
    inputs=HeadInputs,
    saved=Saved,
    differentiable=("hidden", "head_weight", "bias"),
    forward=_forward,
    backward=backward,
    selective=True,
)


def logprobs(x: HeadInputs) -> tuple[Tensor, Tensor]:
    """The log-prob and the entropy [N] of each row."""
    logp, entropy = _linear_token_logprobs(x)
    return logp, entropy
