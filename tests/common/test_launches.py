"""No GPU is left behind: without the compiled extension an op takes a few launches, not dozens."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from conftest import GPU, MODULES, replace_ops
from torch.utils._python_dispatch import TorchDispatchMode

import fastpg
from bench.inputs import logits_and_labels

TRITON = importlib.util.find_spec("triton") is not None
OPS = Path(fastpg.__file__).parent / "ops"
KERNELS = ("Triton", "CUDA C++", "reference")  # whoever else serves an op launches a library's
NO_LAUNCH = ("empty", "view", "detach", "alias", "expand", "select", "squeeze", "reshape")


def test_every_op_has_a_kernel_that_needs_no_toolkit():
    sources = "".join(path.read_text() for path in OPS.rglob("*_triton.py"))
    launchers = set(re.findall(r"^def (\w+)\(", sources, re.MULTILINE))
    by_library = {op for op, of in fastpg.kernels_of().items() if of["CUDA"] not in KERNELS}
    assert set(fastpg.kernels_of()) - by_library <= launchers


class Launches(TorchDispatchMode):
    """Counts the kernels of Triton and the ops of torch that would launch one."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names, self.inside = [], False
        interpreter = importlib.import_module("triton.runtime.interpreter")
        run = interpreter.InterpretedFunction.run

        def counted(kernel, *args, **options):
            self.names.append(kernel.fn.__name__)
            self.inside = True  # where the interpreter copies
            run(kernel, *args, **options)
            self.inside = False

        monkeypatch.setattr(interpreter.InterpretedFunction, "run", counted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if not self.inside and not any(part in name for part in NO_LAUNCH):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


B, T = 3, 7
X, MASK, WEIGHT = torch.randn(B, T), torch.ones(B, T, dtype=torch.bool), torch.ones(B, T)
LOGITS, LABELS = logits_and_labels((B,), 33)
Y = -X
PPO = {"old_logp": Y, "ref_logp": X, "kl_coef": 0.1, "entropy": Y, "entropy_coef": 0.1}
FROM_LOGITS = dict(zip(("advantages", "weight", "old_logp"), torch.randn(3, B), strict=True))
CASES = {  # what is differentiated, and the most launches of forward and of backward
    "token_logprobs": (LOGITS, lambda x: fastpg.token_logprobs(x, LABELS), 3, 1),
    "kl_estimate": (X, lambda x: fastpg.kl_estimate(x, Y, kind="k3"), 1, 1),
    "token_weights": (None, lambda _: fastpg.token_weights(MASK, reduce="sequence"), 4, 0),
    "token_rewards": (X[:, 0], lambda x: fastpg.token_rewards(x, MASK, kl=X, kl_coef=0.1), 1, 1),
    "whiten": (X, lambda x: fastpg.whiten(x, MASK), 3, 3),
    "gae": (X, lambda x: fastpg.gae(x, X, MASK, gamma=0.9, lam=0.9)[0], 1, 2),
    "importance_weights": (None, lambda _: fastpg.importance_weights(X, Y, MASK)[0], 2, 0),
    "value_loss": (X, lambda x: fastpg.value_loss(x, Y, WEIGHT)[0], 2, 1),
    "policy_loss_from_logits": (
        LOGITS,
        lambda x: fastpg.policy_loss_from_logits(x, LABELS, **FROM_LOGITS)[0],
        5,
        1,
    ),
    "policy_loss": (X, lambda x: fastpg.policy_loss(x, X, WEIGHT, **PPO)[0], 2, 1),
}


@pytest.mark.skipif(not TRITON or GPU, reason="counted in Triton's interpreter")
@pytest.mark.parametrize("op", CASES)
def test_an_op_takes_a_few_launches(op, monkeypatch):
    x, call, forward, backward = CASES[op]
    launchers = vars(importlib.import_module(MODULES[f"{op}_triton"]))
    page = importlib.import_module(MODULES[op])
    replace_ops(monkeypatch, page, lambda op: launchers.get(op._opname))
    if x is not None:
        x = x.clone().requires_grad_()
    with Launches(monkeypatch) as seen:
        out = call(x)
        assert len(seen.names) <= forward, seen.names
        if x is not None:
            upstream = torch.ones_like(out)
            seen.names.clear()
            torch.autograd.grad(out, x, upstream)
            assert len(seen.names) <= backward, seen.names
