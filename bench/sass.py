"""What the machine code of a kernel says: its registers, its spills, its sweeps over memory.

Triton brings two tools of NVIDIA's. `cuobjdump -res-usage` prints what a kernel takes, and
`nvdisasm -c` its code (SASS), one instruction a line, with the labels that branches jump to:

    .L_x_3:
            /*0a10*/              @!P4 LDG.E.128 R4, [R2.64] ;
            ...
            /*0f20*/               @P0 BRA `(.L_x_3) ;

Here LDG reads 16 bytes from memory, unless the predicate P4 is true, and BRA closes a loop.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import triton.backends.nvidia

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
LOADS = ("LDG", "LDGSTS")  # The second copies from global to shared memory, asynchronously.
NEVER = "@!PT"  # The predicate of an instruction that pads the code and never runs.


class Instruction(NamedTuple):
    """One line of SASS."""

    predicate: str  # "@!P4", or "" for an instruction that always runs
    opcode: str  # with its suffixes: "LDG.E.128"
    target: str  # the label of a branch, or ""

    @property
    def name(self) -> str:
        """The opcode without its suffixes."""
        return self.opcode.split(".")[0]

    @property
    def width(self) -> int:
        """How many bytes a thread moves, if the instruction reads or writes memory."""
        if found := re.search(r"\.(64|128|256)\b", self.opcode):
            return int(found[1]) // 8
        found = re.search(r"\.[US](8|16)\b", self.opcode)
        return int(found[1]) // 8 if found else 4


class MachineCode(NamedTuple):
    """A compiled kernel.

    Attributes:
        registers: The registers of a thread.
        spilled: The bytes of a thread's registers that are kept in memory.
        instructions: The code.
        labels: For each label, the place in the code that it names.
    """

    registers: int
    spilled: int
    instructions: list[Instruction]
    labels: dict[str, int]

    def loops(self) -> list[tuple[int, int]]:
        """The first and the last instruction of every loop: a branch closes it, backwards."""
        found = []
        for place, instruction in enumerate(self.instructions):
            start = self.labels.get(instruction.target, place)
            if instruction.name == "BRA" and start < place:
                found.append((start, place))
        return found

    def innermost_loops(self) -> list[list[Instruction]]:
        """The code of every loop that holds no other."""
        loops = self.loops()
        return [
            self.instructions[first : last + 1]
            for first, last in loops
            if not any(
                first <= start and end <= last
                for start, end in loops
                if (start, end) != (first, last)
            )
        ]


@dataclass(frozen=True)
class Sweep:
    """A loop over memory, or the whole code of a kernel that has no such loop.

    Attributes:
        code: Its instructions; those of a loop run once in an iteration.
        element_bytes: The size of an element.
        given_elements: How many elements a thread takes in an iteration, where it is known; where
            it is 0, the bytes tell.
    """

    code: list[Instruction]
    element_bytes: int
    given_elements: float = 0.0

    @cached_property
    def counts(self) -> Counter[str]:
        """How often each instruction occurs, by its name."""
        return Counter(i.name for i in self.code if i.predicate != NEVER)

    @cached_property
    def loads(self) -> list[Instruction]:
        """The reads of global memory."""
        return [i for i in self.code if i.name in LOADS and i.predicate != NEVER]

    @cached_property
    def stores(self) -> list[Instruction]:
        """The writes to global memory."""
        return [i for i in self.code if i.name == "STG" and i.predicate != NEVER]

    @property
    def kind(self) -> str:
        """Whether it reads, writes, or both."""
        return "+".join(["read"] * bool(self.loads) + ["write"] * bool(self.stores))

    @property
    def bytes_loaded(self) -> int:
        """The bytes that a thread reads in an iteration."""
        return sum(load.width for load in self.loads)

    @property
    def bytes_stored(self) -> int:
        """The bytes that a thread writes in an iteration."""
        return sum(store.width for store in self.stores)

    @property
    def load_width(self) -> int:
        """The bytes of its narrowest read; 0 if there is none."""
        return min((load.width for load in self.loads), default=0)

    @property
    def store_width(self) -> int:
        """The bytes of its narrowest write; 0 if there is none."""
        return min((store.width for store in self.stores), default=0)

    @property
    def predicated(self) -> int:
        """How many reads have a mask."""
        return sum(load.predicate != "" for load in self.loads)

    @property
    def asynchronous(self) -> bool:
        """Whether its reads go to shared memory while the thread computes."""
        return self.counts["LDGSTS"] > 0

    @property
    def elements(self) -> float:
        """How many elements a thread takes in an iteration."""
        return self.given_elements or max(self.bytes_loaded, self.bytes_stored) / self.element_bytes

    def per_element(self, *names: str) -> float:
        """How many of these instructions, or of all, an element costs."""
        number = sum(self.counts[name] for name in names) if names else self.counts.total()
        return number / self.elements if self.elements else 0.0


def sweeps(code: MachineCode, element_bytes: int, given_elements: float = 0.0) -> list[Sweep]:
    """The loops of a kernel that touch at least four elements in an iteration, one of each kind.

    A row is often walked twice: its body without masks, and its tail with them. The loop with fewer
    masked reads is the body. A kernel without such a loop is one sweep, up to its end.
    """
    best: dict[str, Sweep] = {}
    for loop in code.innermost_loops():
        sweep = Sweep(loop, element_bytes, given_elements)
        if sweep.bytes_loaded + sweep.bytes_stored < 4 * element_bytes:
            continue
        known = best.get(sweep.kind)
        if known is None or (sweep.predicated < known.predicated and not known.asynchronous):
            best[sweep.kind] = sweep
    if best:
        return list(best.values())
    instructions = code.instructions
    ends = [n for n, i in enumerate(instructions) if i.name == "EXIT" and not i.predicate]
    return [Sweep(instructions[: ends[0] if ends else None], element_bytes, given_elements)]


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a disassembled kernel, and the place of every label."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+)?\s*(\S+)(.*);", line):
            predicate, opcode, operands = found.groups()
            target = re.search(r"\.L_x_\d+", operands) if opcode.startswith("BRA") else None
            instructions.append(Instruction(predicate or "", opcode, target[0] if target else ""))
    return instructions, labels


def run(tool: str, *arguments: object) -> str:
    """What one of NVIDIA's tools prints."""
    command = [TOOLS / tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def machine_code(cubin: bytes) -> MachineCode:
    """Reads a compiled kernel.

    The tools take half a second, so what they print is kept beside Triton's own cache.
    """
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or tempfile.gettempdir()) / "sass"
    kept = folder / f"{hashlib.sha256(cubin).hexdigest()}.txt"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            printed = run("cuobjdump", "-res-usage", file.name) + run("nvdisasm", "-c", file.name)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(printed)
        partial.replace(kept)  # Another process may have read the same kernel.
    printed = kept.read_text()
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", printed)
    assert found is not None, "cuobjdump printed no usage of registers"
    registers, stack, local = map(int, found.groups())
    return MachineCode(registers, stack + local, *parse(printed))
