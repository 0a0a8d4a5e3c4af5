"""An LM head, adapted by peft's LoRA or not, as the matrix products whose sum linear ops take.

h Wᵀ + b + Σ s (h Aᵀ) Bᵀ: of (h, s h Aᵀ, …) and (W, B, …)
"""

import sys
from typing import NamedTuple

from torch import Tensor, nn

from fastpg.ops.vocabulary.head_arguments import autocast


class Products(NamedTuple):
    """The factors of Σ_i hidden[i] @ weight[i].T + bias: [..., H_i], [V, H_i] and [V] or None."""

    hidden: tuple[Tensor, ...]
    weight: tuple[Tensor, ...]
    bias: Tensor | None


class UnknownHead(ValueError):
    """A head that computes something else than a sum of products. The message says what it is."""


def head_products(head: nn.Module, hidden: Tensor) -> Products:
    """What `head(hidden)` multiplies, LoRA adapters included.

    head: a `torch.nn.Linear`, or peft's LoRA or `modules_to_save` around one. Adapters that are
        merged, disabled or not active count as in peft; gradients reach A, B and W where wanted.
    hidden: the last hidden states [..., H].
    Returns (hidden, weight, bias), in autocast's dtype where autocast is on, for example for
    `linear_token_logprobs(hidden, weight, labels, bias=bias)`: hidden and weight of one tensor, and
    of one more, [..., r] and [V, r], for each active adapter. Where W is frozen its gradient costs
    nothing.

    Raises `UnknownHead` for other layers, dropout inside the adapter, DoRA and its like, and hooks,
    those on an adapter's A or B included.
    """
    _refuse_hooks(head, "the LM head")
    if type(head) is nn.Linear:
        h, w, bias = autocast(hidden, head.weight, head.bias)
        return Products((h,), (w,), bias)
    if _is_peft(head, "utils.other", "ModulesToSaveWrapper"):
        return head_products(_chosen(head), hidden)
    if _is_peft(head, "tuners.lora", "Linear"):
        return _with_adapters(head, head_products(head.base_layer, hidden))
    raise UnknownHead(f"the LM head is a {type(head).__module__}.{type(head).__qualname__}")


def _refuse_hooks(module: nn.Module, name: str) -> None:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise UnknownHead(f"{name} has a hook of its own")


def _is_peft(module: nn.Module, home: str, name: str) -> bool:
    """Whether module is of that class of peft, which need not be installed."""
    return type(module) is getattr(sys.modules.get(f"peft.{home}"), name, None)


def _chosen(wrapper: nn.Module) -> nn.Module:
    """The module that a `ModulesToSaveWrapper` calls."""
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or not set(active) <= set(wrapper.modules_to_save):
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


def _with_adapters(lora: nn.Module, base: Products) -> Products:
    """The product of the base layer, and those of the active adapters."""
    if lora.disable_adapters and lora.merged:
        raise UnknownHead("the LM head has a merged LoRA adapter that is disabled")
    if lora.disable_adapters or lora.merged:
        return base
    (h,), (w,), bias = base
    hidden, weight = [h], [w]
    for name in (name for name in lora.active_adapters if name in lora.lora_A):
        if name in lora.lora_variant:
            raise UnknownHead(f"the LM head's adapter {name!r} is not plain LoRA")
        if lora.lora_dropout[name].training and getattr(lora.lora_dropout[name], "p", 0) > 0:
            raise UnknownHead(f"the LM head's adapter {name!r} has dropout")
        for part in (lora.lora_A, lora.lora_B):
            _refuse_hooks(part[name], f"the LM head's adapter {name!r}")
        a, b, scaling = lora.lora_A[name].weight, lora.lora_B[name], lora.scaling[name]
        low_rank = nn.functional.linear(h.to(a.dtype), a) * scaling
        hidden.append(low_rank.to(h.dtype))
        weight.append(b.weight.to(w.dtype))
        if b.bias is not None:  # lora_bias, which peft allows only where the base layer has one
            bias = bias + (b.bias * scaling).to(bias.dtype)
    return Products((*hidden,), (*weight,), bias)
