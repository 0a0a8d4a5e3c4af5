"""`fastpg verify`: what fastpg would replace in an installed trainer, and how it compares."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

import torch

from .verifying import Sizes

# Each is a module here, whose `verify` takes the sizes and the device.
INTEGRATIONS = ("trl", "verl", "openrlhf")

MEANINGS = {
    "vocab": "tokens of the vocabulary",
    "hidden": "width of the hidden states",
    "tokens": "tokens of a micro-batch",
}


def verify(argv: Sequence[str]) -> int:
    """Run `fastpg verify`.

    Args:
        argv: The arguments after it: a package, and the sizes of the case that is timed.

    Returns:
        The exit code: 0, 1 if fastpg is worse in anything, 2 if it replaces nothing.
    """
    parser = argparse.ArgumentParser(
        "fastpg verify",
        description="Compare a trainer's own functions with fastpg's, on this machine: errors "
        "against fp64, time and peak memory. It exits with 1 if fastpg is worse in anything.",
    )
    parser.add_argument("package", choices=INTEGRATIONS)
    for name, meaning in MEANINGS.items():
        default = Sizes._field_defaults[name]
        parser.add_argument(f"--{name}", type=positive, default=default, help=meaning)
    parser.add_argument("--device", type=available, default="cpu", help="cpu or cuda")
    options = vars(parser.parse_args(argv))
    package, device = options.pop("package"), options.pop("device")
    report = import_module(f"fastpg.integrations.{package}").verify(Sizes(**options), device=device)
    print(report)
    if not report.rows:
        return 2
    return 0 if report.ok else 1


def positive(text: str) -> int:
    """A number from the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def available(text: str) -> str:
    """A device from the command line, on which a tensor can be made."""
    try:
        torch.empty(1, device=text)
    except (RuntimeError, AssertionError) as error:
        # torch asserts that it was built with CUDA. More lines are advice on debugging.
        reason = str(error).strip().splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} is no device here: {reason}") from None
    return text
