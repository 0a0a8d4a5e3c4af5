"""python -m bench.smoke [cuda|cpu]: every op once, forward and backward, against its reference.

It takes seconds, and tells which ops are worth testing and timing at all: an op that does not
compile, or that is wrong, is named with its first error, and the others are tried all the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

import fastpg
from fastpg._op import OPS

from .__main__ import Results
from ._example import Example, examples

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # The tests ask for more.


@contextmanager
def references() -> Iterator[None]:
    """Runs every op on its reference, which is plain PyTorch, on any device."""
    kept = {op: (op.overload, op.kernels) for op in OPS.values()}
    for op in kept:
        op.overload, op.kernels = op.flat(op.reference), {}
    try:
        yield
    finally:
        for op, (overload, kernels) in kept.items():
            op.overload, op.kernels = overload, kernels


def results(example: Example) -> list[Tensor]:
    """What an op returns, and the gradients of its sum."""
    leaves = example.leaves()
    outputs = example.call(**leaves)
    if not leaves:
        return outputs
    total = sum(x.sum() for x in outputs if x.requires_grad)
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return [x.detach() for x in outputs] + list(gradients)


def check(example: Example) -> None:
    """Raises if an op is not its reference."""
    with references():
        wanted = results(example)
    for got, want in zip(results(example), wanted, strict=True):
        torch.testing.assert_close(got, want, **TOLERANCE)


def faults(device: str) -> dict[str, str]:
    """The examples that fail, and the last line of each error."""
    found = {}
    for example in examples(device):
        try:
            check(example)
            fastpg.check()
        except Exception as error:  # A kernel fails in many ways, and none may hide the next op.
            reason = [line for line in str(error).splitlines() if line.strip()]
            found[str(example)] = f"{type(error).__name__}: {' '.join(reason)[:300]}"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.smoke", description=__doc__)
    parser.add_argument("device", nargs="?", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a second folder for the rows")
    args = parser.parse_args()
    found = faults(args.device)
    for name, reason in found.items():
        print(f"WRONG: {name}: {reason}")
    rows = [{"op": "smoke", "case": name, "wrong": reason} for name, reason in found.items()]
    Results(args.device, args.out).append(rows)
    print(f"{len(found)} of {sum(1 for _ in examples(args.device))} examples fail")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
