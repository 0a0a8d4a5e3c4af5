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

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..._library import define, kernel
from ..common.autograd import once_differentiable
from ..common.checks import constant
from . import linear_token_logprobs_blas as blas
from . import token_logprobs as page
from .head import Factors
from .head_arguments import head_arguments, legal_labels
from .shards import NEVER, Shard, Statistics, add_over_ranks, label_logit, over_all_ranks

OP = "linear_token_logprobs"


def _logits(hidden, weight, bias, logits_dtype):
    """[N, V], as a model's own head makes them; the specification of what kernels do in tiles."""
    hidden, weight = ([x.to(logits_dtype) for x in terms] for terms in (hidden, weight))
    bias = bias if bias is None else bias.to(logits_dtype)
    logits = torch.nn.functional.linear(hidden[0], weight[0], bias)
    for h, w in zip(hidden[1:], weight[1:], strict=True):
        logits = torch.addmm(logits, h, w.t())  # rounded when it is added, not before
    return logits


def reference(hidden, weight, bias, labels, temperature, softcap, ignore_index, logits_dtype):
    """hidden_i [N, H_i], weight_i [V, H_i], labels [N] -> logp [N], entropy [N], stats [2, N]."""
    legal_labels(OP, labels, len(weight[0]), temperature, ignore_index)
    logits = _logits(hidden, weight, bias, logits_dtype)
    return page.reference(page.Inputs(logits, labels, temperature, softcap, ignore_index, True))


def reference_part(hidden, weight, bias, labels, temperature, softcap, ignore_index, logits_dtype):
    """label_logit, top, log_sum, entropy [4, N], weight being a part of the vocabulary's."""
    logits = _logits(hidden, weight, bias, logits_dtype)
    anything = torch.where(labels == ignore_index, ignore_index, 0)
    _, entropy, stats = page.reference(
        page.Inputs(logits, anything, temperature, softcap, ignore_index, True)
    )
    return torch.stack([label_logit(logits, labels, stats.dtype, softcap), *stats, entropy])


def reference_backward(
    grad_logp, grad_entropy, entropy, stats, hidden, weight, bias, labels, temperature, softcap,
    ignore_index, logits_dtype, wanted,
):  # fmt: skip
    """dL/d of each hidden, each weight and bias, in their dtype; what is not wanted is empty."""
    kept = (labels != ignore_index)[:, None]
    hidden = [torch.where(kept, h, 0.0) for h in hidden]
    logits = _logits(hidden, weight, bias, logits_dtype)
    rows = page.Inputs(logits, labels, temperature, softcap, ignore_index, True)
    upstream = page.BackwardInputs(rows, grad_logp, grad_entropy, entropy, stats)
    g = page.reference_backward(upstream).grad_logits
    g = g.to(hidden[0].dtype).to(temperature.dtype)
    dhidden, dweight = [g @ w.to(g.dtype) for w in weight], [g.T @ h.to(g.dtype) for h in hidden]
    pairs = zip([*dhidden, *dweight, g.sum(0)], wanted, strict=True)
    return [x.to(hidden[0].dtype) if want else hidden[0].new_empty(0) for x, want in pairs]


_HEAD = (
    "Tensor[] hidden, Tensor[] weight, Tensor? bias, Tensor labels, Tensor temperature, "
    "float softcap, int ignore_index, ScalarType logits_dtype"
)


def _fake(hidden, weight, bias, labels, temperature, *_):
    shapes = labels.shape, labels.shape, (2, *labels.shape)
    return tuple(labels.new_empty(shape, dtype=temperature.dtype) for shape in shapes)


def _fake_backward(*args):
    hidden, weight, wanted = *args[4:6], args[-1]
    shapes = *(x.shape for x in (*hidden, *weight)), weight[0].shape[:1]
    pairs = zip(shapes, wanted, strict=True)
    return [weight[0].new_empty(shape if want else 0) for shape, want in pairs]


_forward = define(
    f"linear_token_logprobs({_HEAD}) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference,
)
_part = define(
    f"linear_token_logprobs_part({_HEAD}) -> Tensor",
    fake=lambda *args: args[3].new_empty((4, *args[3].shape), dtype=args[4].dtype),
    reference=reference_part,
)
# wanted: of each hidden, each weight and the bias, as the result is.
_backward = define(
    "linear_token_logprobs_backward(Tensor grad_logp, Tensor? grad_entropy, Tensor entropy, "
    f"Tensor stats, {_HEAD}, bool[] wanted) -> Tensor[]",
    fake=_fake_backward,
    reference=reference_backward,
)

for device in ("CPU", "CUDA"):
    kernel(_forward, device, "BLAS")(blas.forward)
    kernel(_part, device, "BLAS")(blas.part)
    kernel(_backward, device, "BLAS")(blas.backward)


