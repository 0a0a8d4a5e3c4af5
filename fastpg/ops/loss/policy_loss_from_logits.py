"""The policy loss of tokens and its gradient by their logits, with each row read from memory once.

    logp, H = token_logprobs(logits, labels)     L = policy_loss(logp, ..., entropy=H)

A row gives its token's log-prob; this, with what is known beforehand, gives dL/dlogp and dL/dH; and
these, while the row is still in cache, turn it into dL/dlogits. So memory is read once and written
once, where the two ops read it twice and write it once. Backward only hands the gradient over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._library import (
    _C,
    DTYPE_CODE,
    address,
    contiguous,
    cpu_kernel,
    define,
    triton_kernels,
)
from ..common.autograd import once_differentiable
from ..common.checks import alike, cast, check_shape, check_tensors, constant
from ..common.stats import PolicyStats
from ..vocabulary import token_logprobs as rows_page
from ..vocabulary.logit_rows import addressable
from ..vocabulary.token_logprobs import token_logprobs
from . import policy_loss as tokens_page
from .policy_loss import policy_loss
from .surrogates import CODES, LossOptions, check_options, check_terms

OP = "policy_loss_from_logits"


def masked(labels, weight, ignore_index):
    """Labels and weights of which either masks what one of them does."""
    kept = (weight != 0) & (labels != ignore_index)
    return torch.where(kept, labels, ignore_index), torch.where(kept, weight, 0.0)


def reference(
    out, logits, labels, temperature, softcap, ignore_index, advantages, weight, old_logp, ref_logp,
    surrogate, kl, options, device_options, with_entropy,
):  # fmt: skip
    """-> loss [], stats [16]; dL/dlogits goes to out."""
    labels, weight = masked(labels, weight, ignore_index)
    rows = rows_page.Inputs(logits, labels, temperature, softcap, ignore_index, with_entropy)
    logp, entropy, of_rows = rows_page.reference(rows)
    entropy = entropy if with_entropy else None
    loss, by_logp, stats = tokens_page.reference(
        tokens_page.Inputs(
            logp, advantages, weight, old_logp, None, ref_logp, entropy,
            surrogate, kl, LossOptions(*options), device_options,
        )
    )  # fmt: skip
    entropy_coef = options[-1] if device_options is None else device_options[-1].to(logp.dtype)
    by_entropy = -entropy_coef * weight if with_entropy else None
    gradient = rows_page.BackwardInputs(rows, by_logp, by_entropy, entropy, of_rows)
    out.copy_(rows_page.reference_backward(gradient).grad_logits)
    return loss, stats


def _fake(out, logits, labels, temperature, *_):
    stats = temperature.new_empty(16, dtype=torch.float64)
    return temperature.new_empty(()), stats


# out: contiguous, of the shape and dtype of logits. It may be the logits themselves.
_loss = define(
    "policy_loss_from_logits(Tensor(a!) out, Tensor logits, Tensor labels, Tensor temperature, "
    "float softcap, int ignore_index, Tensor advantages, Tensor weight, Tensor? old_logp, "
    "Tensor? ref_logp, str surrogate, str kl, float[] options, Tensor? device_options, "
    "bool with_entropy) -> (Tensor loss, Tensor stats)",
    fake=_fake,
    reference=reference,
)


@cpu_kernel(_loss)
def _loss_cpu(out, *args):
    if out.numel() == 0:  # an empty tensor has no address
        return reference(out, *args)
    logits, labels, temperature, softcap, ignore_index, advantages, weight, *rest = args[:9]
    labels, weight = masked(labels, weight, ignore_index)
    surrogate, kl, options, device_options, with_entropy = args[9:]
    logits = addressable(logits)
    labels, temperature = labels.contiguous(), temperature.contiguous()
    sizes = rows_page.sizes(
        rows_page.Inputs(logits, labels, temperature, softcap, ignore_index, with_entropy)
    )
    rows = (
        logits.data_ptr(), sizes.dtype, sizes.count, sizes.inner, sizes.outer_stride,
        sizes.inner_stride, sizes.vocab, labels.data_ptr(), temperature.data_ptr(),
        sizes.temperature_per_row, softcap, ignore_index, with_entropy,
    )  # fmt: skip
    tokens = contiguous(advantages, weight, *rest)
    logp, coefficient, *for_entropy = torch.empty(
        4 if with_entropy else 2, *labels.shape, dtype=temperature.dtype
    )
    entropy, grad_entropy = for_entropy or (None, None)
    of_rows = logp.new_empty(2, *labels.shape)
    loss, stats = _fake(out, logits, labels, temperature)
    made = logp, entropy, of_rows, coefficient, grad_entropy, out, loss, stats
    _C.policy_loss_from_logits(
        rows, DTYPE_CODE[logp.dtype], *map(address, tokens), CODES["surrogate"][surrogate],
        CODES["kl"][kl], options, address(device_options), *map(address, made),
    )  # fmt: skip
    return loss, stats


def reference_scale(gradient, by):
    if by.device.type != "cpu" or by != 1:  # elsewhere to look would be to wait
        gradient.mul_(by)


_scale = define(
    "policy_loss_from_logits_scale(Tensor(a!) gradient, Tensor by) -> ()",
    fake=lambda *_: None,
    reference=reference_scale,
)


triton_kernels(__name__, _loss, _scale)


class _PolicyLossFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, inplace, *args):
        logits = logits.detach()
        contiguous_format = torch.contiguous_format
        out = logits if inplace else torch.empty_like(logits, memory_format=contiguous_format)
        loss, stats = _loss(out, logits, *args)
        if inplace:
            torch.autograd.graph.increment_version(logits)  # whoever saved them raises
        ctx.save_for_backward(out)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        if grad_loss is None:
            return (None,) * 15
        if torch.compiler.is_compiling():
            return ctx.saved_tensors[0] * grad_loss, *[None] * 14
        if hasattr(ctx, "handed_over"):
            raise RuntimeError(f"{OP}: one backward a forward; this is the second")
        (gradient,), ctx.handed_over = ctx.saved_tensors, True
        _scale(gradient, grad_loss)
        return gradient, *[None] * 14


def _tokens(labels, dtype, **tokens):
    """advantages, weight, old_logp and ref_logp, as the op takes them."""
    check_tensors(OP, advantages=tokens["advantages"])
    check_shape(OP, "advantages", tokens["advantages"], labels, labels.shape)
    tokens = alike(OP, ("old_logp", "ref_logp"), **tokens)
    return [x if x is None else cast(x.detach(), dtype) for x in tokens]


def _check_inplace(logits: Tensor) -> None:
    base = logits if logits._base is None else logits._base
    if base.is_leaf and base.requires_grad:
        raise ValueError(f"{OP}: inplace=True would overwrite logits that are a leaf of the graph")
    if not logits.is_contiguous():
        shape, strides = tuple(logits.shape), logits.stride()
        raise ValueError(f"{OP}: inplace=True needs contiguous logits, got {shape} by {strides}")


def _by_two_ops(rows, tokens, entropy_coef, **options):
    logits, labels, temperature, softcap, ignore_index = rows
    advantages, weight, old_logp, ref_logp = tokens
    labels, weight = masked(labels, weight, ignore_index)
    logp = token_logprobs(
        logits, labels, temperature=temperature, softcap=softcap or None, ignore_index=ignore_index,
        return_entropy=entropy_coef != 0,
    )  # fmt: skip
    logp, entropy = logp if entropy_coef != 0 else (logp, None)
    return policy_loss(
        logp, advantages, weight, old_logp=old_logp, ref_logp=ref_logp, entropy=entropy,
        entropy_coef=entropy_coef, **options,
    )  # fmt: skip


def policy_loss_from_logits(
    logits: Tensor,
    labels: Tensor,
    advantages: Tensor,
    weight: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    old_logp: Tensor | None = None,
    clip: tuple[float | None, float | None] = (0.2, 0.2),
    dual_clip: float | None = None,
    tau: tuple[float, float] = (1.0, 1.05),
    surrogate: str = "ppo",
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    entropy_coef: float = 0.0,
    inplace: bool = False,
) -> tuple[Tensor, PolicyStats]:
    """policy_loss(token_logprobs(logits, labels), advantages, weight), its gradient made with it.

    logits: [..., V], as in token_logprobs; differentiable. The others are constants: labels [...],
        and advantages, weight, old_logp and ref_logp, each of the shape of labels and any float
        dtype. Options mean what they mean in token_logprobs and policy_loss, and raise what they
        raise there; entropy_coef takes the entropy of the rows.
    Weight 0 masks a token, and so does ignore_index: its row is not read and gets gradient 0.
    inplace: the gradient may overwrite the logits, which must be contiguous and no leaf of the
        graph; nothing else may use them then. In torch.compile, whose own matter this is, and
        where no gradient is wanted, they stay.
    Returns (loss, stats) as policy_loss does, fp32 (fp64 for fp64 logits).

    The gradient is that of the loss times 1. A backward that brings another factor costs a pass
    over the gradient: put it into weight. Only one backward is allowed, and no second derivative.
    The ratio of a whole sequence (level="sequence") needs all its log-probs first: the two ops do
    that. They also serve fp16, whose gradient would underflow before a GradScaler could scale it.
    """
    rows = rows_page.checked_inputs(
        logits, labels, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
        with_entropy=False,
    )[:-1]  # fmt: skip
    numbers = check_options(clip, dual_clip, tau, surrogate, kl_coef, entropy_coef)
    check_terms(kl, kl_coef, ref_logp)
    tokens = _tokens(
        labels, rows[2].dtype, advantages=advantages, weight=weight, old_logp=old_logp,
        ref_logp=ref_logp,
    )  # fmt: skip
    wanted = torch.is_grad_enabled() and not constant(logits)
    if not wanted or logits.dtype is torch.float16:
        return _by_two_ops(
            rows, tokens, entropy_coef, clip=clip, dual_clip=dual_clip, tau=tau,
            surrogate=surrogate, kl_coef=kl_coef, kl=kl,
        )  # fmt: skip
    inplace = inplace and not torch.compiler.is_compiling()
    if inplace:
        _check_inplace(logits)
    numbers = tokens_page.as_traced(numbers, logits.device)
    args = *rows[1:], *tokens, surrogate, kl, *numbers, entropy_coef != 0
    loss, stats = _PolicyLossFromLogits.apply(logits, inplace, *args)
    return loss, PolicyStats(stats)
