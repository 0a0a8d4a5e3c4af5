"""Small calls of every public op: what the tests ask of all ops, and what the overhead is timed on.

Each `bench_<op>.py` has a function `examples(device)`. A new op is found through it: no list of ops
is kept anywhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Example:
    """A public op, and arguments for it by name.

    Attributes:
        function: The public op.
        arguments: What it is called with, by name. Tensors are on the device that was asked for.
        differentiable: The arguments that get a gradient, by name.
        forward_launches: The most kernels that a forward on a GPU may launch; None: not counted.
        backward_launches: The same for a backward.
        variant: What tells this example from others of the same op.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    differentiable: tuple[str, ...] = ()
    forward_launches: int | None = None
    backward_launches: int | None = None
    variant: str = ""

    @property
    def op(self) -> str:
        """The name of the public op."""
        return self.function.__name__

    def __str__(self) -> str:
        return f"{self.op}, {self.variant}" if self.variant else self.op

    def call(self, **changed: Any) -> list[Tensor]:
        """The tensors that the op returns, with some of the arguments changed."""
        return tensors_of(self.function(**self.arguments | changed))

    def leaves(self) -> dict[str, Any]:
        """Copies of the differentiable arguments that require a gradient."""
        return {
            name: self.arguments[name].detach().clone().requires_grad_()
            for name in self.differentiable
        }


def tensors_of(result: Any) -> list[Tensor]:
    """Every tensor in what an op returns: results, and the values of statistics."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [tensor for part in result for tensor in tensors_of(part)]
    return []


def benchmarks() -> dict[str, str]:
    """The module of each benchmark, by what it measures."""
    paths = sorted(ROOT.rglob("bench_*.py"))
    return {
        path.stem.removeprefix("bench_"): ".".join(
            path.relative_to(ROOT.parent).with_suffix("").parts
        )
        for path in paths
    }


def modules() -> dict[str, ModuleType]:
    """The benchmarks of the chapters, imported, by the op that they measure."""
    return {
        name: importlib.import_module(module)
        for name, module in benchmarks().items()
        if module.count(".") == 2  # such as bench.credit.bench_gae
    }


def examples(device: str = "cpu") -> Iterator[Example]:
    """The examples of every op, always the same."""
    for module in modules().values():
        if hasattr(module, "examples"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                yield from module.examples(device)
