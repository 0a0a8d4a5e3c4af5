"""Per-token log-probs and entropies from hidden states and the LM head: no logits in memory.

    x = hidden @ weightᵀ + bias,   z = softcap(s x) / T,   s = logit_scale

and from z on as in token_logprobs.py. There s is part of the others, z = softcap'(x) / T' with
softcap' = softcap / s and T' = T / s: it costs nothing and rounds nothing.

Forward walks the vocabulary in slices: the logits of a slice by BLAS, into a buffer that the next
one overwrites; its statistics by token_logprobs; and those of the slices merge to the row's.
Backward knows the row's and walks again: logits, turned in place into their gradient g, and then

    dhidden += g @ weight_slice,   dweight_slice = gᵀ @ hidden,   dbias_slice = Σ g

so that only dhidden is a sum over slices; it is kept in fp32. That is 8 N V H operations where
eager, which keeps the logits, takes 6. Ignored rows, and backward those that no gradient reaches,
are left out of every product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._library import define, kernel
from . import token_logprobs as page
from ._checks import (
    check_label_values,
    check_tensors,
    compute_dtype,
    constant,
    label_temperature,
    positive,
)
from ._head import (
    NEVER,
    add_product,
    autocast,
    check_head,
    dtype_of_logits,
    filled,
    finite,
    kept_rows,
    logits_of_slices,
    statistics,
)  # fmt: skip
from .token_logprobs import _backward_out

OP = "linear_token_logprobs"


def _logits(hidden, weight, bias, logits_dtype):
    """[N, V], as a model's own head makes them; the specification of what kernels do in slices."""
    operands = (x if x is None else x.to(logits_dtype) for x in (hidden, weight, bias))
    return torch.nn.functional.linear(*operands)


def reference(hidden, weight, bias, labels, temperature, softcap, ignore_index, logits_dtype):
    """hidden [N, H], weight [V, H], labels [N] -> logp [N], entropy [N], stats [2, N]."""
    _kept(labels, weight, ignore_index, temperature)
    logits = _logits(hidden, weight, bias, logits_dtype)
    return page.reference(logits, labels, temperature, softcap, ignore_index)


def reference_backward(
    grad_logp, grad_entropy, entropy, stats, hidden, weight, bias, labels, temperature, softcap,
    ignore_index, logits_dtype, wanted,
):  # fmt: skip
    """dL/dhidden, dL/dweight, dL/dbias in the dtype of hidden; one that is not wanted is empty."""
    hidden = torch.where((labels != ignore_index)[:, None], hidden, 0.0)
    logits = _logits(hidden, weight, bias, logits_dtype)
    rows = logits, labels, temperature, softcap, ignore_index
    g = page.reference_backward(grad_logp, grad_entropy, entropy, stats, *rows)
    g = g.to(hidden.dtype).to(temperature.dtype)
    dhidden = g @ weight.to(g.dtype) if wanted[0] else g.new_empty(0)
    dweight = g.T @ hidden.to(g.dtype) if wanted[1] else g.new_empty(0)
    dbias = g.sum(0) if wanted[2] else g.new_empty(0)
    return tuple(x.to(hidden.dtype) for x in (dhidden, dweight, dbias))


_HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor temperature, "
    "float softcap, int ignore_index, ScalarType logits_dtype"
)


def _fake(hidden, weight, bias, labels, temperature, *_):
    shapes = labels.shape, labels.shape, (2, *labels.shape)
    return tuple(labels.new_empty(shape, dtype=temperature.dtype) for shape in shapes)


def _fake_backward(*args):
    hidden, weight, wanted = *args[4:6], args[-1]
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    pairs = zip(shapes, wanted, strict=True)
    return tuple(hidden.new_empty(shape if want else 0) for shape, want in pairs)


_forward = define(
    f"linear_token_logprobs({_HEAD}) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference,
)
_backward = define(
    "linear_token_logprobs_backward(Tensor grad_logp, Tensor? grad_entropy, Tensor entropy, "
    f"Tensor stats, {_HEAD}, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    reference=reference_backward,
)


def _kept(labels, weight, ignore_index, temperature):
    """Where rows count, and where their labels are tokens. On the CPU bad values raise."""
    kept = labels != ignore_index
    legal = kept & (labels >= 0) & (labels < len(weight))
    check_label_values(OP, labels, legal, kept, len(weight), ignore_index, temperature)
    return kept, legal


