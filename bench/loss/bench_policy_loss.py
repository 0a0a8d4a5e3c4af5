"""policy_loss, forward + backward, against the loss as commonly written."""

import torch

import fastpg
from fastpg import policy_loss
from fastpg.bench.baselines import CLIP
from fastpg.bench.baselines import clipped_surrogate as eager
from fastpg.bench.timing import Case

from .._example import Example
from .._variant import GIVEN_OR_NOT, variants_of

TOKENS = 1_000_000


def eager_every_option(logp, advantages, weight, old_logp, ref_logp, entropy):
    """Dual clip, an entropy bonus, and the KL to a reference with its exact gradient."""
    ratio = (logp - old_logp).exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages
    lowest = torch.minimum(unclipped, clipped)
    surrogate = -torch.where(advantages < 0, torch.maximum(lowest, 3 * advantages), lowest)
    d = logp - ref_logp
    terms = surrogate + 0.1 * ratio * (torch.expm1(-d) + d) - 0.01 * entropy
    return (terms * weight).sum()


def with_statistics(logp, advantages, weight, old_logp):
    """The loss, and what PolicyStats counts of it, in plain PyTorch."""
    d = logp - old_logp
    ratio = d.exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages
    loss = -(torch.minimum(unclipped, clipped) * weight).sum()
    with torch.no_grad():
        sums = [weight != 0, weight, ratio, ratio**2, -d, torch.expm1(d) - d]
        sums += [(advantages < 0) & (ratio < 1 - CLIP), (advantages > 0) & (ratio > 1 + CLIP)]
        stats = [*(x.sum() for x in sums), ratio.amin(), ratio.amax()]
    return loss, torch.stack([x.float() for x in stats])


def fused(logp, advantages, weight, old_logp):
    return policy_loss(logp, advantages, weight, old_logp=old_logp)[0]


def fused_every_option(logp, advantages, weight, old_logp, ref_logp, entropy):
    return policy_loss(
        logp, advantages, weight, old_logp=old_logp, dual_clip=3.0, ref_logp=ref_logp,
        kl_coef=0.1, entropy=entropy, entropy_coef=0.01,
    )[0]  # fmt: skip


def training(function, *inputs):
    """Gradients of the log-probs, and of the entropy where there is one."""
    leaves = [x.clone().requires_grad_() if i in (0, 5) else x for i, x in enumerate(inputs)]
    return lambda: torch.autograd.grad(function(*leaves), leaves[::5])


def gate(ours, theirs, inputs):
    def check():
        want = theirs(*(x.double() for x in inputs)).item()
        error = abs(ours(*inputs).item() - want)
        assert error < 1e-6 * (1 + abs(want)), f"loss off by {error}"

    return check


def samples(tokens, device):
    """What the plain loss takes, and what the loss with every option takes."""
    logp = -torch.rand(tokens, device=device) * 5
    noise = torch.randn(3, tokens, device=device)
    weight = torch.full((tokens,), 1 / tokens, device=device)
    plain = logp, noise[0], weight, logp + 0.2 * noise[1]
    return plain, (*plain, logp + 0.2 * noise[2], torch.rand(tokens, device=device))


def plain_case(tokens, device, targets):
    inputs, _ = samples(tokens, device)
    compiled = torch.compile(with_statistics)
    step = training(fused, *inputs)
    graph = {"fastpg, under a CUDA graph": step} if device == "cuda" else {}
    return Case(
        "policy_loss",
        f"forward + backward, {tokens} tokens",
        gate(fused, eager, inputs),
        {
            "fastpg, with its statistics": step,
            **graph,
            "eager, loss alone": training(eager, *inputs),
            "torch.compile, loss alone": training(torch.compile(eager), *inputs),
            "torch.compile, with the same statistics": training(
                lambda *args: compiled(*args)[0], *inputs
            ),
        },
        ours="fastpg, with its statistics",
        targets=targets,
        device=device,
        graphs=tuple(graph),
    )


def every_option_case(tokens, device, targets):
    plain, inputs = samples(tokens, device)
    return Case(
        "policy_loss",
        f"every option, forward + backward, {tokens} tokens",
        gate(fused_every_option, eager_every_option, inputs),
        {
            "fastpg, every option": training(fused_every_option, *inputs),
            "fastpg, plain": training(fused, *plain),
            "eager, loss alone": training(eager_every_option, *inputs),
            "torch.compile, loss alone": training(torch.compile(eager_every_option), *inputs),
        },
        ours="fastpg, every option",
        targets=targets,
        device=device,
    )


def cases(device):
    if device == "cuda":
        # Without the graph, Python's work before the launches is most of the time.
        yield plain_case(131_072, device, {"fastpg, under a CUDA graph": "<= 15 µs"})
    targets = {"eager, loss alone": ">= 5", "torch.compile, loss alone": ">= 2"}
    yield plain_case(TOKENS, device, targets)
    targets = {"fastpg, plain": ">= 0.67", "eager, loss alone": ">= 5"}
    yield every_option_case(TOKENS, device, targets)


def examples(device):
    """Small calls of the op."""
    logp, advantages, old_logp, ref_logp = torch.randn(4, 3, 7, device=device).unbind()
    weight = (advantages < 1).float()
    arguments = {"logp": logp, "advantages": advantages, "weight": weight, "old_logp": old_logp}
    terms = {"ref_logp": ref_logp, "kl_coef": 0.1, "entropy": ref_logp.abs(), "entropy_coef": 0.1}
    yield Example(
        fastpg.policy_loss,
        arguments | terms,
        differentiable=("logp",),
        forward_launches=2,
        backward_launches=1,
    )
    yield Example(
        fastpg.policy_loss,
        arguments | terms | {"surrogate": "sapo"},
        differentiable=("logp", "entropy"),
        variant="with an entropy",
    )
    yield Example(
        fastpg.policy_loss,
        arguments | {"level": "sequence"},
        differentiable=("logp",),
        variant="per sequence",
    )


def variants(few, capability):
    """What a GPU may be asked to compile."""
    from fastpg.ops.loss import policy_loss_triton as page

    surrogates = ("sapo", "ppo", "cispo", "reinforce")
    absent = dict.fromkeys(("sequence_log_ratio", "ref_logp", "entropy", "traced_options"), (None,))
    forward, kls = page.forward_kernel, ("k3", "k3_naive", "k2")
    warps = {"num_warps": (page.WARPS,)}
    yield from variants_of(forward, few, SURROGATE=surrogates, KL=kls, **warps)
    if not few:
        yield from variants_of(
            forward, few, old_logp=GIVEN_OR_NOT, SURROGATE=surrogates, KL=("k3",), **absent, **warps
        )
    yield from variants_of(page.merge_kernel, few)
    yield from variants_of(page.sequence_log_ratio_kernel, few, cu_seqlens=GIVEN_OR_NOT)
