"""The engine of a run: one process, or several that share its episodes, and maybe its weights."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import (
    GradientAccumulationPlugin,
    TorchDynamoPlugin,
    broadcast_object_list,
    str_to_bool,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from fastpg.trainer.run.checkpoint import LATEST
from fastpg.trainer.settings.parsing import InputError
from fastpg.trainer.settings.ranges import MixedPrecision


class EngineSettings(Protocol):
    """The settings of a run that its accelerator depends on."""

    mixed_precision: MixedPrecision
    max_grad_norm: float


def make_accelerator(args: EngineSettings) -> Accelerator:
    """Make the accelerator of a run, whose results depend on the settings alone.

    Which devices and processes there are, and how they share the model, is left to `accelerate`
    and its environment variables.

    Args:
        args: The settings of the run.

    Raises:
        InputError: The processes would share the model in a way that does not work here, or the
            precision cannot be had.
    """
    # What is not given here, `accelerate launch` may set: a number of accumulation steps, for one,
    # that every loss would be divided by.
    try:
        _share_on_cpus()
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_plugin=TorchDynamoPlugin(backend="no"),
        )
        torch.empty(0, device=accelerator.device)
    except Exception as error:
        # A process keeps the precision of its first accelerator, and not every device has each;
        # the environment may ask for packages and devices that are not there.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"accelerate does not start with mixed_precision={args.mixed_precision!r} in this "
            f"process: {reason}"
        ) from error
    _check_processes(accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise InputError("FSDP of version 1 is not supported; fsdp_version: 2 is.")
        # Every process has read the weights; a broadcast of them would untie the tied ones.
        plugin.cpu_ram_efficient_loading = False
    if is_deepspeed(accelerator):
        # DeepSpeed clips inside its own step, and leaves the kind of optimiser to the config.
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["gradient_clipping"] = args.max_grad_norm
        config["zero_allow_untested_optimizer"] = True
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise InputError("Megatron-LM is not supported; DDP, FSDP2 and DeepSpeed are.")
    return accelerator


def _share_on_cpus() -> None:
    """Let processes that were started for a GPU each share the work, where they are to use CPUs.

    accelerate would let each of them train alone, unless it is told of the CPUs; it would then
    leave out FSDP and DeepSpeed.
    """
    if _started() == 1 or (torch.accelerator.is_available() and not _is_set("USE_CPU")):
        return
    state = PartialState(cpu=True)
    if state.distributed_type == DistributedType.MULTI_CPU and _is_set("USE_FSDP"):
        # accelerate takes FSDP only where it has found GPUs; FSDP itself runs on CPUs as well.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def _check_processes(accelerator: Accelerator) -> None:
    """Refuse processes that accelerate would not let share the work as they were told to."""
    if accelerator.num_processes != _started():
        raise InputError(
            f"{_started()} processes were started, but each would train alone; "
            "ACCELERATE_USE_CPU=true in the environment lets them train together on CPUs."
        )
    for engine in ("FSDP", "DEEPSPEED"):
        if _is_set(f"USE_{engine}") and accelerator.distributed_type != DistributedType[engine]:
            raise InputError(
                f"accelerate leaves {engine} out, for one process alone or under "
                "ACCELERATE_USE_CPU=true; every process would hold the whole model, as "
                "examples/accelerate/ddp.yaml says."
            )


def _started() -> int:
    """Return how many processes `accelerate launch` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_set(name: str) -> bool:
    """Return whether a variable of accelerate in the environment is true."""
    return bool(str_to_bool(os.environ.get(f"ACCELERATE_{name}", "false")))


def shares_weights(accelerator: Accelerator) -> bool:
    """Return whether each process holds a part of every weight.

    The weights are then whole only inside the forward of the prepared module, and all processes
    have to make the same forwards.
    """
    return accelerator.distributed_type == DistributedType.FSDP or is_zero3(accelerator)


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Return whether DeepSpeed is the engine."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def is_zero3(accelerator: Accelerator) -> bool:
    """Return whether DeepSpeed shares the weights out: its ZeRO of stage 3."""
    return is_deepspeed(accelerator) and accelerator.state.deepspeed_plugin.zero_stage == 3