def _forward_by_slices(hidden, weight, bias, labels, temperature, softcap, ignore_index, dtype):
    kept, legal = _kept(labels, weight, ignore_index, temperature)
    count = len(labels)
    rows, inputs = kept_rows(kept, hidden, labels, temperature, legal)
    hidden, labels, temperature, legal = inputs
    head = hidden, weight, bias, labels, temperature, softcap, dtype
    label_logit, top, log_sum, entropy = statistics(*head)
    log_sum = torch.where(legal, log_sum, math.nan)  # spoils what a device cannot raise about
    logp = (label_logit - finite(top)) / temperature - log_sum
    entropy = torch.where(legal, entropy, math.nan)
    logp, entropy, top, log_sum = (
        filled(rows, count, x) for x in (logp, entropy, top, log_sum)
    )  # fmt: skip
    return logp, entropy, torch.stack([top, log_sum])


def _backward_by_slices(
    grad_logp, grad_entropy, entropy, stats, hidden, weight, bias, labels, temperature, softcap,
    ignore_index, dtype, wanted,
):  # fmt: skip
    count, reached = len(labels), grad_logp != 0
    if grad_entropy is not None:
        reached = reached | (grad_entropy != 0)
    per_row = grad_logp, grad_entropy, entropy, *stats, hidden, labels, temperature
    rows, per_row = kept_rows(reached & (labels != ignore_index), *per_row)
    *upstream, top, log_sum, hidden, labels, temperature = per_row
    upstream.append(torch.stack([top, log_sum]))
    dhidden = temperature.new_zeros(hidden.shape) if wanted[0] else None
    dweight = weight.new_empty(weight.shape if wanted[1] else 0)
    dbias = weight.new_empty(len(weight) if wanted[2] else 0)
    for begin, end, x in logits_of_slices(hidden, weight, bias, dtype):
        _backward_out(x, *upstream, x, labels - begin, temperature, softcap, NEVER)
        g = x.to(hidden.dtype)
        if wanted[0]:
            add_product(dhidden, g, weight[begin:end])
        if wanted[1]:
            torch.mm(g.t(), hidden, out=dweight[begin:end])
        if wanted[2]:
            dbias[begin:end] = g.sum(0, dtype=temperature.dtype)
    if not wanted[0]:
        return hidden.new_empty(0), dweight, dbias
    return filled(rows, count, dhidden.to(hidden.dtype)), dweight, dbias


for device in ("CPU", "CUDA"):
    kernel(_forward, device, "BLAS")(_forward_by_slices)
    kernel(_backward, device, "BLAS")(_backward_by_slices)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        logp, entropy, stats = _forward(*args)
        ctx.save_for_backward(entropy, stats, *args[:5])
        ctx.options = args[5:]
        ctx.set_materialize_grads(False)  # an entropy that is only looked at costs nothing
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        entropy, stats, *head = ctx.saved_tensors
        if grad_logp is None:
            grad_logp = torch.zeros_like(entropy)
        wanted = list(ctx.needs_input_grad[:3])
        args = grad_logp, grad_entropy, entropy, stats, *head, *ctx.options, wanted
        grads = (x if want else None for x, want in zip(_backward(*args), wanted, strict=True))
        return *grads, None, None, None, None, None


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    logits_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """token_logprobs(hidden @ weight.T + bias, labels, ...) without the logits [..., V].

    hidden: [..., H], bf16, fp16, fp32 or fp64; weight: [V, H]; bias: [V]; of one dtype, each
        differentiable. Under autocast they are cast as for a linear layer.
    labels: [...] integers in [0, V), or ignore_index: outputs and gradient 0, row not read.
    temperature: a float, or a tensor that broadcasts to labels (constant: it gets no gradient).
    logit_scale, softcap: z = softcap(logit_scale * logits) / temperature, softcap as in Gemma.
    logits_dtype: None rounds logits to the dtype of hidden, as a model's own head does; fp32 keeps
        those of bf16 and fp16 operands (on a CPU by products in fp32, which take twice the time).
    Returns logp [...], or (logp, entropy) each [...], in nats; fp32 (fp64 for fp64 hidden).

    -inf, NaN and bad labels are treated as by token_logprobs. On a GPU the call waits for the
    number of rows that are not ignored, and backward for that of those that a gradient reaches.
    """
    check_tensors(OP, hidden=hidden, weight=weight, labels=labels)
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_head(OP, hidden, weight, labels, bias)
    dtype = compute_dtype(OP, hidden=hidden)
    scale = positive(OP, "logit_scale", logit_scale, dtype)
    t = label_temperature(OP, temperature, dtype, labels) / scale
    cap = 0.0 if softcap is None else positive(OP, "softcap", softcap, dtype) / scale
    shape, kind = labels.shape, dtype_of_logits(OP, logits_dtype, hidden.dtype)
    rows = hidden.reshape(-1, hidden.shape[-1]), labels.long().reshape(-1)
    args = rows[0], weight, bias, rows[1], t.reshape(-1) if t.dim() else t, cap, ignore_index, kind
    op = _forward if constant(hidden, weight, bias) else _LinearTokenLogprobs.apply
    logp, entropy = (x.view(shape) for x in op(*args)[:2])
    return (logp, entropy) if return_entropy else logp
