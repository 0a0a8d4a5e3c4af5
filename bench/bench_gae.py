"""gae at B=8, T=8192, against an IIR filter, torchrl's vectorised form and the usual loop."""

import torch
from torch.nn.functional import pad

from fastpg import gae

from ._timing import Case

BATCH, LENGTH, GAMMA = 8, 8192, 1.0


def by_filter(rewards, values, lam):
    """delta in numpy, then scipy's C loop over the reversed sequence."""
    from scipy.signal import lfilter

    delta = rewards.numpy() + GAMMA * pad(values[:, 1:], (0, 1)).numpy() - values.numpy()
    return lfilter([1.0], [1.0, -GAMMA * lam], delta[:, ::-1])[:, ::-1]


def by_torchrl(rewards, values, lam):
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    done = torch.zeros(BATCH, LENGTH, 1, dtype=torch.bool)
    done[:, -1] = True
    following = pad(values[:, 1:], (0, 1))[..., None]
    args = values[..., None], following, rewards[..., None], done, done
    return lambda: vec_generalized_advantage_estimate(GAMMA, lam, *args)


def by_loop(rewards, values, lam):
    """As most trainers write it."""
    delta = rewards + GAMMA * pad(values[:, 1:], (0, 1)) - values
    last, advantages = 0.0, []
    for t in reversed(range(LENGTH)):
        last = delta[:, t] + GAMMA * lam * last
        advantages.append(last)
    return torch.stack(advantages[::-1], dim=1)


def case(name, lam, peers, device, **settings):
    rewards, values = torch.randn(2, BATCH, LENGTH, device=device)

    def ours():
        return gae(rewards, values, gamma=GAMMA, lam=lam)

    def gate():
        want = torch.from_numpy(
            by_filter(rewards.cpu().double(), values.cpu().double(), lam).copy()
        )
        error = (ours()[0].cpu() - want).abs().max().item()
        assert error < 1e-5 * (1 + want.abs().max()), f"advantages off by {error}"

    candidates = {"fastpg": ours} | {k: peer(rewards, values, lam) for k, peer in peers.items()}
    return Case("gae", name, gate, candidates, device=device, **settings)


def cases(device):
    peers = {"PyTorch, a loop over T": lambda *args: lambda: by_loop(*args)}
    size = f"{BATCH} x {LENGTH} float32"
    if device == "cpu":
        fast = {
            "scipy.signal.lfilter": lambda *args: lambda: by_filter(*args),
            "torchrl, vectorised": by_torchrl,
        }
        targets = {"scipy.signal.lfilter": ">= 3", "torchrl, vectorised": ">= 50"}
        yield case(f"lam=0.95, {size}", 0.95, fast, device, targets=targets, calls=10)
        peers["torchrl, vectorised"] = by_torchrl
    yield case(f"lam=1, {size}", 1.0, peers, device)
