"""A calculation on given inputs, who can do it, and how right they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .timing import Case

Result = Tensor | tuple[Tensor, ...]
Solution = Callable[..., Result]

OURS = "fastpg"
COMPILED = "torch.compile"
LEAST_ROUNDS = 3  # of timings, however long they take
PLAIN = "PyTorch"  # The lines that people write; where there are several, the most usual.

# The largest error that passes, relative to the norm of what is right.
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
TOLERANCE = 1e-4  # of the other types


class Errors(NamedTuple):
    """Of a solution: in the norm, relative to what is right.

    value: That of the results.
    gradient: That of the gradients; NaN where none is asked for.
    allowed: The largest that passes, by the types of inputs and results.
    """

    value: float
    gradient: float
    allowed: float

    @property
    def too_large(self) -> str:
        """What is wrong, or nothing."""
        if self.value > self.allowed:
            return f"values off by a relative {self.value:.2g}"
        if self.gradient > self.allowed:
            return f"gradients off by a relative {self.gradient:.2g}"
        return ""


@dataclass(frozen=True)
class Problem:
    """One calculation.

    Attributes:
        op: What is computed.
        name: The sizes.
        inputs: The arguments of every solution.
        leaves: Which of them get a gradient: by position; none for a forward alone.
        exact: The calculation in plain PyTorch, which is given the inputs in fp64.
        solutions: Whoever can do it, by name. A solution may also return the sum of the result.
        few: Inputs that the solutions are checked on, where fp64 would take too much memory.
        operations: How many additions, multiplications and exponentials it needs, each counted
            as one.
        calls: At least so many per timing.
        compiled: The solution that torch.compile is given.
        note: Why something may be faster than fastpg, where it is.
    """

    op: str
    name: str
    inputs: tuple[Tensor, ...]
    leaves: tuple[int, ...]
    exact: Solution
    solutions: dict[str, Solution]
    few: tuple[Tensor, ...] = ()
    operations: float = 0.0
    calls: int = 1
    compiled: str = PLAIN
    note: str = ""

    @property
    def least_bytes(self) -> int:
        """What has to be moved at least: the inputs read, and the gradients written, once."""
        gradients = sum(self.inputs[i].nbytes for i in self.leaves)
        return sum(x.nbytes for x in self.inputs) + gradients

    @property
    def checked(self) -> tuple[Tensor, ...]:
        """The inputs that every solution is checked on."""
        return self.few or self.inputs

    @cached_property
    def wanted(self) -> tuple[list[Tensor], list[Tensor]]:
        """What is right for them: values and gradients in fp64."""
        doubles = tuple(x.double() if x.is_floating_point() else x for x in self.checked)
        return evaluated(self.exact, doubles, self.leaves)

    def case(self, *, compiled: bool, found: dict[str, Errors]) -> Case:
        """The problem as something to be timed.

        Args:
            compiled: Whether torch.compile of the usual lines takes part.
            found: Where the errors of each solution go, as it is checked.
        """
        solutions = dict(self.solutions)
        if compiled:
            # Where fewer rows are checked, it would take the size of the others for a variable.
            solutions[COMPILED] = torch.compile(solutions[self.compiled], dynamic=False)
        gates = {name: gate(self, name, solution, found) for name, solution in solutions.items()}
        return Case(
            self.op,
            self.name,
            gates.pop(OURS),
            {name: self.call(solution) for name, solution in solutions.items()},
            ours=OURS,
            gates=gates,
            device=self.inputs[0].device.type,
            results_mib=sum(self.inputs[i].nbytes for i in self.leaves) / 2**20,
            least=LEAST_ROUNDS,
            calls=self.calls,
        )

    def call(self, solution: Solution) -> Callable[[], object]:
        """A forward, and a backward if anything gets a gradient, which is dropped."""
        if not self.leaves:
            return lambda: solution(*self.inputs)
        inputs = with_leaves(self.inputs, self.leaves)
        return lambda: gradients(total(solution(*inputs)), inputs)


def errors(problem: Problem, solution: Solution) -> Errors:
    """The errors of a solution on the inputs that are checked."""
    # Some packages write the gradient over the logits.
    copies = tuple(x.clone() for x in problem.checked)
    got, got_gradients = evaluated(solution, copies, problem.leaves)
    want, gradients_wanted = problem.wanted
    if len(got) == 1 and got[0].dim() == 0:
        want = [sum((x.sum() for x in want), torch.zeros((), dtype=torch.float64))]
    pairs = list(zip(got, want, strict=True))
    of_gradients = list(zip(got_gradients, gradients_wanted, strict=True))
    return Errors(
        max(off(*pair) for pair in pairs),
        max((off(*pair) for pair in of_gradients), default=math.nan),
        max(TOLERANCES.get(x.dtype, TOLERANCE) for x in (*copies, *got)),
    )


def gate(
    problem: Problem, name: str, solution: Solution, found: dict[str, Errors]
) -> Callable[[], None]:
    """A check that raises AssertionError if a solution is wrong, and keeps its errors."""

    def check() -> None:
        found[name] = errors(problem, solution)
        assert not found[name].too_large, found[name].too_large

    return check


def evaluated(
    solution: Solution, inputs: tuple[Tensor, ...], leaves: tuple[int, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """What a solution returns, and the gradients of its sum."""
    inputs = with_leaves(inputs, leaves)
    result = solution(*inputs)
    values = [x.detach() for x in parts(result)]
    return values, list(gradients(total(result), inputs)) if leaves else []


def off(got: Tensor, want: Tensor) -> float:
    """The error relative to the norm of what is right; NaN is an error without bounds."""
    if got.shape != want.shape:
        return math.inf
    error = ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()
    return math.inf if math.isnan(error) else error


def parts(result: Result) -> Iterator[Tensor]:
    """The tensors of a result."""
    yield from (result,) if isinstance(result, Tensor) else result


def total(result: Result) -> Tensor:
    """The sum of everything that has a gradient."""
    sums = [x.sum() for x in parts(result) if x.requires_grad]
    return torch.stack(sums).sum() if len(sums) > 1 else sums[0]


def with_leaves(inputs: tuple[Tensor, ...], leaves: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The inputs, of which some require a gradient."""
    return tuple(x.detach().requires_grad_(i in leaves) for i, x in enumerate(inputs))


def gradients(loss: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of a loss."""
    return torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])
