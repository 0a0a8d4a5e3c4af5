"""The cases of `fastpg verify trl`: what TRL's trainers ask its functions for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .trl_head import OUTPUTS
from .trl_logits import IGNORED, UTILS
from .verifying import Case, Results, Sizes

FORBIDDEN = 9
PROMPT = 5  # one token of five is of a prompt, in the case that is timed
SMALL = Sizes(vocab=1000, hidden=64, tokens=48)


class Head(NamedTuple):
    """What is special about a case."""

    temperature: float = 0.7
    softcap: float | None = None
    scale: float | None = None
    outputs: tuple[str, ...] = ("log_probs", "entropy")
    logits: bool = False  # whether the function takes logits
    logged: bool = False  # whether the entropy is logged only, and has no gradient


def cases(sizes: Sizes, device: str) -> Iterator[Case]:
    """The cases of the installed release."""
    utils = import_module(UTILS)
    if hasattr(utils, "add_fused_lm_head"):
        return from_hidden(sizes, device)
    return from_logits(sizes, device)


def from_hidden(sizes: Sizes, device: str) -> Iterator[Case]:
    """Those of TRL 1.15 and later, whose models get a head from `add_fused_lm_head`."""
    small, plain = inputs(SMALL, device), Head()
    masked = {"labels": small["labels"].masked_fill(small["labels"] % 3 == 0, IGNORED)}
    empty = {"labels": torch.full_like(small["labels"], IGNORED)}
    yield case("log-probs and entropy", small, plain)
    yield case("log-probs alone, T=1", small, Head(1.0, outputs=("log_probs",)))
    yield case("all five outputs", small, Head(outputs=OUTPUTS))
    yield case("softcap 5, scale 0.5", small, Head(softcap=5.0, scale=0.5))
    yield case("masked labels", small | masked, plain)
    yield case("an empty micro-batch", small | empty, plain)
    yield case("logits of -inf", small | forbidden(small), plain)
    yield case("bf16", {name: halved(x) for name, x in small.items()}, plain)
    yield from of_size(sizes, device, plain)


def from_logits(sizes: Sizes, device: str) -> Iterator[Case]:
    """Those of TRL up to 1.14, whose functions take logits."""
    small, plain = inputs(SMALL, device), Head(logits=True)
    none = {name: small[name].detach()[:0].requires_grad_() for name in ("hidden",)}
    yield case("log-probs and entropy", small, plain)
    yield case("no tokens", small | none | {"labels": small["labels"][:0]}, plain)
    yield case("logits of -inf", small | forbidden(small), plain)
    yield case("bf16", {name: halved(x) for name, x in small.items()}, plain)
    yield from of_size(sizes, device, plain)


def of_size(sizes: Sizes, device: str, head: Head) -> Iterator[Case]:
    """The errors of a few tokens of a large vocabulary; time and memory of many.

    The latter is what GRPO asks for: a prompt without labels, and an entropy that is logged.
    """
    few = sizes._replace(tokens=min(sizes.tokens, 16))
    title = f"V={sizes.vocab} H={sizes.hidden}"
    yield case(f"{title}, {few.tokens} tokens", inputs(few, device), head)
    many = inputs(sizes, device)
    if not head.logits:
        many["labels"][: sizes.tokens // PROMPT] = IGNORED
    timed = case(f"{title}, {sizes.tokens} tokens, as GRPO", many, head._replace(logged=True))
    yield timed._replace(exact=None)


def inputs(sizes: Sizes, device: str) -> dict[str, Tensor]:
    """Hidden states, an LM head and labels; half the labels are likely ones."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sizes.tokens, sizes.hidden, generator=generator)
    weight = torch.randn(sizes.vocab, sizes.hidden, generator=generator) / sizes.hidden**0.5 * 2
    bias = torch.randn(sizes.vocab, generator=generator)
    labels = torch.randint(sizes.vocab, (sizes.tokens,), generator=generator)
    floats = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {name: x.to(device).requires_grad_() for name, x in floats.items()}
    return leaves | {"labels": labels.to(device)}


def forbidden(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """A bias that forbids the first tokens, and labels that are others."""
    bias = given["bias"].detach().clone()
    bias[:FORBIDDEN] = -torch.inf
    return {"bias": bias.requires_grad_(), "labels": given["labels"].clamp(min=FORBIDDEN)}


def halved(x: Tensor) -> Tensor:
    """A tensor in bf16, if it is one of numbers."""
    return x.detach().bfloat16().requires_grad_() if x.is_floating_point() else x


def case(name: str, given: dict[str, Tensor], head: Head) -> Case:
    """A call as TRL's trainers make it."""
    run = call_of_logits if head.logits else call_of_hidden
    return Case(name, given, partial(run, head), partial(exact, head))


class Stub:
    """As much of a model as `add_fused_lm_head` looks at. Its backbone returns what it is given."""

    def __init__(self, weight: Tensor, bias: Tensor | None, head: Head) -> None:
        text = SimpleNamespace(
            final_logit_softcapping=head.softcap, logit_scale=head.scale, model_type="stub"
        )
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.lm_head = SimpleNamespace(weight=weight, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """What `add_fused_lm_head` puts its own in place of."""
        raise NotImplementedError

    def base_model(self, hidden: Tensor, **_: object) -> SimpleNamespace:
        """The backbone."""
        return SimpleNamespace(last_hidden_state=hidden)

    model = base_model

    def get_output_embeddings(self) -> SimpleNamespace:
        """The LM head."""
        return self.lm_head


def call_of_hidden(
    head: Head, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor
) -> Results:
    """The forward that `add_fused_lm_head` gives a model."""
    model: Any = Stub(weight, bias, head)
    utils = import_module(UTILS)
    utils.add_fused_lm_head(model, temperature=head.temperature, outputs=head.outputs)
    found = model.forward(hidden[None], shift_labels=labels[None], fused_lm_head=True)
    if head.logged:
        found.entropy = found.entropy.detach()
    return [getattr(found, name) for name in OUTPUTS]


def call_of_logits(
    head: Head, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor
) -> Results:
    """What a trainer does with the logits of a model."""
    utils = import_module(UTILS)
    logits = (nn.functional.linear(hidden, weight, bias) / head.temperature)[None]
    logp = utils.selective_log_softmax(logits, labels[None])
    if not hasattr(utils, "entropy_from_logits"):
        return [logp, None, None, None, None]
    with torch.set_grad_enabled(not head.logged):
        entropy = utils.entropy_from_logits(logits)
    return [logp, entropy, None, None, None]


def exact(head: Head, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Results:
    """All outputs that are asked for, from their formulas."""
    z = nn.functional.linear(hidden, weight, bias) * (head.scale or 1.0)
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    z = (z / head.temperature)[None]
    kept, label = (labels != IGNORED)[None], labels.clamp(min=0)[None, :, None]
    logp = z.log_softmax(-1)
    p = logp.exp()
    constant = p.detach()
    results = {
        "log_probs": logp.gather(-1, label)[..., 0],
        "entropy": -(p * logp.masked_fill(p == 0, 0.0)).sum(-1),
        "log_sum_sq_probs": (constant * constant).sum(-1).log(),
        "mean_logits": z.detach().mean(-1),
        "is_top1": (z.detach().argmax(-1) == label[..., 0]).double(),
    }
    return [results[name].where(kept, 0.0) if name in head.outputs else None for name in OUTPUTS]
