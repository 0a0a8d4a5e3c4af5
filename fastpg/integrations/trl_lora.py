"""A LoRA adapter on the LM head of a model that TRL trains.

`add_fused_lm_head` of TRL 1.15 and later gives a model a forward that reads `lm_head.weight` alone.
An adapter would be ignored, so trainers refuse one. Here that forward says whose head it reads, and
what stands for TRL's function multiplies by the adapter's matrices too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from types import MethodType
from typing import Any

from torch import Tensor, nn

from fastpg.ops.vocabulary.head import Head

from .patching import Replacement
from .peft import head_products
from .trl_logits import UTILS

# The trainers that refuse an adapter on the LM head, each by its own name for peft's class.
REFUSING = ("grpo", "rloo", "sft", "dpo", "kto")


class NoLayer:
    """Stands for a class that no object is to be an instance of."""


class RunningHead:
    """The LM head of the model whose fused forward runs, where it has an adapter."""

    def __init__(self) -> None:
        self.layer: nn.Module | None = None

    def products(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
        """What makes the logits: hidden times weight, and the adapter's product."""
        if self.layer is None:
            return Head([hidden], [weight], bias)
        return head_products(self.layer, hidden)

    def announced_by(self, add_fused_lm_head: Callable[..., None]) -> Callable[..., None]:
        """TRL's function, followed by what makes the model's forward announce its head."""
        running = self

        @wraps(add_fused_lm_head)
        def add(model: Any, *args: Any, **kwargs: Any) -> None:
            add_fused_lm_head(model, *args, **kwargs)
            fused = model.forward

            @wraps(fused.__func__)  # `generate` reads its signature
            def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
                if not fused_lm_head:
                    return fused(*args, **kwargs)
                layer = self.get_output_embeddings()
                running.layer = layer if is_adapted(layer) else None
                try:
                    return fused(*args, fused_lm_head=True, **kwargs)
                finally:
                    running.layer = None

            model.forward = MethodType(forward, model)

        return add


def is_adapted(layer: nn.Module) -> bool:
    """Whether peft has put an adapter around a layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(layer, BaseTunerLayer)


def replacements(running: RunningHead) -> Iterator[Replacement]:
    """Lets trainers have an adapter on the LM head, and their models' forward announce it."""
    yield Replacement(f"{UTILS}.add_fused_lm_head", running.announced_by)
    for name in REFUSING:
        target = f"trl.trainer.{name}_trainer.BaseTunerLayer"
        yield Replacement(target, lambda _: NoLayer, everywhere=False)
