"""A model of what bounds a kernel, from its machine code alone: predictions, not measurements.

A scheduler of a multiprocessor issues one instruction a cycle. Every instruction keeps a pipe busy
for some cycles. A warp has the reads of one iteration under way for LATENCY cycles, or of several
iterations where they are asynchronous. The slowest of memory, pipes and latency bounds a sweep.

The model knows no partitions of the L2 cache and no turns between reading and writing, and counts
branches that a launch may not take. It ranks kernels and shows regressions; a GPU measures.
"""

from __future__ import annotations

from typing import NamedTuple

from .sass import Sweep

WARP = 32


class Gpu(NamedTuple):
    """What the model knows of a GPU.

    Attributes:
        name: Its name.
        capability: Its compute capability times 10.
        multiprocessors: How many it has.
        ghz: Its clock in a kernel bound by memory.
        copy_gbs: The bytes that a copy reads and writes, in GB/s.
        cache_bytes: Its L2 cache.
        shared_bytes: The shared memory of a multiprocessor.
        fp64_cycles: The cycles of a warp's instruction in fp64.
        latency: The cycles that a read from memory takes under load.
    """

    name: str
    capability: int
    multiprocessors: int
    ghz: float
    copy_gbs: float
    cache_bytes: int
    shared_bytes: int
    fp64_cycles: int
    latency: int

    @property
    def bytes_per_cycle(self) -> float:
        """The share of the memory's bandwidth that one multiprocessor has."""
        return self.copy_gbs / self.multiprocessors / self.ghz


GPUS = {
    80: Gpu("A100", 80, 108, 1.410, 1800, 40 << 20, 163 << 10, 4, 700),
    90: Gpu("H100", 90, 132, 1.755, 3000, 50 << 20, 227 << 10, 2, 900),
    100: Gpu("B200", 100, 148, 1.850, 7300, 126 << 20, 227 << 10, 2, 1000),
}

# The pipes of a scheduler: 32 lanes of FMA, 16 of ALU, 4 of MUFU.
ALU = (
    "FMNMX", "FMNMX3", "FSEL", "FSETP", "ISETP", "IADD3", "IADD", "LOP3", "SHF", "SEL", "PRMT",
    "LEA", "VIADD", "VIMNMX", "MOV", "I2FP", "PLOP3", "P2R", "R2P", "IABS", "F2FP", "FCHK",
)  # fmt: skip
FMA = ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2")
HALF_RATE = ("IMAD", "HFMA2", "HADD2", "HMUL2")  # They share the pipe with FMA, on half its lanes.
FP64 = ("DADD", "DMUL", "DFMA", "DSETP")
SPECIAL = ("MUFU",)
SHARED = ("LDS", "STS", "SHFL")

SERIAL = 5000  # Cycles of a row of rows_kernel that no sweep hides: dependent reads, the merge.


