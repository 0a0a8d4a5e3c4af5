"""An LM head, adapted by peft's LoRA or not, as what the linear ops take: a sum of products.

h Wᵀ + b + Σ s (h Aᵀ) Bᵀ    has    hidden = [h, s h Aᵀ, …]    and    head_weight = [W, B, …]
"""

import sys
from typing import Any, cast

from torch import Tensor, nn

from fastpg.ops.vocabulary.head import Head
from fastpg.ops.vocabulary.head_arguments import autocast


class UnknownHead(ValueError):
    """A head that computes something else than a sum of products. The message says what it is."""


def head_products(lm_head: nn.Module, hidden: Tensor) -> Head:
    """What `lm_head(hidden)` multiplies and adds, LoRA adapters included.

    Args:
        lm_head: A `torch.nn.Linear`, or peft's LoRA or `modules_to_save` around one. Adapters that
            are merged, disabled or not active count as in peft; gradients reach A, B and W where
            wanted. Where W is frozen its gradient costs nothing.
        hidden: The last hidden states [..., H].

    Returns:
        The head, in autocast's dtype where autocast is on: hidden and head_weight of one tensor,
        and of one more, [..., r] and [V, r], for each active adapter. It is for
        `linear_token_logprobs(head.hidden, head.head_weight, labels, bias=head.bias)`.

    Raises:
        UnknownHead: The layer is another one; or there is dropout inside the adapter, DoRA or its
            like, or a hook, be it on an adapter's A or B.

    Example:
        >>> from fastpg.integrations.peft import head_products
        >>> head = head_products(torch.nn.Linear(4, 5, bias=False), torch.zeros(2, 4))
        >>> len(head.hidden), head.head_weight[0].shape, head.bias
        (1, torch.Size([5, 4]), None)
    """
    _refuse_hooks(lm_head, "the LM head")
    if type(lm_head) is nn.Linear:
        return autocast(Head([hidden], [lm_head.weight], lm_head.bias))
    if _is_peft(lm_head, "utils.other", "ModulesToSaveWrapper"):
        return head_products(_chosen(lm_head), hidden)
    if _is_peft(lm_head, "tuners.lora", "Linear"):
        return _with_adapters(lm_head, head_products(cast(nn.Module, lm_head.base_layer), hidden))
    raise UnknownHead(f"the LM head is a {type(lm_head).__module__}.{type(lm_head).__qualname__}")


def _refuse_hooks(module: nn.Module, name: str) -> None:
    """Raises for a module that does more than its forward says."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise UnknownHead(f"{name} has a hook of its own")


def _is_peft(module: nn.Module, home: str, name: str) -> bool:
    """Whether module is of that class of peft, which need not be installed."""
    return type(module) is getattr(sys.modules.get(f"peft.{home}"), name, None)


def _chosen(wrapper: Any) -> nn.Module:
    """The module that a `ModulesToSaveWrapper` calls."""
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or not set(active) <= set(wrapper.modules_to_save):
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


def _with_adapters(lora: Any, base: Head) -> Head:
    """The product of the base layer, and those of the active adapters."""
    if lora.disable_adapters and lora.merged:
        raise UnknownHead("the LM head has a merged LoRA adapter that is disabled")
    if lora.disable_adapters or lora.merged:
        return base
    h, w, bias = base.hidden[0], base.head_weight[0], base.bias
    hidden, head_weight = [h], [w]
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
        head_weight.append(b.weight.to(w.dtype))
        # peft allows lora_bias only where the base layer has a bias.
        if b.bias is not None and bias is not None:
            bias = bias + (b.bias * scaling).to(bias.dtype)
    return Head(hidden, head_weight, bias)
