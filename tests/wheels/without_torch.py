"""Runs the installed extension in a Python without torch: arrays stand for tensors."""

import math
import sys
import sysconfig
from array import array
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

INF = math.inf


class Tensor:
    """What the extension asks of a tensor."""

    def __init__(self, numbers):
        self.numbers = array("d", numbers)

    def contiguous(self):
        return self

    def numel(self):
        return len(self.numbers)

    def data_ptr(self):
        return self.numbers.buffer_info()[0]


def load(path):
    """An extension of the installed package, which is not imported: that needs torch."""
    spec = spec_from_file_location(f"fastpg.{path.name.partition('.')[0]}", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def raises(kind, function, *arguments):
    """Whether a call raises this kind of exception."""
    try:
        function(*arguments)
    except kind:
        return True
    return False


installed = Path(sysconfig.get_path("platlib"), "fastpg")
cpu = load(installed / "_C.abi3.so")
logp = Tensor([-0.5 - i % 7 for i in range(1000)])
ref_logp = Tensor([-0.25 - i % 5 for i in range(1000)])
kl = Tensor([math.nan] * 1000)
values = {
    "dtype": 1, "count": 1000, "logp": logp, "ref_logp": ref_logp, "kind": 2,
    "max_log_ratio": 20.0, "max_kl": INF, "beyond": 0, "kl": kl, "stream": 0,
}  # fmt: skip
assert cpu.fields("kl_estimate") == list(values), cpu.fields("kl_estimate")
for instruction_set in cpu.instruction_sets():
    cpu.use_instruction_set(instruction_set)
    cpu.kl_estimate(*values.values())
    for got, p, q in zip(kl.numbers, logp.numbers, ref_logp.numbers, strict=True):
        assert math.isclose(got, math.expm1(q - p) + p - q, rel_tol=1e-12, abs_tol=1e-15)
assert raises(TypeError, cpu.kl_estimate, 0)
assert raises(TypeError, cpu.kl_estimate, *(values | {"count": "many"}).values())
assert raises(ValueError, cpu.use_instruction_set, "mmx")
gpus = "no GPU: it was built without nvcc"
if (installed / "_cuda.abi3.so").exists():
    cuda = load(installed / "_cuda.abi3.so")
    assert cuda.statistics["ValueStats"] == cpu.statistics["ValueStats"]
    gpus = cuda.gpus
assert "torch" not in sys.modules
print(f"{', '.join(cpu.instruction_sets())} agree with fp64; loads CUDA C++ for {gpus}")
