"""A wrong type is told in one sentence that names the op and the argument."""

import re

import pytest
import torch

import fastpg

X, MASK, SCORES = torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.rand(2)
GROUP = torch.zeros(2, dtype=torch.int64)
CASES = [
    ("policy_loss", (X, X, X), options)
    for options in (
        {"clip": ("a", 0.2)}, {"clip": (0.2, [1])}, {"dual_clip": "x"}, {"tau": (1.0, None)},
        {"kl_coef": "a"}, {"kl_coef": None}, {"entropy_coef": "a"}, {"surrogate": ["ppo"]},
        {"kl": [1]}, {"level": ["token"]},
    )
] + [
    ("gae", (X, X), options)
    for options in (
        {"values": [1]}, {"mask": [1]}, {"gamma": "a"}, {"lam": None}, {"rho": 1.0}, {"c": 1.0},
        {"terminated": True}, {"truncated": True, "bootstrap": SCORES}, {"bootstrap": 0.0},
        
    )
] + [
    ("importance_weights", (X, X, MASK), {"low": "a"}),
    ("importance_weights", (X, X, MASK), {"high": [1]}),
    ("importance_weights", (X, X, MASK), {"level": ["token"]}),
    ("importance_weights", (X[0], X[0], MASK[0]), {"cu_seqlens": [0, 3]}),
    ("token_weights", (), {"mask": None}),
    ("token_weights", (MASK,), {"reduce": ["token"]}),
    ("token_weights", (MASK,), {"denom": "a"}),
    ("token_rewards", (SCORES,), {"mask": None}),
    ("token_rewards", (), {"scores": None, "mask": MASK}),
    ("token_rewards", (SCORES, MASK), {"kl": 1.0, "kl_coef": 0.1}),
    ("token_rewards", (SCORES, MASK), {"kl_coef": "a"}),
    ("value_loss", (X, X, X), {"clip": "a", "old_values": X}),
    ("kl_estimate", (X, X), {"kind": ["k1"]}),
    ("whiten", (X, MASK), {"eps": "a"}),
    ("group_center", (SCORES, GROUP), {"eps": "a"}),
    ("group_center", (SCORES,), {"group": GROUP.to(torch.uint16)}),
    ("group_center", (SCORES, GROUP), {"scale": ["std"]}),
    ("token_logprobs", (X, GROUP), {"temperature": [1]}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "args", "options"), CASES)
def test_a_wrong_type_names_the_argument(op, args, options):
    if op == "gae" and "values" in options:
        args = args[:1]
    name = next(iter(options))
    with pytest.raises((TypeError, ValueError), match=rf"^{re.escape(op)}: {name} must be "):
        getattr(fastpg, op)(*args, **options)
