"""What the static gate reads from machine code, and what it refuses."""

import importlib.util
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton brings the tools that read machine code", allow_module_level=True)

from bench import bars, roofline, sass

# A row in two loops: its body, and its tail behind masks. The store is four bytes in each.
CODE = """
        .headerflags    @"EF_CUDA_SM90"
 Function kernel:
  REG:40 STACK:0 SHARED:32 LOCAL:0 CONSTANT[0]:664 TEXTURE:0 SURFACE:0 SAMPLER:0
kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/                   FADD R4, R4, R5 ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/                   STG.E [R2.64], R4 ;
        /*0050*/                   STG.E [R2.64+0x4], R5 ;
        /*0060*/                   STG.E [R2.64+0x8], R6 ;
        /*0070*/                   STG.E [R2.64+0xc], R7 ;
        /*0080*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0090*/              @!P4 LDG.E.128 R4, [R2.64] ;
        /*00a0*/              @!P4 STG.E.U16 [R2.64], R4 ;
        /*00b0*/               @P0 BRA `(.L_x_2) ;
        /*00c0*/              @!PT LDS R1, [R1] ;
        /*00d0*/                   EXIT ;
"""


def code(text=CODE):
    return sass.MachineCode(40, 0, *sass.parse(text))


def test_a_sweep_is_the_loop_without_masks():
    (sweep,) = sass.sweeps(code(), element_bytes=4)
    assert (sweep.kind, sweep.elements) == ("read+write", 4)
    assert (sweep.load_width, sweep.store_width) == (16, 4)
    assert sweep.per_element() == 8 / 4 and sweep.per_element("MUFU") == 1 / 4
    assert len(code().loops()) == 2


def test_code_without_a_loop_is_one_sweep_up_to_its_end():
    straight = "\n".join(line for line in CODE.splitlines() if "BRA" not in line)
    (sweep,) = sass.sweeps(code(straight), 4, given_elements=8)
    assert sweep.elements == 8 and sweep.counts["LDG"] == 2 and sweep.counts["LDS"] == 0


def test_narrow_stores_of_neighbours_cost_the_cache_more_than_wide_ones():
    wide = CODE.replace("STG.E [R2.64], R4", "STG.E.128 [R2.64], R4")
    for offset in ("+0x4], R5", "+0x8], R6", "+0xc], R7"):
        wide = wide.replace(f"STG.E [R2.64{offset}", "FADD R9, R9, R9")
    here = roofline.resident(40, 32, 8, roofline.GPUS[90])
    times = []
    for text in (CODE, wide):
        (sweep,) = sass.sweeps(code(text), 4)
        times.append(roofline.bound(sweep, here, roofline.GPUS[90]))
    assert times[0].by == "L2 stores" and times[0].over_floor > 1.1
    assert times[1].by == "DRAM" and times[1].over_floor < 1.01


def test_programs_on_a_multiprocessor_are_bound_by_registers_shared_memory_and_warps():
    h100 = roofline.GPUS[90]
    assert roofline.resident(40, 0, 8, h100).programs == 6
    assert roofline.resident(128, 0, 4, h100).programs == 4
    assert roofline.resident(16, 100 << 10, 4, h100).programs == 2
    assert roofline.resident(16, 0, 8, h100).programs == 8


def line(**changed):
    values = {
        "op": "token_logprobs",
        "kernel": "backward_kernel",
        "sweep": "read+write",
        "registers": 40,
        "spilled": 0,
        "instructions": 10.0,
        "shuffles": 0.0,
        "load": 16,
        "store": 16,
        "in_flight": 48 << 10,
    }
    return SimpleNamespace(**values | changed)


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({}, None),
        ({"store": 2}, "store 2 < 16"),
        ({"load": 4}, "load 4 < 16"),
        ({"shuffles": 9.0}, "shuffles 9.00 > 0"),
        ({"instructions": 30.0}, "instructions 30.00 > "),
        ({"in_flight": 1024}, "in_flight 1024 < "),
        ({"registers": 255}, "takes 255 registers > "),
        ({"spilled": 8}, "spills 8 bytes"),
        ({"kernel": "new_kernel"}, "has no bar"),
    ],
)
def test_what_is_worse_than_its_bar_is_named(changed, fault):
    variant = SimpleNamespace(constants=dict(bars.TYPICAL))
    found = bars.faults(line(**changed), variant)
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]


def test_every_bar_is_of_a_kernel_that_has_one_for_its_registers():
    assert {(bar.op, bar.kernel) for bar in bars.BARS} <= set(bars.REGISTERS)
