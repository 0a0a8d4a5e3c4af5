"""An LM head, adapted by peft's LoRA or not, as the one matrix product that linear ops take.

h Wᵀ + b + Σ s (h Aᵀ) Bᵀ  =  [h, s h Aᵀ, …] [W, B, …]ᵀ + b
"""

import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Product(NamedTuple):
    """The factors of hidden @ weight.T + bias: [..., H], [V, H] and [V] or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class UnknownHead(ValueError):
    """A head that computes something else than one product. The message says what it is."""


def head_product(head: nn.Module, hidden: Tensor) -> Product:
    """What `head(hidden)` multiplies, LoRA adapters included.

    head: a `torch.nn.Linear`, or peft's LoRA or `modules_to_save` around one. Adapters that are
        merged, disabled or not active count as in peft; gradients reach A, B and W where wanted.
    hidden: the last hidden states [..., H].
    Returns (hidden, weight, bias), in autocast's dtype where autocast is on, for example for
    `linear_token_logprobs(hidden, weight, labels, bias=bias)`. With active adapters, whose ranks
    add up to r, hidden is [..., H + r], and weight a new tensor [V, H + r]. Where W is frozen that
    is not free: weight takes memory anew, and as it requires a gradient for B, backward makes that
    of all its columns, one product of N V H and a tensor of W's size, of which B's r are kept.

    Raises `UnknownHead` for other layers, dropout inside the adapter, DoRA and its like, and hooks,
    those on an adapter's A or B included.
    """
    _refuse_hooks(head, "the LM head")
    if type(head) is nn.Linear:
        factors = hidden, head.weight, head.bias
        return Product(*(x if x is None else _autocast(x) for x in factors))
    if _is_peft(head, "utils.other", "ModulesToSaveWrapper"):
        return head_product(_chosen(head), hidden)
    if _is_peft(head, "tuners.lora", "Linear"):
        return _with_adapters(head, head_product(head.base_layer, hidden))
    raise UnknownHead(f"the LM head is a {type(head).__module__}.{type(head).__qualname__}")


def _refuse_hooks(module: nn.Module, name: str) -> None:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise UnknownHead(f"{name} has a hook of its own")


def _is_peft(module: nn.Module, home: str, name: str) -> bool:
    """Whether module is of that class of peft, which need not be installed."""
    return type(module) is getattr(sys.modules.get(f"peft.{home}"), name, None)


def _autocast(x: Tensor) -> Tensor:
    """x in the dtype that a linear layer would take it in."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _chosen(wrapper: nn.Module) -> nn.Module:
    """The module that a `ModulesToSaveWrapper` calls."""
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or not set(active) <= set(wrapper.modules_to_save):
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


def _with_adapters(lora: nn.Module, base: Product) -> Product:
    """The product of the base layer, augmented by the active adapters."""
    if lora.disable_adapters and lora.merged:
        raise UnknownHead("the LM head has a merged LoRA adapter that is disabled")
    if lora.disable_adapters or lora.merged:
        return base
    hidden, weight, bias = [base.hidden], [base.weight], base.bias
    for name in (name for name in lora.active_adapters if name in lora.lora_A):
        if name in lora.lora_variant:
            raise UnknownHead(f"the LM head's adapter {name!r} is not plain LoRA")
        if lora.lora_dropout[name].training and getattr(lora.lora_dropout[name], "p", 0) > 0:
            raise UnknownHead(f"the LM head's adapter {name!r} has dropout")
        for part in (lora.lora_A, lora.lora_B):
            _refuse_hooks(part[name], f"the LM head's adapter {name!r}")
        a, b, scaling = lora.lora_A[name].weight, lora.lora_B[name], lora.scaling[name]
        low_rank = nn.functional.linear(base.hidden.to(a.dtype), a) * scaling
        hidden.append(low_rank.to(base.hidden.dtype))
        weight.append(b.weight.to(base.weight.dtype))
        if b.bias is not None:  # lora_bias, which peft allows only where the base layer has one
            bias = bias + (b.bias * scaling).to(bias.dtype)
    return Product(torch.cat(hidden, -1), torch.cat(weight, -1), bias)
