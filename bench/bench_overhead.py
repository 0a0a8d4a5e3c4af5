"""What a call costs when there is almost nothing to compute: the examples of every op."""

import torch

from fastpg.bench.timing import Case

from . import _example


def _training(example):
    """Forward and backward of an example."""
    leaves = example.leaves()
    inputs = list(leaves.values())
    upstream = torch.ones_like(example.call(**leaves)[0])
    return lambda: torch.autograd.grad(example.call(**leaves)[0], inputs, upstream)


def _sine():
    """Forward and backward of the smallest op of torch, as a yardstick."""
    x = torch.rand(2, 4, requires_grad=True)
    upstream = torch.ones(2, 4)
    return lambda: torch.autograd.grad(torch.sin(x), x, upstream)


def _gate(example):
    """The results must be finite; each op's own benchmark and tests check the values."""

    def check():
        assert all(x.isfinite().all() for x in example.call()), "not finite"

    return check


def cases(device):
    for example in _example.examples(device):
        candidates = {"forward": example.call}
        if example.differentiable:
            candidates["forward + backward"] = _training(example)
        yield Case(
            "overhead",
            str(example),
            _gate(example),
            candidates | {"sin forward + backward": _sine()},
            ours="forward",
            calls=500,
            device=device,
        )
