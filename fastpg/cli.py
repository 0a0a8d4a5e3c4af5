"""The `fastpg` command: what is installed, and `fastpg train`."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import fastpg

if TYPE_CHECKING:
    from fastpg.trainer import PPOTrainer

REJECTED, INTERRUPTED = 2, 130
"""Exit codes besides 0: input that cannot be used, and Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["train"]:
        return train(argv[1:])
    parser = argparse.ArgumentParser("fastpg", description=print_kernels.__doc__)
    commands = parser.add_subparsers(title="commands")
    commands.add_parser("train", help="train a policy; `fastpg train --help` lists the settings")
    parser.parse_args(argv)
    print_kernels()
    return 0


def print_kernels() -> None:
    """Without a command: which kernel serves which op on which device."""
    kernels = fastpg.kernels_of()
    devices = sorted({device for row in kernels.values() for device in row})
    lines = [["op", *devices]]
    lines += [[op, *(row.get(device, "-") for device in devices)] for op, row in kernels.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
    versions = [f"{name} {_version(name)}" for name in ("torch", "triton")]
    print(f"\nfastpg {fastpg.__version__}, {', '.join(versions)}")
    print(f"C++ extension: {fastpg.extension_status()}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def train(argv: Sequence[str]) -> int:
    """Train as `argv` says. What cannot be used is one sentence on stderr and exit code 2."""
    try:
        from fastpg.trainer import InputError
    except ImportError as error:
        print(f"fastpg train needs {error.name}: pip install fastpg[trainer]", file=sys.stderr)
        return REJECTED
    try:
        _build_trainer(argv).train()
    except InputError as error:
        print(f"fastpg train: {error}", file=sys.stderr)
        return REJECTED
    except KeyboardInterrupt:
        print("\nfastpg train: interrupted; the files of finished steps remain.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _build_trainer(argv: Sequence[str]) -> "PPOTrainer":
    """The user's own run, or without a model, dataset and reward the embedded task."""
    from transformers.utils.logging import disable_progress_bar

    from fastpg.tasks import reviews
    from fastpg.trainer import PPOTrainer
    from fastpg.trainer.config import InputError, from_mapping
    from fastpg.trainer.options import RunConfig, load_jsonl, read_options
    from fastpg.trainer.rewards import load_reward

    disable_progress_bar()
    options = read_options(argv)
    own = {name: options.get(name) for name in ("model", "dataset", "reward")}
    if not any(own.values()):
        usual = reviews.DEFAULTS | reviews.OF_ALGORITHM.get(str(options.get("algorithm")), {})
        args = from_mapping(RunConfig, usual | options)
        print(reviews.INTRODUCTION.format(algorithm=args.row.title), flush=True)
        return reviews.build_trainer(args)
    if missing := [f"--{name}" for name, value in own.items() if value is None]:
        raise InputError(f"Your own run also needs {' and '.join(missing)}.")
    args = from_mapping(RunConfig, options)
    return PPOTrainer(
        args.model,
        load_reward(args.reward),
        args,
        train_dataset=load_jsonl(args.dataset),
        eval_dataset=load_jsonl(args.eval_dataset) if args.eval_dataset else None,
    )