class Resident(NamedTuple):
    """A kernel as it lies on a multiprocessor.

    Attributes:
        programs: How many programs run there at a time.
        warps: The warps of a program.
        shared: The bytes of shared memory of a program.
    """

    programs: int
    warps: int
    shared: int

    def stages(self, sweep: Sweep) -> int:
        """How many iterations have their reads under way at a time."""
        tile = self.warps * WARP * sweep.bytes_loaded
        return max(self.shared // tile, 1) if sweep.asynchronous and tile else 1

    def in_flight(self, sweep: Sweep) -> int:
        """The bytes of reads that are under way on a multiprocessor."""
        return self.programs * self.warps * WARP * sweep.bytes_loaded * self.stages(sweep)


def resident(registers: int, shared: int, warps: int, gpu: Gpu, at_most: int = 32) -> Resident:
    """How many programs of a kernel fit on a multiprocessor, `at_most` as the launcher has it."""
    registers_of_warp = -(-registers * WARP // 256) * 256  # Registers come in units of 256.
    by_registers = 65536 // 4 // registers_of_warp * 4 // warps
    by_shared = gpu.shared_bytes // (shared + 1024)
    programs = max(min(by_registers, by_shared, 64 // warps, at_most), 1)
    return Resident(programs, warps, shared)


def rewrites(sweep: Sweep) -> int:
    """How many times a sector of the output is written.

    A thread that reads 16 bytes in one piece holds neighbours; if it writes them one by one, every
    store touches every sector of the warp.
    """
    in_pieces = sweep.load_width == 16 and sweep.bytes_stored > sweep.store_width > 0
    return 16 // sweep.store_width if in_pieces else 1


def cycles(sweep: Sweep, gpu: Gpu) -> dict[str, float]:
    """The cycles that an iteration of one warp keeps each pipe of its scheduler busy."""
    counts = sweep.counts

    def total(names: tuple[str, ...]) -> int:
        return sum(counts[name] for name in names)

    # The four schedulers share loads and stores; a wavefront of them takes 128 bytes.
    wavefronts = sum(max(load.width // 4, 1) for load in sweep.loads)
    wavefronts += sum(max(store.width // 4, 1) for store in sweep.stores) * min(rewrites(sweep), 4)
    return {
        "issue": counts.total(),
        "MUFU": 8 * total(SPECIAL),
        "ALU": 2 * total(ALU),
        "FMA": max(total(FMA) + total(HALF_RATE), 2 * total(HALF_RATE)),
        "FP64": gpu.fp64_cycles * total(FP64),
        "loads and stores": wavefronts + 4 * total(SHARED),
        "L2 stores": cycles_of_rewrites(sweep, gpu),
    }


def cycles_of_rewrites(sweep: Sweep, gpu: Gpu) -> float:
    """The cycles that the L2 cache needs for sectors written again and again; else 0."""
    if rewrites(sweep) == 1:
        return 0.0
    sectors = sweep.bytes_stored * rewrites(sweep)  # of a warp: 32 lanes, 32 bytes a sector
    sectors_per_cycle = 96 / gpu.multiprocessors  # The slices of L2 take 96 a cycle.
    return 4 * sectors / sectors_per_cycle


class Bound(NamedTuple):
    """What bounds a sweep.

    Attributes:
        by: "DRAM", "latency", or the name of a pipe.
        over_floor: The predicted time over that of moving the same bytes as a copy does.
    """

    by: str
    over_floor: float


def bound(sweep: Sweep, here: Resident, gpu: Gpu, *, from_cache: bool = False) -> Bound:
    """What bounds a sweep; with `from_cache`, an earlier one left its reads in the L2 cache."""
    moved = WARP * (sweep.bytes_loaded + sweep.bytes_stored)
    through_memory = WARP * sweep.bytes_stored if from_cache else moved
    pipes = cycles(sweep, gpu)
    pipe = max(pipes, key=lambda name: pipes[name])
    warps = here.programs * here.warps / 4  # of a scheduler
    # A few warps hide little of each other's dependent instructions.
    busy = pipes[pipe] if warps >= 4 else pipes[pipe] * (1 + 0.5 / warps)
    bytes_per_cycle = {
        "DRAM": gpu.bytes_per_cycle * moved / max(through_memory, 1),
        pipe: 4 * moved / busy,
        "latency": 4 * warps * moved * here.stages(sweep) / (gpu.latency + busy),
    }
    slowest = min(bytes_per_cycle, key=lambda name: bytes_per_cycle[name])
    # Near a limit the next one is felt already: the limits are joined smoothly.
    smooth = sum(rate**-6 for rate in bytes_per_cycle.values()) ** (-1 / 6)
    return Bound(slowest, bytes_per_cycle["DRAM"] / min(smooth, bytes_per_cycle["DRAM"]))


def rows_over_floor(sweeps: list[Sweep], here: Resident, row_bytes: int, gpu: Gpu) -> float:
    """The time of rows_kernel over that of one read and one write of the logits.

    Its second sweep reads what the first left in the L2 cache, as far as all rows under way fit.
    """
    memory = gpu.bytes_per_cycle
    fits = row_bytes * gpu.multiprocessors * here.programs <= gpu.cache_bytes
    total = SERIAL / here.programs
    for sweep in sweeps:
        again = bool(sweep.stores)
        one_pass = bound(sweep, here, gpu, from_cache=again and fits).over_floor
        passes = 2 if again and not fits else 1
        total += passes * row_bytes / memory * one_pass
    return total / (2 * row_bytes / memory)
