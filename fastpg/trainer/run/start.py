"""What a run was started with: its command, versions, machine and kernels."""

import platform
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version

import torch

import fastpg

PACKAGES = ("fastpg", "torch", "transformers", "accelerate")
"""The packages whose versions are recorded, besides Python's."""


@dataclass(frozen=True)
class Start:
    """One start of a run: its first, or one that took it up.

    Args:
        date: When, in ISO 8601 with the offset from UTC.
        after_step: The last step before it; 0 for the first start.
        command: The command of the process.
        versions: The versions of `PACKAGES` and of Python, by name.
        device: The type of the device, as `fastpg.kernels_of` writes it: "CPU", "CUDA".
        machine: The name of the device, the threads, the number of processes and the system.
        kernels: The kernel that serves each op on the device, by the name of the op.
    """

    date: str
    after_step: int
    command: str
    versions: dict[str, str]
    device: str
    machine: str
    kernels: dict[str, str]

    @staticmethod
    def now(device: torch.device, num_processes: int, after_step: int) -> "Start":
        """Return what this process was started with.

        Args:
            device: The device of the run.
            num_processes: The processes of the run.
            after_step: The last step before it.
        """
        kind = device.type.upper()
        name = "CPU" if kind == "CPU" else torch.cuda.get_device_name()
        threads, processes = torch.get_num_threads(), num_processes
        return Start(
            date=datetime.now().astimezone().isoformat(" ", timespec="seconds"),
            after_step=after_step,
            command=shlex.join(sys.orig_argv),
            versions={name: version(name) for name in PACKAGES}
            | {"Python": platform.python_version()},
            device=kind,
            machine=f"{name}, threads: {threads}, processes: {processes}, {platform.platform()}",
            # An op without a kernel for this device is served by its reference.
            kernels={
                op: devices.get(kind, "reference") for op, devices in fastpg.kernels_of().items()
            },
        )
