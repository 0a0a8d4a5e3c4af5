"""What a figure depends on besides the code that it is about."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

import fastpg

ROOT = Path(fastpg.__file__).parents[1]  # of a clone; of an installed package its folder


def processor(device: str) -> str:
    """The name of the processor or GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def machine(device: str) -> str:
    """The processor's name and the number of threads, as a file name."""
    threads = "" if device == "cuda" else f" {torch.get_num_threads()} threads"
    name = re.sub(r"\((r|tm)\)", "", (processor(device) + threads).lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busyness() -> float:
    """How many programs wanted a core in the last minute; 0 where the system does not say."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else 0.0


def provenance() -> dict[str, str]:
    """The versions, the commit and the date."""
    return {
        "fastpg": fastpg.__version__,
        "commit": revision(),
        "torch": torch.__version__,
        "extension": fastpg.extension_status(),
        "date": time.strftime("%Y-%m-%d"),
    }


def revision() -> str:
    """The commit of this clone; "unknown" for an installed package, a copy, or without git."""
    if not (ROOT / ".git").exists():  # git would tell of another repository around it
        return "unknown"
    command = ["git", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"
