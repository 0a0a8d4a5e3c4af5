"""gae at B=8, T=8192, against an IIR filter and torchrl's vectorised form."""

import torch

from fastpg import gae

from ._timing import Case

BATCH, LENGTH, GAMMA, LAM = 8, 8192, 0.99, 0.95


def by_filter(rewards, values):
    """delta in numpy, then scipy's C loop over the reversed sequence."""
    from scipy.signal import lfilter

    following = torch.nn.functional.pad(values[:, 1:], (0, 1)).numpy()
    delta = rewards.numpy() + GAMMA * following - values.numpy()
    return lfilter([1.0], [1.0, -GAMMA * LAM], delta[:, ::-1])[:, ::-1]


def by_torchrl(rewards, values):
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    done = torch.zeros(BATCH, LENGTH, 1, dtype=torch.bool)
    done[:, -1] = True
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))[..., None]
    args = values[..., None], following, rewards[..., None], done, done
    return lambda: vec_generalized_advantage_estimate(GAMMA, LAM, *args)


def by_loop(rewards, values):
    """As most trainers write it."""
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    delta, last, advantages = rewards + GAMMA * following - values, 0.0, []
    for t in reversed(range(LENGTH)):
        last = delta[:, t] + GAMMA * LAM * last
        advantages.append(last)
    return torch.stack(advantages[::-1], dim=1)


def cases(device):
    rewards, values = torch.randn(2, BATCH, LENGTH, device=device)

    def ours():
        return gae(rewards, values, gamma=GAMMA, lam=LAM)

    def gate():
        want = torch.from_numpy(by_filter(rewards.cpu().double(), values.cpu().double()).copy())
        error = (ours()[0].cpu() - want).abs().max().item()
        assert error < 1e-5 * (1 + want.abs().max()), f"advantages off by {error}"

    candidates = {
        "fastpg": ours,
        "PyTorch, a loop over T": lambda: by_loop(rewards, values),
    }
    targets = {}
    if device == "cpu":
        candidates["scipy.signal.lfilter"] = lambda: by_filter(rewards, values)
        candidates["torchrl, vectorised"] = by_torchrl(rewards, values)
        targets = {"scipy.signal.lfilter": 3, "torchrl, vectorised": 50}
    name = f"{BATCH} x {LENGTH} float32"
    yield Case("gae", name, gate, candidates, targets=targets, device=device)
