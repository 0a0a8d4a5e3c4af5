"""What is installed: versions, kernels, threads, allocator, and what is missing for what."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

import fastpg

# What takes part if it is there.
PACKAGES = (
    "torch", "triton", "numpy", "transformers", "accelerate", "peft", "datasets", "trl", "verl",
    "openrlhf",
)  # fmt: skip

# The modules that a use needs. matplotlib and tensorboard are for the trainer's report.
TRAINER = "transformers accelerate safetensors rich tensorboard matplotlib yaml".split()  # noqa: SIM905
NEEDS = {
    "fastpg train, fastpg reward-model, fastpg doctor mismatch": TRAINER,
    "LoRA in the trainer": ["peft"],
    "datasets from parquet, the Hub or save_to_disk": ["datasets", "pyarrow"],
    "fastpg.integrations.trl": ["trl"],
    "fastpg.integrations.verl": ["verl"],
    "fastpg.integrations.openrlhf": ["openrlhf"],
}
# The packages whose name is not that of their module.
PACKAGE_OF = {"yaml": "pyyaml"}

# Parts of the names of shared libraries that replace malloc.
ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")
VARIABLES = (
    "OMP_NUM_THREADS", "LD_PRELOAD", "MALLOC_CONF", "GLIBC_TUNABLES", "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)  # fmt: skip


def kernels() -> str:
    """Which kernel serves which op on which device, and what the extension is built for."""
    served = fastpg.kernels_of()
    devices = sorted({device for devices in served.values() for device in devices})
    lines = [["op", *devices]]
    lines += [[op, *(of.get(device, "-") for device in devices)] for op, of in served.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    versions = ", ".join(f"{name} {version_of(name)}" for name in ("torch", "triton"))
    facts = f"fastpg {fastpg.__version__}, {versions}"
    return "\n".join([*table, "", facts, f"C++ extension: {fastpg.extension_status()}"])


def version_of(package: str) -> str:
    """The version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def checkup() -> str:
    """All that `fastpg doctor` says."""
    versions = [f"  {name:13} {version_of(name)}" for name in PACKAGES]
    facts = {
        "Python": f"{platform.python_version()}, {platform.platform()}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "allocator": allocator(),
        "GPU": gpu(),
        "settings": ", ".join(f"{x}={os.environ[x]}" for x in VARIABLES if x in os.environ) or "-",
    }
    missing = missing_parts() or ["nothing"]
    return "\n".join(
        [
            kernels(),
            "",
            "Versions",
            *versions,
            "",
            "Machine",
            *(f"  {name:13} {fact}" for name, fact in facts.items()),
            "",
            "Missing",
            *(f"  {each}" for each in missing),
        ]
    )


def missing_parts() -> list[str]:
    """What is not here, for what it is needed, and how to get it."""
    found = []
    status = fastpg.extension_status()
    if not status.startswith("loaded"):
        found.append(f"C++ kernels: every op runs on its PyTorch reference; {status}")
    if torch.cuda.is_available() and "CUDA C++: not loaded" in status:
        found.append("CUDA C++ kernels: install fastpg where there is an nvcc; Triton's serve")
    if torch.cuda.is_available() and find_spec("triton") is None:
        found.append("Triton, for the kernels on this GPU: pip install triton")
    for use, modules in NEEDS.items():
        if packages := absent_packages(modules):
            found.append(f"{', '.join(packages)}, for {use}: pip install {' '.join(packages)}")
    return found


def absent_packages(modules: list[str]) -> list[str]:
    """The packages to install for those of the modules that are not here."""
    return [PACKAGE_OF.get(module, module) for module in modules if find_spec(module) is None]


def allocator() -> str:
    """What serves malloc in this process. Large tensors are mapped anew unless it keeps memory."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return f"that of {platform.system()}"
    for name in ALLOCATORS:
        if name in mapped:
            return name
    return "malloc of libc, which returns large tensors to the system and maps them anew"


def gpu() -> str:
    """The GPU that torch sees."""
    if not torch.cuda.is_available():
        return "none that torch sees; no kernel of fastpg has run on one yet"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}"