def _forward_of(group, head, *args):
    """logp, entropy and stats, and what backward is of: this rank's shard, as a head of its own."""
    if group is None:
        return _forward(*head, *args), args
    labels, temperature, softcap, ignore_index, dtype = args

    def part(local):
        return Statistics(*_part(*head, local, temperature, softcap, NEVER, dtype))

    shard = Shard(OP, group, len(head.weight[0]), labels, temperature, ignore_index)
    outputs, local = over_all_ranks(shard, part)
    return outputs, (local, temperature, softcap, NEVER, dtype)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, labels, temperature, softcap, ignore_index, dtype, *head):
        args = labels, temperature, softcap, ignore_index, dtype
        (logp, entropy, stats), args = _forward_of(group, Factors.of(head), *args)
        ctx.group = group
        ctx.save_for_backward(entropy, stats, *args[:2], *head)
        ctx.options = args[2:]
        ctx.set_materialize_grads(False)  # an entropy that is only looked at costs nothing
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        entropy, stats, labels, temperature, *head = ctx.saved_tensors
        if grad_logp is None:
            grad_logp = torch.zeros_like(entropy)
        wanted = list(ctx.needs_input_grad[6:])
        rows = grad_logp, grad_entropy, entropy, stats
        args = labels, temperature, *ctx.options, wanted
        grads = _backward(*rows, *Factors.of(head), *args)
        grads = [x if want else None for x, want in zip(grads, wanted, strict=True)]
        if ctx.group is not None:
            dhidden = Factors.of(grads).hidden
            sums = (
                x if x is None else add_over_ranks(x, ctx.group, entropy.dtype) for x in dhidden
            )
            grads[: len(dhidden)] = sums
        return *(None,) * 6, *grads


def logprobs(group, head: Factors, *args) -> tuple[Tensor, Tensor]:
    """logp and entropy [N], of what head_arguments returns."""
    if constant(*head.flat()):
        return _forward_of(group, head, *args)[0][:2]
    return _LinearTokenLogprobs.apply(group, *args, *head.flat())


def linear_token_logprobs(
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    logits_dtype: torch.dtype | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """token_logprobs(hidden @ weight.T + bias, labels, ...) without the logits [..., V].

    hidden: [..., H], bf16, fp16, fp32 or fp64; weight: [V, H]; bias: [V]; of one dtype, each
        differentiable. Under autocast they are cast as for a linear layer. hidden and weight may be
        as many [..., H_i] as [V, H_i]: the logits are the sum of these products, as those of
        (h, s h @ A.T) and (W, B), a head W with a LoRA adapter.
    labels: [...] integers in [0, V), or ignore_index: outputs and gradient 0, row not read.
    temperature: a float, or a tensor that broadcasts to labels (constant: it gets no gradient).
    logit_scale, softcap: z = softcap(logit_scale * logits) / temperature, softcap as in Gemma.
    logits_dtype: None rounds logits to the dtype of hidden, as a model's own head does; fp32 keeps
        those of bf16 and fp16 operands (a CPU upcasts these, slice by slice: up to twice the time).
    process_group: the vocabulary is in shards, one on each rank in turn: weight is [V_rank, H] and
        bias [V_rank]. All else is the same on each, the result and the gradient of hidden too.
    Returns logp [...], or (logp, entropy) each [...], in nats; fp32 (fp64 for fp64 hidden).

    -inf, NaN and bad labels are treated as by token_logprobs. On a GPU the call waits for the
    number of rows that are not ignored, and backward for that of those that a gradient reaches.
    The logits are in tiles, one at a time, of at most about 4096 rows by 4096 tokens, on a GPU 8192
    by 16384; with more rows than that, a slice of the gradient of weight is in fp32 beside it.

    Off fp64 at H=896, V=151936 (on a CPU, 256 rows of logits of standard deviation 2, half the
    labels the likeliest): log-probs at most 4e-6 in fp32, 0.04 from logits in bf16, 2e-6 from fp32
    logits of bf16 operands; gradients, relative, 6e-7 in fp32 and 3e-3 in bf16. A row's bits depend
    on itself alone as far as BLAS keeps to that: a CPU's does for log-probs in fp32 and bf16, and
    for the gradient of hidden if 4 rows have one; in fp64, and on a GPU, its kernel may depend on
    the number of rows.
    """
    args = head_arguments(
        OP, hidden, weight, labels, bias, temperature, softcap, logit_scale, ignore_index,
        logits_dtype, process_group,
    )  # fmt: skip
    logp, entropy = (x.view(labels.shape) for x in logprobs(process_group, *args))
    return (logp, entropy) if return_entropy else logp
