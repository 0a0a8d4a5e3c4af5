"""distillation_loss, forward + backward, against the formula in PyTorch."""

import torch

import fastpg
from fastpg import distillation_loss
from fastpg.bench.timing import Case

from .._example import Example
from .._variant import variants_of

TOKENS, KEPT = 8192, 64


def eager(logp, teacher_logp, weight):
    """The reverse KL in fp64, as the op has it: in fp32 a tail loses its digits."""
    logp, teacher_logp = logp.double(), teacher_logp.double()
    p, q = logp.exp(), teacher_logp.exp()
    p_tail, q_tail = 1 - p.sum(-1), 1 - q.sum(-1)
    value = (p * (logp - teacher_logp)).sum(-1) + p_tail * (p_tail / q_tail).log()
    return (weight * value).sum()


def fused(logp, teacher_logp, weight):
    return distillation_loss(logp, teacher_logp, weight)[0]


def training(function, logp, *rest):
    x = logp.clone().requires_grad_()
    return lambda: torch.autograd.grad(function(x, *rest), x)


def cases(device):
    logits = torch.randn(2, TOKENS, 4 * KEPT, device=device)
    logp, teacher_logp = logits.log_softmax(-1)[..., :KEPT].contiguous().unbind()
    inputs = logp, teacher_logp, torch.full((TOKENS,), 1 / TOKENS, device=device)

    def gate():
        want = eager(*inputs)
        error = (fused(*inputs) - want).abs().item()
        assert error < 1e-6 * want.abs(), f"distillation_loss off by {error}"

    yield Case(
        "distillation_loss",
        f"reverse KL, forward + backward, {TOKENS} tokens, {KEPT} kept",
        gate,
        {
            "fastpg": training(fused, *inputs),
            "eager": training(eager, *inputs),
            "torch.compile": training(torch.compile(eager), *inputs),
        },
        device=device,
    )


def examples(device):
    """Small calls of the op."""
    logits = torch.randn(2, 3, 7, 9, device=device)
    logp, teacher_logp = logits.log_softmax(-1)[..., :4].unbind()
    weight = (logits[0, ..., 8] < 1).float()
    arguments = {"logp": logp, "teacher_logp": teacher_logp, "weight": weight}
    yield Example(fastpg.distillation_loss, arguments, differentiable=("logp",))
    yield Example(
        fastpg.distillation_loss,
        arguments | {"divergence": "jsd", "beta": 0.3},
        differentiable=("logp",),
        variant="jsd",
    )


def variants(few, capability):
    """What a GPU may be asked to compile."""
    from fastpg.ops.loss import distillation_loss_triton as page

    kinds = ("reverse_kl", "forward_kl", "jsd")
    yield from variants_of(page.forward_kernel, few, KIND=kinds, BLOCK=(64, 1024))
