"""Runs the installed package, whose ops on a CPU should be served by what the argument says."""

import math
import sys
from contextlib import redirect_stdout
from io import StringIO

import torch

import fastpg
from fastpg.cli import main

(served,) = sys.argv[1:]
assert fastpg.__file__.startswith(sys.prefix), fastpg.__file__
assert fastpg.kernels_of()["token_logprobs"]["CPU"] == served, fastpg.extension_status()

logits = torch.randn(4, 16, 999, requires_grad=True)
exact = logits.detach().double().requires_grad_()
ids = torch.randint(999, (4, 16))
old_logp, advantages = torch.randn(4, 16).sub(8), torch.randn(4, 16)
weight = fastpg.token_weights(torch.ones(4, 16, dtype=torch.bool))

loss, _ = fastpg.policy_loss(
    fastpg.token_logprobs(logits, ids), advantages, weight, old_logp=old_logp
)
loss.backward()

logp = exact.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
ratio = (logp - old_logp).exp()
terms = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
terms.mean().backward()
torch.testing.assert_close(loss.double(), terms.mean(), rtol=1e-5, atol=1e-6)
torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)

rewards = torch.randn(3, 50)
advantages, _ = fastpg.gae(rewards, None, gamma=0.9, lam=0.8)
sums, last = [], 0.0
for reward in rewards.double().flip(1).T:
    last = reward + 0.9 * 0.8 * last
    sums.append(last)
torch.testing.assert_close(advantages.double(), torch.stack(sums[::-1], 1), rtol=1e-5, atol=1e-5)

with redirect_stdout(StringIO()) as said:
    assert main(["doctor"]) == 0
assert f"C++ extension: {fastpg.extension_status()}" in said.getvalue()
assert math.isfinite(loss.item())
print(f"ops served by {served} agree with fp64; {fastpg.extension_status()}")
