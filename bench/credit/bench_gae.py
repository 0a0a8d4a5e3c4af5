"""gae against an IIR filter, torchrl's vectorised form and the usual loop, at B=8, T=8192.

On a GPU at T=4096 against scans in PyTorch and Triton, a copy of as many bytes and one launch.
"""

from functools import partial

import torch

import fastpg
from fastpg import gae
from fastpg.bench.baselines import gae_by_doubling, gae_by_filter, gae_by_loop
from fastpg.bench.peers import ask, torchrl_gae
from fastpg.bench.timing import Case

from .._example import Example
from .._variant import BOTH, GIVEN_OR_NOT, variants_of

BATCH, LENGTH, GAMMA = 8, 8192, 1.0


def gate(ours, rewards, values, lam):
    def check():
        want = gae_by_filter(rewards.cpu().double(), values.cpu().double(), GAMMA, lam)
        error = (ours()[0].cpu() - want).abs().max().item()
        assert error < 1e-5 * (1 + want.abs().max()), f"advantages off by {error}"

    return check


def case(name, lam, peers, device, **settings):
    rewards, values = torch.randn(2, BATCH, LENGTH, device=device)

    def ours():
        return gae(rewards, values, gamma=GAMMA, lam=lam)

    candidates = {"fastpg": ours}
    torchrl, _ = ask({"torchrl, vectorised": torchrl_gae(GAMMA, lam)}, device)
    for name, function in {**peers, **torchrl}.items():
        candidates[name] = partial(function, rewards, values)
    right = gate(ours, rewards, values, lam)
    return Case("gae", name, right, candidates, device=device, **settings)


def on_cuda(batch, length, targets):
    from .gae_in_triton import gae as by_triton

    lam = 0.95
    rewards, values, *copies = torch.randn(4, batch, length, device="cuda")
    one, compiled = torch.zeros(1, device="cuda"), torch.compile(gae_by_doubling)

    def ours():
        return gae(rewards, values, gamma=GAMMA, lam=lam)

    return Case(
        "gae",
        f"forward, {batch} x {length} float32",
        gate(ours, rewards, values, lam),
        {
            "fastpg": ours,
            "fastpg, under a CUDA graph": ours,
            "Triton, a row per program": lambda: by_triton(rewards, values, GAMMA, lam),
            "PyTorch, doubling": lambda: gae_by_doubling(rewards, values, GAMMA, lam),
            "torch.compile, doubling": lambda: compiled(rewards, values, GAMMA, lam),
            "copying two such tensors": lambda: [
                a.copy_(b) for a, b in zip(copies, (rewards, values), strict=True)
            ],
            "launching one kernel": lambda: one.add_(1.0),
        },
        targets=targets,
        device="cuda",
        graphs=("fastpg, under a CUDA graph",),
    )


def cases(device):
    if device == "cuda":
        # Without the graph, Python's work before the launch is most of the time.
        yield on_cuda(128, 4096, {"fastpg, under a CUDA graph": "<= 10 µs"})
        yield on_cuda(8192, 4096, {"copying two such tensors": ">= 0.85"})
        return
    size = f"{BATCH} x {LENGTH} float32"
    targets = {"scipy.signal.lfilter": ">= 3", "torchrl, vectorised": ">= 50"}
    fast = {"scipy.signal.lfilter": partial(gae_by_filter, gamma=GAMMA, lam=0.95)}
    yield case(f"lam=0.95, {size}", 0.95, fast, device, targets=targets, calls=10)
    slow = {"PyTorch, a loop over T": partial(gae_by_loop, gamma=GAMMA, lam=1.0)}
    yield case(f"lam=1, {size}", 1.0, slow, device)


def examples(device):
    """Small calls of the op."""
    rewards, values = torch.randn(2, 3, 7, device=device).unbind()
    mask = torch.rand(3, 7, device=device) < 0.8
    arguments = {"rewards": rewards, "values": values, "gamma": 0.9, "lam": 0.8}
    yield Example(
        fastpg.gae,
        arguments | {"mask": mask},
        differentiable=("rewards", "values"),
        forward_launches=1,
        backward_launches=2,
    )
    yield Example(
        fastpg.gae,
        arguments | {"mask": mask, "masked": "step"},
        differentiable=("rewards", "values"),
        variant="masked tokens as steps",
    )
    options = {"rho": values.exp(), "c": rewards.exp(), "terminated": ~mask, "truncated": mask}
    yield Example(
        fastpg.gae,
        arguments | options | {"bootstrap": rewards + 1},
        differentiable=("rewards", "values", "bootstrap"),
        variant="every option",
    )


def variants(few, capability):
    """Every optional tensor; none; the mask alone; each padded and packed."""
    from fastpg.ops.credit import gae_triton as page

    names = ("bootstrap", "mask", "gammas", "lams", "rho", "c", "terminated")
    shape = {"BLOCK": (page.BLOCK,), "GAMMA_PER_TOKEN": BOTH, "LAM_PER_TOKEN": BOTH}
    none = dict.fromkeys((*names, "truncated"), (None,))
    for kernel in (page.forward_kernel, page.backward_kernel):
        absent = {name: value for name, value in none.items() if name in kernel.arg_names}
        packed = {"cu_seqlens": GIVEN_OR_NOT}
        yield from variants_of(kernel, few, **shape, **packed)
        if not few:
            plain = absent | dict.fromkeys(("GAMMA_PER_TOKEN", "LAM_PER_TOKEN"), (False,))
            yield from variants_of(kernel, few, **shape | plain, **packed)
            yield from variants_of(kernel, few, **shape | plain | {"mask": (...,)}, **packed)
