"""linear_token_loss against the logits kept, torch's own fused head, and the matrix products alone.

PPO's loss; torch's cross entropy is the nearest that it has. Forward and backward to hidden and
weight; extra MiB does not count their gradients.
"""

import torch

import fastpg
from fastpg import linear_token_loss, policy_loss
from fastpg.bench.timing import Case

from .._example import Example
from .bench_linear_token_logprobs import CPU_SHAPES, CUDA_SHAPES, eager, problem, products


def ppo(labels):
    """token_loss, of log-probs that the last policy had."""
    old_logp, advantages = -12 + 0.1 * torch.randn(len(labels)), torch.randn(len(labels))
    tokens = [x.to(labels.device) for x in (advantages, torch.ones(len(labels)), old_logp)]

    def token_loss(logp, entropy, rows):
        advantages, weight, old_logp = (x[rows] for x in tokens)
        return policy_loss(logp, advantages, weight, old_logp=old_logp, clip=(None, None))

    return token_loss


def training(loss, hidden, weight, labels):
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    return lambda: torch.autograd.grad(loss(*leaves, labels), leaves)


def cases(device):
    for shape in CUDA_SHAPES if device == "cuda" else CPU_SHAPES:
        inputs, name, gradients = problem(*shape, device)
        yield case(inputs, name, gradients, device, quick=shape[0] != 4096)


def case(inputs, name, gradients, device, quick):
    token_loss = ppo(inputs[2])

    def fused(*args):
        return linear_token_loss(*args, token_loss)[0]

    def in_two_steps(*args):
        rows = torch.arange(len(args[2]), device=device)
        return token_loss(eager(*args), None, rows)[0]

    def cross_entropy(*args):
        return torch.nn.functional.linear_cross_entropy(*args, reduction="sum")

    def gate():
        few = inputs[0][:16], inputs[1], inputs[2][:16]
        for got, want in zip(training(fused, *few)(), training(in_two_steps, *few)(), strict=True):
            error = (got - want).float().norm() / want.float().norm()
            assert error < (1e-2 if got.dtype is torch.bfloat16 else 1e-5), f"gradient: {error}"

    candidates = {"fastpg": training(fused, *inputs)}
    if device == "cpu":  # a GPU has no room for eager's log-softmax in fp32
        candidates["eager"] = training(in_two_steps, *inputs)
    if hasattr(torch.nn.functional, "linear_cross_entropy"):  # torch 2.13
        candidates["torch's linear_cross_entropy"] = training(cross_entropy, *inputs)
    if quick:
        candidates["its three products"] = products(*inputs[:2], 1)
    targets = {"eager": ">= 1.18", "torch's linear_cross_entropy": "> 1"}
    targets |= {"its three products": ">= 0.8"} if device == "cuda" else {}
    weight = inputs[1]  # whose gradient is summed up in fp32, and in bf16 that is not the result
    buffer = 0 if weight.dtype is torch.float32 else 4 * weight.numel() / 2**20
    return Case(
        "linear_token_loss",
        f"forward + backward, {name}",
        gate,
        candidates,
        targets=targets,
        device=device,
        results_mib=gradients,
        least=5 if quick else 2,
        memory_target=f"<= eager / 15 + {buffer:.0f}" if "eager" in candidates else "",
    )


def _mean_logp(logp, entropy, rows):
    return logp.sum() / 3, None


def examples(device):
    """Small calls of the op."""
    hidden, head_weight = torch.randn(3, 4, device=device), torch.randn(33, 4, device=device)
    labels = torch.tensor([0, 5, 32], device=device)
    yield Example(
        fastpg.linear_token_loss,
        {"hidden": hidden, "weight": head_weight, "labels": labels, "token_loss": _mean_logp},
        differentiable=("hidden", "weight"),
    )
