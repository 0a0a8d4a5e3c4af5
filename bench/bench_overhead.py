"""What a call costs when there is almost nothing to compute: tensors of a few elements."""

import torch

import fastpg

from ._timing import Case


def _training(function, x):
    x = x.clone().requires_grad_()
    upstream = torch.ones_like(function(x))
    return lambda: torch.autograd.grad(function(x), x, upstream)


def functions(device):
    """Each op as a function of its differentiable input, and that input."""
    tokens = torch.rand(2, 4, device=device)
    labels = torch.ones(2, dtype=torch.int64, device=device)
    return {
        "token_logprobs": (lambda x: fastpg.token_logprobs(x, labels), tokens),
        "gae": (lambda x: fastpg.gae(x, tokens)[0], tokens),
        "policy_loss": (
            lambda x: fastpg.policy_loss(x, tokens, tokens, old_logp=tokens)[0],
            tokens,
        ),
        "value_loss": (lambda x: fastpg.value_loss(x, tokens, tokens)[0], tokens),
    }


def cases(device):
    for op, (function, x) in functions(device).items():
        yield Case(
            "overhead",
            op,
            lambda: None,  # correctness is the business of each op's own benchmark
            {
                "forward": lambda f=function, x=x: f(x),
                "forward + backward": _training(function, x),
                "sin forward + backward": _training(torch.sin, x),
            },
            ours="forward",
            calls=500,
            device=device,
        )
