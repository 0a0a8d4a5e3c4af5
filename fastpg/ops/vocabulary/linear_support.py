"""Log-probs and entropies over kept sets, from hidden states and the LM head.

`support.py` has the formulas. Only what a set keeps is multiplied: with K tokens in each set, these
are 2 N K H operations for the logits of the entries, which are kept for backward, and as many for

    dhidden_n = Σ_e g_e weight[token_e],   dweight_v = Σ_e g_e hidden_{row_e},   dbias_v = Σ_e g_e

with the entries e of row n, and those of token v: sorted by token once, so that the sum has an
order. Rows of an empty set go through linear_rows.py.

The products are not what takes the time. On a CPU with N=2048, H=576, V=49152 in fp32, of 170 ms of
one core for the three at K=32 some 135 are for dweight, whose [V, H] have to be written whatever K
is: 85 to take their memory from the system alone, which the dense op does too. At K=512 the three
take as long as what is done per entry around them: the softmax in fp64, and the sort by token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._autograd import Differentiable
from ..._library import kernels
from ..._op import Op
from . import linear_rows, linear_rows_blas
from . import token_logprobs as page
from .head import filled, reached
from .head_arguments import HeadInputs
from .linear_rows import OP, Gradients, allocate_gradients
from .sparse_products import (
    SampledInputs,
    SparseInputs,
    lengths,
    sampled_product_op,
    segment_sum,
    sparse_product_op,
)
from .support import (
    Entries,
    RowOptions,
    Support,
    check_support_values,
    entries_of,
    kept_gradient,
    kept_softmax,
    mask_of,
    masked_logits,
)


class Inputs(NamedTuple):
    rows: linear_rows.Inputs
    support: Support

    @property
    def options(self) -> RowOptions:
        """What the softmax needs."""
        return RowOptions(self.rows.labels, self.rows.temperature, self.rows.softcap)


class Outputs(NamedTuple):
    logp: Tensor  # [N], in the compute dtype, as all that follow
    entropy: Tensor  # [N]
    stats: Tensor  # [2, N], those of linear_rows in rows of an empty set, else 0
    logits: Tensor  # [E], of the entries; 0 in rows that are ignored


class BackwardInputs(NamedTuple):
    inputs: Inputs
    grad_logp: Tensor  # [N]
    grad_entropy: Tensor | None  # [N]; None: 0
    entropy: Tensor  # [N]
    stats: Tensor  # [2, N]
    logits: Tensor  # [E]
    wanted: list[bool]  # whether to make the gradient of each hidden, each head_weight and bias


def masked_rows(x: Inputs) -> page.Inputs:
    """All logits, after softcap, with -inf for what is not kept, as token_logprobs takes them."""
    rows = x.rows
    check_support_values(OP, x.support, len(rows.head_weight[0]))
    kept = (rows.labels != rows.ignore_index)[:, None]
    hidden = [torch.where(kept, h, 0.0) for h in rows.hidden]
    logits = linear_rows.logits_of(rows._replace(hidden=hidden)).to(rows.temperature.dtype)
    masked = masked_logits(logits, rows.softcap, x.support)
    return linear_rows.rows_of(rows, masked, rows.labels)._replace(softcap=0.0)


def reference(x: Inputs) -> Outputs:
    """The specification: token_logprobs of all logits, with -inf for what is not kept."""
    linear_rows.checked_labels(x.rows)
    logp, entropy, stats = page.reference(masked_rows(x))
    return Outputs(logp.clamp(max=0.0), entropy, stats, logp.new_zeros(len(x.support.token_ids)))


def reference_backward(x: BackwardInputs) -> Gradients:
    """The specification: the gradient of all logits, and the products with it."""
    inputs = x.inputs
    rows = masked_rows(inputs)
    kept = (inputs.rows.labels != inputs.rows.ignore_index)[:, None]
    hidden = [torch.where(kept, h, 0.0) for h in inputs.rows.hidden]
    label = torch.where(kept[:, 0], inputs.rows.labels, 0)[:, None]
    outside = rows.logits.gather(1, label)[:, 0] == -torch.inf
    outside &= ~mask_of(inputs.support, rows.logits.shape[1]).gather(1, label)[:, 0]
    grad_logp = torch.where(outside, 0.0, x.grad_logp)
    _, entropy, stats = page.reference(rows)
    upstream = page.BackwardInputs(rows, grad_logp, x.grad_entropy, entropy, stats)
    g = page.reference_backward(upstream).grad_logits
    if inputs.rows.softcap:
        g = torch.where(g == 0, 0.0, g * (1 - (rows.logits / inputs.rows.softcap) ** 2))
    products = linear_rows.products_with(g, hidden, inputs.rows.head_weight)
    return linear_rows.rounded(products, inputs.rows, x.wanted)


def logits_of_entries(x: Inputs, entries: Entries) -> Tensor:
    """The logits [E'], rounded as a model's own head rounds them, in the compute dtype."""
    total = None
    for hidden, weight in zip(x.rows.hidden, x.rows.head_weight, strict=True):
        inputs = SampledInputs(hidden, weight, entries.token_ids, entries.offsets)
        (part,) = sampled_product_op(inputs)
        if total is not None:
            part = total + part
        elif x.rows.bias is not None:
            part = part + x.rows.bias[entries.token_ids]
        total = part.to(x.rows.logits_dtype).to(part.dtype)
    assert total is not None  # A head has a product at least.
    return total


def forward(x: Inputs) -> Outputs:
    """The kernel: products with what is kept alone."""
    kept, legal, _ = linear_rows.checked_labels(x.rows)
    check_support_values(OP, x.support, len(x.rows.head_weight[0]))
    entries = entries_of(x.support, kept)
    logits = logits_of_entries(x, entries)
    found = kept_softmax(logits, entries, x.options)
    dtype = x.rows.temperature.dtype
    logp, entropy = (
        torch.where(kept, torch.where(legal, value, torch.nan), 0.0).to(dtype)
        for value in (found.logp, found.entropy)
    )
    stats = logp.new_zeros(2, len(logp))
    whole = (kept & (lengths(x.support.offsets) == 0)).nonzero()[:, 0]
    if len(whole):
        dense = linear_rows_blas.forward(rows_at(x, whole))
        logp[whole], entropy[whole], stats[:, whole] = dense.logp, dense.entropy, dense.stats
    return Outputs(logp, entropy, stats, filled(entries.places, len(x.support.token_ids), logits))


def rows_at(x: Inputs, places: Tensor) -> linear_rows.Inputs:
    """Some rows, over the whole vocabulary."""
    t = x.rows.temperature
    return x.rows._replace(
        hidden=[hidden[places] for hidden in x.rows.hidden],
        labels=x.rows.labels[places],
        temperature=t if t.dim() == 0 else t[places],
    )


def backward(x: BackwardInputs) -> Gradients:
    """The kernel: entries of rows that no gradient reaches go through no product."""
    inputs = x.inputs
    live = (inputs.rows.labels != inputs.rows.ignore_index) & reached(x.grad_logp, x.grad_entropy)
    entries = entries_of(inputs.support, live)
    found = kept_softmax(x.logits[entries.places], entries, inputs.options)
    g = kept_gradient(found, entries, inputs.options, x.grad_logp, x.grad_entropy)
    gradients = gradients_of_entries(inputs, entries, g.to(x.logits.dtype), x.wanted)
    whole = (live & (lengths(inputs.support.offsets) == 0)).nonzero()[:, 0]
    if len(whole):
        add_whole_rows(gradients, x, whole)
    return Gradients(gradients)


def gradients_of_entries(
    x: Inputs, entries: Entries, g: Tensor, wanted: list[bool]
) -> list[Tensor]:
    """The gradients that are wanted, from the gradient g [E'] of the logits of the entries."""
    terms = len(x.rows.hidden)
    found = [x.rows.hidden[0].new_empty(0) for _ in wanted]
    for i in range(terms):
        if wanted[i]:
            inputs = SparseInputs(x.rows.head_weight[i], g, entries.token_ids, entries.offsets)
            found[i] = sparse_product_op(inputs).sums
    if not any(wanted[terms:]):
        return found
    order = torch.argsort(entries.token_ids.int(), stable=True)  # twice as fast as of int64
    counts = torch.bincount(entries.token_ids, minlength=len(x.rows.head_weight[0]))
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    rows, g = entries.rows[order], g[order]
    for i in range(terms):
        if wanted[terms + i]:
            inputs = SparseInputs(x.rows.hidden[i], g, rows, offsets)
            found[terms + i] = sparse_product_op(inputs).sums
    if wanted[-1]:
        found[-1] = segment_sum(g, offsets).to(found[-1].dtype)
    return found


def add_whole_rows(gradients: list[Tensor], x: BackwardInputs, places: Tensor) -> None:
    """Adds the gradients of rows whose set is the whole vocabulary."""
    terms = len(x.inputs.rows.hidden)
    (dense,) = linear_rows_blas.backward(
        linear_rows.BackwardInputs(
            rows_at(x.inputs, places),
            x.grad_logp[places],
            None if x.grad_entropy is None else x.grad_entropy[places],
            x.entropy[places],
            x.stats[:, places],
            x.wanted,
        )
    )
    for i, want in enumerate(x.wanted):
        if want and i < terms:
            gradients[i][places] = dense[i]
        elif want:
            gradients[i] += dense[i]


def allocate(x: Inputs) -> Outputs:
    """Makes empty log-probs, entropies, statistics and logits."""
    like, shape = x.rows.temperature, x.rows.labels.shape
    stats, logits = like.new_empty(2, *shape), like.new_empty(x.support.token_ids.shape)
    return Outputs(like.new_empty(shape), like.new_empty(shape), stats, logits)


def allocate_backward(x: BackwardInputs) -> Gradients:
    """Makes empty gradients."""
    rows = x.inputs.rows
    return allocate_gradients(
        linear_rows.BackwardInputs(rows, x.grad_logp, x.grad_entropy, x.entropy, x.stats, x.wanted)
    )


linear_support_op = Op(
    "linear_token_logprobs_support",
    Inputs,
    Outputs,
    page=__name__,
    reference=reference,
    allocate=allocate,
)
linear_support_backward_op = Op(
    "linear_token_logprobs_support_backward",
    BackwardInputs,
    Gradients,
    page=__name__,
    reference=reference_backward,
    allocate=allocate_backward,
)
# On a CPU the two products are C++, where it was built.
for device in ("CPU", "CUDA"):
    label = "C++" if kernels["sampled_product"][device] == "C++" else "PyTorch"
    linear_support_op.attach(device, label, forward)
    linear_support_backward_op.attach(device, label, backward)


class Saved(NamedTuple):
    """What backward needs."""

    inputs: Inputs
    entropy: Tensor
    stats: Tensor
    logits: Tensor


def _forward(x: Inputs) -> tuple[tuple[Tensor, Tensor], Saved]:
    logp, entropy, stats, logits = linear_support_op(x)
    return (logp, entropy), Saved(x, entropy, stats, logits)


def _backward(
    x: Saved, grad_logp: Tensor | None, grad_entropy: Tensor | None, *, wanted: list[bool]
) -> tuple[list[Tensor | None]]:
    if grad_logp is None:
        grad_logp = torch.zeros_like(x.entropy)
    (found,) = linear_support_backward_op(
        BackwardInputs(x.inputs, grad_logp, grad_entropy, x.entropy, x.stats, x.logits, wanted)
    )
    return ([grad if want else None for grad, want in zip(found, wanted, strict=True)],)


_linear_support = Differentiable(
    OP,
    inputs=Inputs,
    saved=Saved,
    differentiable=("hidden", "head_weight", "bias"),
    forward=_forward,
    backward=_backward,
    selective=True,
)


def logprobs(x: HeadInputs, support: Support) -> tuple[Tensor, Tensor]:
    """The log-prob and the entropy [N] of each row over its kept set."""
    rows = linear_rows.inputs_of(x, x.labels, x.ignore_index)
    logp, entropy = _linear_support(Inputs(rows, support))
    return logp, entropy
