"""The worst that the machine code of a kernel may become: `python -m bench.aot` fails beyond it.

A bar is what a kernel reaches today, or what it is meant to reach, on sm_80, sm_90 and sm_100 and
with every supported Triton. Whoever makes a kernel better lowers its bar.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ._variant import Variant

if TYPE_CHECKING:
    from .aot import Line


@dataclass(frozen=True)
class Bar:
    """What a sweep may cost.

    Attributes:
        op: The op of the kernel.
        kernel: Its name.
        sweep: "read", "write" or "read+write".
        constants: The compile-time arguments of the variants that the bar is for.
        instructions: The most instructions for an element.
        shuffles: The most shuffles for an element.
        load: The fewest bytes of a thread's load.
        store: The fewest bytes of a thread's store.
        in_flight: The fewest bytes of loads under way on a multiprocessor.
    """

    op: str
    kernel: str
    sweep: str
    constants: dict[str, object] = field(default_factory=dict)
    instructions: float = float("inf")
    shuffles: float = 0.0
    load: int = 0
    store: int = 0
    in_flight: int = 0

    def is_for(self, line: Line, variant: Variant) -> bool:
        """Whether a sweep of a variant is held to this bar."""
        same = (self.op, self.kernel, self.sweep) == (line.op, line.kernel, line.sweep)
        known = variant.constants
        return same and all(known.get(name) == value for name, value in self.constants.items())

    def faults(self, line: Line) -> list[str]:
        """What is worse than the bar, in words."""
        at_most = ("instructions", "shuffles")
        at_least = ("load", "store", "in_flight")
        found = [
            f"{name} {getattr(line, name):.2f} > {getattr(self, name)}"
            for name in at_most
            if getattr(line, name) > getattr(self, name)
        ]
        return found + [
            f"{name} {getattr(line, name)} < {getattr(self, name)}"
            for name in at_least
            if getattr(line, name) < getattr(self, name)
        ]


KIB = 1024
TYPICAL: dict[str, object] = {"ENTROPY": True, "SOFTCAP": False, "ALIGNED": True}
NO_ENTROPY: dict[str, object] = {"ENTROPY": False, "SOFTCAP": False, "ALIGNED": True}
UNALIGNED: dict[str, object] = {"ENTROPY": True, "SOFTCAP": False, "ALIGNED": False}

LONG: dict[str, object] = {"VECTORS": 2}  # a row long enough for tiles of two vectors

READ, BOTH = "read", "read+write"
LOGP, ROWS = "token_logprobs", "policy_loss_from_logits"

BARS = (
    # Rows of logits: what the memory's bandwidth needs on an H100 is about 12 instructions, all
    # accesses 16 bytes wide, and 25 KiB under way. No thread waits for another in the loop.
    Bar(LOGP, "forward_kernel", READ, TYPICAL | LONG, 12.0, load=16, in_flight=32 * KIB),
    Bar(LOGP, "forward_kernel", READ, NO_ENTROPY | LONG, 9.0, load=16, in_flight=32 * KIB),
    Bar(LOGP, "forward_kernel", READ, TYPICAL, 14.0, load=16, in_flight=24 * KIB),
    Bar(LOGP, "forward_kernel", READ, UNALIGNED, 15.0, load=2, in_flight=20 * KIB),
    Bar(LOGP, "backward_kernel", BOTH, TYPICAL, 11.5, load=16, store=16, in_flight=40 * KIB),
    Bar(LOGP, "backward_kernel", BOTH, NO_ENTROPY, 8.5, load=16, store=16, in_flight=40 * KIB),
    Bar(LOGP, "backward_kernel", BOTH, UNALIGNED, 16.0, load=2, store=2, in_flight=24 * KIB),
    Bar(LOGP, "statistics_kernel", READ, TYPICAL, 19.0, load=16, in_flight=12 * KIB),
    Bar(LOGP, "statistics_kernel", READ, UNALIGNED, 24.0, load=2, in_flight=12 * KIB),
    Bar(ROWS, "rows_kernel", READ, TYPICAL, 14.5, load=16, in_flight=24 * KIB),
    Bar(ROWS, "rows_kernel", BOTH, TYPICAL, 13.5, load=16, store=16, in_flight=24 * KIB),
    Bar(ROWS, "rows_kernel", READ, UNALIGNED, 19.0, load=2, in_flight=8 * KIB),
    Bar(ROWS, "rows_kernel", BOTH, UNALIGNED, 19.0, load=2, store=2, in_flight=8 * KIB),
    # Tokens, with every option that the kernel has.
    Bar("gae", "forward_kernel", BOTH, {}, 375.0, 112.0),
    Bar("gae", "backward_kernel", BOTH, {}, 360.0, 46.0),
    Bar("token_rewards", "forward_kernel", BOTH, {}, 28.0),
    Bar("token_rewards", "backward_kernel", BOTH, {}, 20.0),
    Bar("whiten", "moments_kernel", BOTH, {}, 43.0, 6.0),
    Bar("whiten", "whiten_kernel", BOTH, {}, 37.0),
    Bar("whiten", "gradient_sums_kernel", BOTH, {}, 35.0, 4.0),
    Bar("whiten", "gradient_kernel", BOTH, {}, 51.0),
    Bar("kl_estimate", "forward_kernel", BOTH, {}, 135.0),
    Bar("kl_estimate", "backward_kernel", BOTH, {}, 150.0),
    Bar("policy_loss", "forward_kernel", BOTH, {}, 575.0, 46.0),
    Bar("value_loss", "forward_kernel", BOTH, {}, 120.0, 14.0),
    Bar("importance_weights", "token_kernel", BOTH, {}, 225.0, 18.0),
    Bar("importance_weights", "sequence_kernel", READ, {}, 125.0),
    Bar("token_weights", "weight_kernel", BOTH, {}, 16.0),
)

# The most registers of a thread. A multiprocessor has 65536 of them: of programs with 4 warps and
# 128 registers a thread it runs four at a time.
REGISTERS = {
    (LOGP, "forward_kernel"): 80,
    (LOGP, "backward_kernel"): 80,
    (LOGP, "statistics_kernel"): 128,
    (ROWS, "rows_kernel"): 128,
    (ROWS, "scale_kernel"): 40,
    ("gae", "forward_kernel"): 128,
    ("gae", "backward_kernel"): 128,
    ("token_rewards", "forward_kernel"): 114,
    ("token_rewards", "backward_kernel"): 80,
    ("whiten", "moments_kernel"): 48,
    ("whiten", "merge_kernel"): 40,
    ("whiten", "whiten_kernel"): 56,
    ("whiten", "gradient_sums_kernel"): 48,
    ("whiten", "gradient_kernel"): 56,
    ("kl_estimate", "forward_kernel"): 80,
    ("kl_estimate", "backward_kernel"): 104,
    ("distillation_loss", "forward_kernel"): 64,
    ("policy_loss", "forward_kernel"): 172,
    ("policy_loss", "merge_kernel"): 80,
    ("policy_loss", "sequence_log_ratio_kernel"): 96,
    ("value_loss", "forward_kernel"): 116,
    ("value_loss", "merge_kernel"): 48,
    ("importance_weights", "token_kernel"): 122,
    ("importance_weights", "sequence_kernel"): 122,
    ("importance_weights", "merge_kernel"): 40,
    ("token_weights", "length_kernel"): 40,
    ("token_weights", "weight_kernel"): 40,
}

# Rows of whole vectors that begin anywhere, and have a softcap: they are rare, and take so many
# registers, or spill so many bytes of them, at most.
RARE: dict[str, object] = {"SOFTCAP": True, "ALIGNED": False}
REGISTERS_IF_RARE = {(LOGP, "forward_kernel"): 104}
SPILLED_IF_RARE = {(ROWS, "rows_kernel"): 240, (LOGP, "forward_kernel"): 24}
# Stored once before the loops over a row and loaded once behind them: ptxas of Triton 3.6 does so
# for sm_100, to fit three programs on a multiprocessor.
SPILLED = {(LOGP, "statistics_kernel"): 8}


def is_rare(variant: Variant) -> bool:
    """Whether hardly anybody has such rows."""
    return all(variant.constants.get(name) == value for name, value in RARE.items())


def faults(line: Line, variant: Variant) -> list[str]:
    """What is wrong with a sweep of a variant, in words."""
    kernel, found = (line.op, line.kernel), []
    registers, spilled = REGISTERS.get(kernel), SPILLED.get(kernel, 0)
    if is_rare(variant):
        registers = REGISTERS_IF_RARE.get(kernel, registers)
        spilled = SPILLED_IF_RARE.get(kernel, spilled)
    if line.spilled > spilled:
        found.append(f"spills {line.spilled} bytes of registers")
    if registers is None:
        found.append("has no bar for its registers in bars.py")
    elif line.registers > registers:
        found.append(f"takes {line.registers} registers > {registers}")
    for bar in BARS:
        if bar.is_for(line, variant):
            found += [f"{line.sweep}: {fault}" for fault in bar.faults(line)]
    return found
