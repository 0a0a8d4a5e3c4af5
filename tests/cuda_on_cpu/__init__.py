"""csrc/*.cu on a CPU: compiled as C++, with a `cuda_runtime.h` that plays the GPU.

To CUDA C++ what the interpreter is to Triton.
"""

import fcntl
import hashlib
import os
import subprocess
import sysconfig
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-w", '-DFPG_GPUS="CPU"']


@cache
def load(folder: Path):
    """The module that stands for fastpg._cuda; built into `folder` if its sources have changed."""
    sources = [*sorted(CSRC.rglob("*.cu")), CSRC / "bind_cuda.cpp"]
    read = [*sources, *sorted(CSRC.rglob("*.h")), HERE / "cuda_runtime.h"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in read)).hexdigest()[:16]
    target = folder / f"_cuda-{digest}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test processes, one builds
        if not target.exists():
            build(sources, target)
    loader = ExtensionFileLoader("_cuda", str(target))
    module = module_from_spec(spec_from_file_location("_cuda", target, loader=loader))
    loader.exec_module(module)
    return module


def build(sources: list[Path], target: Path) -> None:
    """Each source in its own process, then one link; renamed when complete."""
    compiler = os.environ.get("CXX", "c++")
    includes = [HERE, CSRC, sysconfig.get_path("include")]
    command = [compiler, *FLAGS, *(f"-I{path}" for path in includes), "-c", "-x", "c++"]
    objects = [target.with_name(f"{source.stem}.o") for source in sources]
    running = [
        subprocess.Popen([*command, source, "-o", out])
        for source, out in zip(sources, objects, strict=True)
    ]
    if any([process.wait() for process in running]):
        raise RuntimeError("csrc/*.cu do not compile as C++")
    half = target.with_suffix(".half")
    subprocess.run([compiler, "-shared", *objects, "-o", half], check=True)
    half.rename(target)
