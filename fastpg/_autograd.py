"""The gradient of an op, from records: one autograd function for all of them.

    policy_loss = Differentiable(
        "policy_loss",
        inputs=Inputs,
        saved=Saved,                         # what backward needs: any record
        differentiable=("logp", "entropy"),  # the inputs that may have a gradient
        forward=forward,                     # Inputs -> (results, Saved)
        backward=backward,                   # (Saved, a gradient for each result) -> Gradients
        constants=1,                         # how many results, the last ones, have no gradient
    )

No op has a second derivative: a backward with create_graph=True raises. torch's once_differentiable
would give a gradient that raises when it is differentiated, but torch.autograd.grad, which asks for
the gradient of some tensors only, would go past it, and a penalty be dropped in silence.

`Gradients` is a record of the gradients of the differentiable inputs in their order; None stands
for no gradient. Saved tensors are kept as torch wants them kept, so that a change in place between
forward and backward raises; and so does another shape or dtype, by x.data = y.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._record import Layout, without_lists

InputsT = TypeVar("InputsT", bound=NamedTuple)
SavedT = TypeVar("SavedT", bound=NamedTuple)


def needs_no_gradient(*tensors: Tensor | None) -> bool:
    """Whether no derivative is wanted: then an op skips its autograd function, and 5 of 16 us."""
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return False
    # In forward mode the function is taken, since it raises; the op would lose the tangents.
    return forward_ad._current_level < 0


class Differentiable(Generic[InputsT, SavedT]):
    """An op with a gradient, called with the record of its inputs.

    Args:
        name: The public name of the op, for messages.
        inputs: The record of its inputs.
        saved: The record of what backward needs.
        differentiable: The names of the inputs that may have a gradient: tensors, or lists of them.
        forward: Takes the inputs; returns the results, a tuple, and the saved record.
        backward: Takes the saved record and one gradient for each result that has one, None where
            nothing was made of the result; returns the record of gradients.
        constants: How many results have no gradient. They are the last ones.
        selective: Whether backward also takes `wanted`, a list of bool: for each differentiable
            input, in one list, whether its gradient is asked for. The others may then be None.
    """

    def __init__(
        self,
        name: str,
        *,
        inputs: type[InputsT],
        saved: type[SavedT],
        differentiable: tuple[str, ...],
        forward: Callable[[InputsT], tuple[tuple, SavedT]],
        backward: Callable[..., tuple],
        constants: int = 0,
        selective: bool = False,
    ) -> None:
        self.name, self.constants, self.selective = name, constants, selective
        self.forward, self.backward = forward, backward
        self.inputs, self.saved = Layout(inputs), Layout(saved)
        self.tensors = self.inputs.chosen(differentiable)
        self.function = _function(self)

    def __call__(self, x: InputsT) -> tuple:
        """The results; differentiable, unless no input wants a gradient."""
        tensors = self.tensors(x)
        if self.inputs.has_lists:
            tensors = without_lists(tensors)
        if needs_no_gradient(*tensors):
            return self.forward(x)[0]
        return self.function.apply(x, *tensors)


def _function(op: Differentiable[InputsT, SavedT]) -> type[torch.autograd.Function]:
    """The autograd function of an op. Its first argument is the record that the others are in."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: InputsT, *_tensors: Tensor | None) -> tuple:
            results, saved = op.forward(x)
            _save(ctx, op.saved, saved)
            ctx.set_materialize_grads(False)  # zeros for a result nobody used would be a launch
            if op.constants:
                ctx.mark_non_differentiable(*results[-op.constants :])
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple:
            if _are_none(grads):
                return (None,) * len(ctx.needs_input_grad)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(
                    f"{op.name}: its gradient is not differentiable, double backward is not "
                    f"supported; call it without create_graph=True"
                )
            return None, *_gradients(op, ctx, grads[: len(grads) - op.constants])

    return Function


def _are_none(grads: tuple) -> bool:
    """Whether no result has a gradient. A loop takes half the time of `all` here."""
    for grad in grads:  # noqa: SIM110
        if grad is not None:
            return False
    return True


def _save(ctx: Any, layout: Layout[SavedT], saved: SavedT) -> None:
    """Keeps the tensors of a record where torch checks and frees them, the rest as it is."""
    tensors, ctx.others = layout.split(saved)
    if layout.has_lists:
        ctx.lengths = [len(value) if isinstance(value, list) else None for value in tensors]
        tensors = without_lists(tensors)
    ctx.forms = _forms(tensors)
    ctx.save_for_backward(*tensors)


def _forms(tensors: Sequence) -> list:
    """What a kernel relies on: the shape and the dtype of each tensor, one after the other.

    A list of pairs would take half as long again, of 1 us in a call of 30.
    """
    forms: list = []
    for x in tensors:
        if x is not None:
            forms.append(x.shape)
            forms.append(x.dtype)
    return forms


def _restore(name: str, ctx: Any, layout: Layout[SavedT]) -> SavedT:
    """The record that `_save` kept.

    torch notices what was written to a saved tensor, but not that its memory was exchanged, by
    x.data = y. A kernel would then read beyond it.
    """
    tensors: Sequence = ctx.saved_tensors
    forms = _forms(tensors)
    if forms != ctx.forms:
        before, now = _first_difference(ctx.forms, forms)
        raise RuntimeError(
            f"{name}: a tensor that was saved for backward was {before}, and is {now} now"
        )
    if layout.has_lists:
        each = iter(tensors)
        tensors = [
            next(each) if length is None else [next(each) for _ in range(length)]
            for length in ctx.lengths
        ]
    return layout.join(tensors, ctx.others)


def _first_difference(before: list, now: list) -> tuple[str, str]:
    """The forms, in words, that the first tensor whose form has changed had and has."""
    # Each tensor has two entries, a shape and then a dtype.
    first = next(i for i in range(len(before)) if before[i] != now[i]) // 2 * 2
    return (
        f"{before[first + 1]} {tuple(before[first])}",
        f"{now[first + 1]} {tuple(now[first])}",
    )


def _gradients(op: Differentiable, ctx: Any, grads: tuple) -> Sequence[Tensor | None]:
    """The gradients of the differentiable inputs; None for one that wants none."""
    wanted = ctx.needs_input_grad[1:]
    saved = _restore(op.name, ctx, op.saved)
    if op.selective:
        gradients: Sequence = op.backward(saved, *grads, wanted=list(wanted))
    else:
        gradients = op.backward(saved, *grads)
    if op.inputs.has_lists:
        gradients = without_lists(gradients)
    if False not in wanted:
        return gradients
    return [x if want else None for x, want in zip(gradients, wanted, strict=True)]
