"""python -m bench.once [cuda|cpu] [paths|vocabulary]: runs ops once, for a tool that watches them.

"paths" are those of the ops in CUDA C++, each once, for a sanitizer. "vocabulary" are the kernels
that walk along rows of logits, at a size that fills a GPU, for a profiler. On the CPU this only
tells whether the script runs.
"""

from __future__ import annotations

import itertools
import sys

import torch

from fastpg import gae, policy_loss, policy_loss_from_logits, token_logprobs, value_loss

SIZE = 8192, 151936  # rows and vocabulary: 2.5 GB in bf16
# Less than a lane's four, less than a warp's tile; more than a block scans at a time; shared.
LENGTHS = (1, 127, 1500, 4100)


def tokens(*shape: int, count: int) -> list[torch.Tensor]:
    return list(torch.rand(count, *shape))


def backward(out: tuple) -> None:
    sum(x.sum() for x in out if isinstance(x, torch.Tensor)).backward()


def run_gae(length: int, dtype: torch.dtype) -> None:
    rewards, values, bootstrap, ratio = (x.to(dtype) for x in tokens(3, length, count=4))
    rewards.requires_grad_(), values.requires_grad_(), bootstrap.requires_grad_()
    mask, cut = values > 0.3, bootstrap > 0.8
    backward(gae(rewards, values, gamma=0.9, lam=0.9))
    backward(gae(rewards, values, mask, bootstrap=bootstrap[:, 0]))
    every = {"gamma": ratio, "lam": ratio[:, 0], "rho": ratio, "c": ratio, "truncated": cut}
    backward(gae(rewards, values, mask, bootstrap=bootstrap, terminated=~cut, **every))
    cu_seqlens = torch.tensor([0, 0, length, 3 * length], dtype=torch.int32)
    backward(gae(rewards.flatten(), values.flatten(), mask.flatten(), cu_seqlens=cu_seqlens))


def run_losses(length: int, dtype: torch.dtype) -> None:
    logp, old, ref, entropy, values, returns = (x.to(dtype) for x in tokens(2, length, count=6))
    weight = (values > 0.3).to(dtype)
    logp.requires_grad_(), values.requires_grad_()
    backward(value_loss(values, returns, weight))
    backward(value_loss(values, returns, weight, old_values=old, clip=0.2))
    for surrogate in ("ppo", "reinforce", "cispo", "sapo"):
        backward(policy_loss(logp, returns, weight, old_logp=old, surrogate=surrogate))
    kl = {"ref_logp": ref, "kl_coef": 0.1, "entropy": entropy, "entropy_coef": 0.1}
    backward(policy_loss(logp, returns, weight, old_logp=old, dual_clip=3.0, **kl))
    backward(policy_loss(logp, returns, weight, old_logp=old, level="sequence"))


def run_vocabulary(rows: int, vocab: int) -> None:
    logits = torch.randn(rows, vocab, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(vocab, (rows,))
    logp, entropy = token_logprobs(logits, labels, return_entropy=True)
    backward((logp, entropy))
    tokens = {"advantages": torch.randn(rows), "weight": torch.full((rows,), 1 / rows)}
    loss, _ = policy_loss_from_logits(logits, labels, **tokens, old_logp=logp.detach())
    loss.backward()


def run_paths() -> None:
    for length, dtype in itertools.product(LENGTHS, (torch.float32, torch.float64)):
        run_gae(length, dtype)
        run_losses(length, dtype)


def main(device: str = "cuda", what: str = "paths") -> None:
    with torch.device(device):
        if what == "vocabulary":
            run_vocabulary(*(SIZE if device == "cuda" else (4, 1000)))
        else:
            run_paths()
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
