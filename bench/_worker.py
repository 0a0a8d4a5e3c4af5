"""Times fastpg of one tree, a request at a time. `bench/regression.py` compares two trees with it.

    python bench/_worker.py TREE

It takes the benchmarks from this folder's repository, and the package `fastpg` from TREE. Each line
of its input is a JSON list: an example's name, "forward" or "backward", and a number of calls. Each
line of its output is the seconds that one call took, or "unknown" for an example that TREE does not
know.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

UNKNOWN = "unknown"


def import_package_from(tree: Path) -> None:
    """Puts the package of a tree, and nothing else of it, before everything else on the path."""
    folder = Path(tempfile.mkdtemp(prefix="fastpg-worker-"))
    atexit.register(shutil.rmtree, folder)
    os.symlink(tree / "fastpg", folder / "fastpg")
    sys.path[:0] = [str(folder), str(Path(__file__).parents[1])]


def calls() -> dict[tuple[str, str], Callable[[], object]]:
    """Every example, forward alone and with its backward."""
    import torch

    import fastpg

    # An earlier package has not every op: the examples of those that it lacks are skipped.
    fastpg.__getattr__ = unknown_op
    # The benchmarks inside the package are those of this folder's repository, as `examples` are: an
    # earlier package has none, or others.
    fastpg.__path__.insert(0, str(Path(__file__).parents[1] / "fastpg"))
    import fastpg.bench

    fastpg.__path__.pop(0)
    from bench._example import examples

    torch.set_num_threads(1)  # on a busy machine torch's threads wait for one another

    def training(example):
        leaves = example.leaves()
        inputs = list(leaves.values())
        upstream = torch.ones_like(example.call(**leaves)[0])
        return lambda: torch.autograd.grad(example.call(**leaves)[0], inputs, upstream)

    found: dict[tuple[str, str], Callable[[], object]] = {}
    for example in examples():
        try:
            example.call()
        except (TypeError, ValueError):  # an earlier package does not know all arguments
            continue
        found[str(example), "forward"] = example.call
        if example.differentiable:
            found[str(example), "backward"] = training(example)
    return found


def unknown_op(name: str) -> Callable[..., object]:
    """Stands for an op that a package does not have yet."""
    if name.startswith("_"):
        raise AttributeError(name)

    def op(*_: object, **__: object) -> object:
        raise TypeError(f"{name} is unknown")

    return op


def main() -> None:
    import_package_from(Path(sys.argv[1]).resolve())
    known = calls()
    print("ready", flush=True)
    for line in sys.stdin:
        name, direction, count = json.loads(line)
        if (name, direction) not in known:
            print(UNKNOWN, flush=True)
            continue
        call = known[name, direction]
        begin = time.perf_counter()
        for _ in range(count):
            call()
        print((time.perf_counter() - begin) / count, flush=True)


if __name__ == "__main__":
    main()
