"""The extension: what it may not leak, what it does not need, and life without it."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastpg
from fastpg._library import _C, _cuda
from fastpg._op import OPS

ROOT = Path(__file__).parents[2]
GPUS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "unit", sorted(Path(ROOT, "csrc").rglob("*_simd.cpp")), ids=lambda p: p.stem
)
def test_instruction_sets_do_not_leak(unit, tmp_path):
    """A weak symbol of one unit could be linked in place of another's: an illegal instruction."""
    compiler = shutil.which("c++")
    if not compiler or not shutil.which("nm"):
        pytest.skip("no C++ compiler here")
    flags = ["-std=c++17", "-O0", "-DFPG_ISA=avx2", f"-I{ROOT}/csrc"]
    subprocess.run([compiler, *flags, "-c", unit, "-o", tmp_path / "unit.o"], check=True)
    symbols = subprocess.run(
        ["nm", tmp_path / "unit.o"], capture_output=True, text=True, check=True
    )
    assert not [line for line in symbols.stdout.splitlines() if line[17:18] in "WVu"]


@pytest.mark.parametrize("extension", [_C, _cuda], ids=["_C", "_cuda"])
def test_extensions_link_neither_torch_nor_cuda(extension):
    if extension is None or not shutil.which("ldd"):
        pytest.skip("no extension here, or no ldd")
    linked = subprocess.run(["ldd", extension.__file__], capture_output=True, text=True, check=True)
    assert not [name for name in ("torch", "gomp", "cuda") if f"lib{name}" in linked.stdout]


def test_the_cuda_extension_is_built_where_there_is_an_nvcc():
    if _cuda is None and (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        assert torch.version.hip or os.environ.get("FASTPG_CUDA") == "0"


@pytest.mark.skipif(_cuda is None or torch.cuda.is_available(), reason="needs _cuda, and no GPU")
def test_the_cuda_extension_imports_without_a_driver_and_says_so():
    assert f"built for {' '.join(GPUS)}, no GPU here" in fastpg.extension_status()
    assert fastpg.kernels_of()["value_loss"]["CUDA"] == "CUDA C++"
    fields = dict.fromkeys(_cuda.fields("value_loss"))
    fields |= {"dtype": 0, "count": 0, "clip": 0.0, "blocks": 1, "stream": 0}
    with pytest.raises(RuntimeError, match="CUDA says: CUDA driver version is insufficient"):
        _cuda.value_loss(*fields.values())
    fields["count"] = 1025
    with pytest.raises(ValueError, match="scratch memory of the wrong size"):
        _cuda.value_loss(*fields.values())


@pytest.mark.skipif(_cuda is None, reason="needs _cuda")
def test_the_cuda_extension_holds_machine_code_for_each_gpu_and_ptx_for_others():
    backends = pytest.importorskip("triton.backends.nvidia", reason="Triton brings cuobjdump")
    cuobjdump = Path(backends.__path__[0], "bin", "cuobjdump")

    def contents(kind):
        command = [cuobjdump, f"--list-{kind}", _cuda.__file__]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return set(re.findall(r"(\w+)\.(sm_\d+)\.\w+$", listed, re.MULTILINE))

    sources = [path.stem for path in Path(ROOT, "csrc").rglob("*.cu")]
    assert contents("elf") >= {(source, gpu) for source in sources for gpu in GPUS}
    assert contents("ptx") == {(source, "sm_75") for source in sources}
    in_a_wheel = len(zlib.compress(Path(_cuda.__file__).read_bytes()))
    assert in_a_wheel < 20e6


def test_an_extension_of_other_fields_is_not_imported():
    """C++ that takes rho where the record has c would compute a wrong number, and say nothing."""
    fields = OPS["gae"].fields()
    rho, c = fields.index("rho"), fields.index("c")
    fields[rho], fields[c] = fields[c], fields[rho]
    other = SimpleNamespace(__name__="fastpg._C", fields=lambda op: fields)
    with pytest.raises(ImportError) as raised:
        OPS["gae"].check_fields(other)
    python_list, cpp_list = str(raised.value).splitlines()[1:]
    assert "Python: " in python_list and "lams, rho, c, terminated" in python_list
    assert "C++:" in cpp_list and "lams, c, rho, terminated" in cpp_list


@pytest.mark.skipif(_C is None, reason="no extension here")
def test_a_function_of_the_extension_counts_its_arguments():
    with pytest.raises(TypeError, match="expected 23 arguments, got 1"):
        _C.gae(0)


def test_without_the_extension_the_references_serve():
    out = python(
        "import sys; sys.modules['fastpg._C'] = None\n"
        "import torch, fastpg\n"
        "x = torch.randn(3, 5, requires_grad=True)\n"
        "fastpg.token_logprobs(x, torch.tensor([0, 1, 2])).sum().backward()\n"
        "assert x.grad.abs().sum() > 0\n"
        "assert all(k['CPU'] != 'C++' for k in fastpg.kernels_of().values())\n"
        "print(fastpg.extension_status())"
    )
    assert out.startswith("not loaded (")


def test_without_the_cuda_extension_no_op_needs_it():
    out = python(
        "import sys; sys.modules['fastpg._cuda'] = None\n"
        "import fastpg\n"
        "print('CUDA C++' not in {k['CUDA'] for k in fastpg.kernels_of().values()})\n"
        "print(fastpg.extension_status())"
    )
    assert out.startswith("True\n") and "CUDA C++: not loaded (" in out


@pytest.mark.slow
def test_without_triton_the_references_serve_a_gpu():
    code = "import fastpg; print(fastpg.kernels_of()['token_logprobs']['CUDA'])"
    assert python(f"import sys; sys.modules['triton'] = None; {code}") == "reference\n"
    if importlib.util.find_spec("triton"):
        assert python(code) == "Triton\n"


def test_an_unknown_instruction_set_is_refused():
    if _C is None:
        pytest.skip("no extension here")
    with pytest.raises(ValueError, match="no instruction set 'mmx'"):
        _C.use_instruction_set("mmx")