def reshard(model: nn.Module) -> None:
    """Let the parameters of a prepared module be those that the optimiser changes.

    After a forward without a backward FSDP2 keeps some whole, in memory that the next one replaces.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """Return the weights and buffers of a prepared module; every process has to call this.

    Where processes share the weights, only the main process gets them.
    """
    reshard(model)
    return accelerator.get_state_dict(model)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, whole; every process that has a part of it has to call this."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def own_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor that processes may share."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shared_like(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return this process's part of a whole tensor, if it has a part only of `weight`."""
    if isinstance(weight, DTensor) and tensor.dim() == weight.dim():
        mesh = weight.device_mesh
        return distribute_tensor(tensor.to(mesh.device_type), mesh, weight.placements)
    return tensor


def check_trained(accelerator: Accelerator, model: nn.Module, step: int) -> None:
    """Refuse to go on with weights that an update has made NaN or infinite.

    Args:
        accelerator: The accelerator of the run.
        model: The prepared model; every process has to call this.
        step: The step of the update, for the error.

    Raises:
        InputError: The sentence names the step.
    """
    reshard(model)
    # One bad weight makes the sum of its tensor bad, and a sum takes no memory.
    trained = [own_part(weight).detach() for weight in model.parameters() if weight.requires_grad]
    sums = [weight.sum(dtype=torch.float32) for weight in trained]
    wrong = (~torch.stack(sums).isfinite()).sum().float()
    if accelerator.reduce(wrong, "sum").item() > 0:
        raise InputError(
            f"Weights are no longer finite after step {step}, of which nothing is saved: the "
            "learning rate is too high, or rewards are too large."
        )


@contextmanager
def synchronized_if(accelerator: Accelerator, model: nn.Module, last: bool) -> Iterator[None]:
    """Let processes exchange gradients inside the `with` block only if that is the last of a step.

    Args:
        accelerator: The accelerator of the run.
        model: The prepared model, whose forward and backward are in the block.
        last: Whether it is the last micro-batch of an optimiser step.
    """
    # DeepSpeed makes its step in the backward after which this says so.
    accelerator.sync_gradients = last
    # Gradients of the micro-batches before add up on each process; one exchange is enough.
    with nullcontext() if last else accelerator.no_sync(model):
        yield


def on_any_process(accelerator: Accelerator, happened: bool) -> bool:
    """Return whether something has happened on a process; every process has to call this."""
    count = torch.tensor(float(happened), device=accelerator.device)
    return accelerator.reduce(count, "sum").item() > 0


class ProcessLost(InputError):
    """Another process of the run has ended, so this one cannot go on."""


@contextmanager
def naming_lost_processes(directory: Path) -> Iterator[None]:
    """Raise `ProcessLost` for the errors of a process whose neighbour has ended.

    Args:
        directory: The output directory of the run.
    """
    try:
        yield
    except RuntimeError as error:
        # NCCL's errors have a type of their own; gloo's are told by their text alone.
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        latest = directory / LATEST
        newest = latest.read_text(encoding="utf-8") if latest.exists() else "not there yet"
        raise ProcessLost(
            "Another process of this run has ended; its own message says why. The newest "
            f"checkpoint in {directory} is {newest}."
        ) from error


Result = TypeVar("Result")


def on_main_process(accelerator: Accelerator, action: Callable[[], Result]) -> Result | None:
    """Call a function on the main process; every process has to call this.

    No process goes on before the function has returned. What it raises, every process raises:
    otherwise the others would wait for the main process forever.

    Args:
        accelerator: The accelerator of the run.
        action: The function.

    Returns:
        What the function returns, on the main process.
    """
    if accelerator.num_processes == 1:
        return action()
    if not accelerator.is_main_process:
        (failure,) = broadcast_object_list([None])
        if failure is not None:
            raise failure
        return None
    try:
        result = action()
    except Exception as error:
        # Exceptions of other packages may not survive the journey.
        is_ours = isinstance(error, InputError)
        broadcast_object_list([error if is_ours else RuntimeError(f"{error!r} in process 0")])
        raise
    broadcast_object_list([None])
    return result
