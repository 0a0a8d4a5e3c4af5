"""What a checkpoint holds: all that changes while a trainer trains, and what it started from."""

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fastpg import AdaptiveKL
from fastpg.trainer.data.prompts import Example
from fastpg.trainer.run.checkpoint import Checkpoint
from fastpg.trainer.run.engine import is_deepspeed, reshard, shared_like, whole
from fastpg.trainer.settings.config import PPOConfig
from fastpg.trainer.settings.parsing import InputError

CHANGEABLE = (
    "output_dir",
    "num_steps",
    "micro_batch_size",
    "micro_batch_tokens",
    "eval_steps",
    "num_logged_completions",
    "report_to",
    "save_steps",
    "save_total_limit",
)
"""A run may be taken up with other values of these settings."""

_SAMPLES = 1024  # numbers of each weight that the fingerprint of a model reads


def random_state() -> dict[str, Any]:
    """Return the state of every generator that a run draws from, as JSON."""
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
    }
    if torch.cuda.is_available():
        state["cuda"] = [device.tolist() for device in torch.cuda.get_rng_state_all()]
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set every generator to a state that `random_state` returned.

    Args:
        state: The state, also after a journey through JSON.
    """
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(
            [torch.tensor(device, dtype=torch.uint8) for device in state["cuda"]]
        )


def fingerprint_of_model(model: nn.Module, all_weights: bool) -> str:
    """Return a digest of some numbers of each weight.

    Args:
        model: The model that a run starts from.
        all_weights: If False, weights that are trained do not count.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if weight.requires_grad and not all_weights:
            continue
        numbers = weight.detach().flatten()
        chosen = numbers[:: max(1, len(numbers) // _SAMPLES)]
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(chosen.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint_of_prompts(prompts: Iterable[Any]) -> str:
    """Return a digest of the prompts of a dataset, in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(prompt, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def origin_of_run(
    rewards: Iterable[str],
    dataset: Sequence[Example],
    policy: nn.Module,
    value_model: nn.Module | None,
    has_copy: bool,
) -> dict[str, str]:
    """Describe what a run starts from, which has to be the same where it is taken up.

    Args:
        rewards: The names of the reward functions.
        dataset: The training examples.
        policy: The model, before processes share its weights out.
        value_model: The same of the critic, if it has a trunk of its own.
        has_copy: Whether a copy of the starting model is kept for the KL penalty. Otherwise
            weights that are trained do not matter: they come from the checkpoint.
    """
    prompts = (dataset[i]["prompt"] for i in range(len(dataset)))
    return {
        "list of reward functions": " ".join(rewards),
        "dataset": fingerprint_of_prompts(prompts),
        "starting model": fingerprint_of_model(policy, all_weights=has_copy),
        "value model": "" if value_model is None else fingerprint_of_model(value_model, False),
    }


@dataclass
class TrainingState:
    """Everything that training changes, to be written to a checkpoint and read from one.

    Args:
        accelerator: The accelerator of the run.
        model: The prepared `PolicyWithValue`.
        optimizer: Its prepared optimiser.
        scheduler: The schedule of the learning rates.
        args: The settings of the run.
        origin: Digests of what the run starts from, by name: they have to be the same again.
        kl_controller: What moves the weight of the KL penalty, if something does.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    args: PPOConfig
    origin: dict[str, str]
    kl_controller: AdaptiveKL | None

    def checkpoint(self, step: int, drawn: dict[str, Any], more: dict[str, Any]) -> Checkpoint:
        """Gather the state after a step; every process has to call this.

        Args:
            step: The step.
            drawn: What `random_state` returns where the next step begins.
            more: Other things to keep, as JSON.

        Returns:
            The checkpoint, on the CPU.
        """
        optimizer: dict[str, Any] = {"state": {}, "param_groups": []}
        tensors: dict[str, Tensor] = {}
        # DeepSpeed's optimiser has a state of its own form: such a checkpoint is the model alone.
        if not is_deepspeed(self.accelerator):
            optimizer = self.optimizer.state_dict()
            tensors = {f"weights.{name}": tensor for name, tensor in self._weights().items()}
        for index, values in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        scaler = self.accelerator.scaler
        state = {
            "settings": {field.name: getattr(self.args, field.name) for field in fields(PPOConfig)},
            "origin": self.origin,
            "random": gather_object([drawn]),
            "parameter_groups": optimizer["param_groups"],
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "kl_controller": self.kl_controller and self.kl_controller.state_dict(),
            **more,
        }
        return Checkpoint(step, {name: whole(x) for name, x in tensors.items()}, state)

    def trainable_bytes(self) -> int:
        """Return the size of what training changes in the model."""
        # ZeRO-3 leaves an empty tensor, and the number that it stands for.
        return sum(
            getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size()
            for tensor in self._weights().values()
        )

    def _weights(self) -> dict[str, Tensor]:
        """Return what training changes in the model, each tensor once."""
        reshard(self.model)
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        kept = model.state_dict()
        weights: dict[str, Tensor] = {
            name: buffer for name, buffer in model.named_buffers() if name in kept
        }
        return weights | {name: p for name, p in model.named_parameters() if p.requires_grad}

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint of another run.

        Args:
            checkpoint: The checkpoint.

        Raises:
            InputError: Its settings, its data, its starting model or its number of processes are
                not those of this run. The sentence says which.
        """
        state = checkpoint.state
        if is_deepspeed(self.accelerator):
            raise InputError(
                "A run under DeepSpeed cannot be resumed: its checkpoints hold the model without "
                f"the optimiser. A new run can begin from model in checkpoint-{checkpoint.step}."
            )
        for name, value in state["settings"].items():
            own = getattr(self.args, name, None)
            if name not in CHANGEABLE and own != value:
                raise InputError(
                    f"The checkpoint was made with {name}={value!r}, not {own!r}; "
                    "begin a new run from its model to change that."
                )
        for what, digest in state["origin"].items():
            if self.origin[what] != digest:
                raise InputError(f"The checkpoint belongs to a run with another {what}.")
        for name, weight in self._weights().items():
            saved = checkpoint.tensors.get(f"weights.{name}")
            if saved is None or saved.shape != weight.shape:
                raise InputError(f"The checkpoint belongs to a run of another model: see {name}.")
        if len(state["random"]) != self.accelerator.num_processes:
            raise InputError(
                f"The checkpoint was made by {len(state['random'])} processes, not by "
                f"{self.accelerator.num_processes}."
            )
        if checkpoint.step > self.args.num_steps:
            raise InputError(
                f"The checkpoint is of step {checkpoint.step}, after num_steps="
                f"{self.args.num_steps}."
            )

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up weights, optimiser and schedule; the random numbers are left to the caller.

        Args:
            checkpoint: A checkpoint of this run.
        """
        state, tensors = checkpoint.state, checkpoint.tensors
        for name, weight in self._weights().items():
            weight.copy_(shared_like(tensors[f"weights.{name}"], weight))
        moments: dict[int, dict[str, Tensor]] = {}
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                moments.setdefault(int(index), {})[name] = shared_like(value, trained[int(index)])
        # The schedule is a function of the step, so a longer run has the rates of a longer run.
        rates = [
            base * factor(checkpoint.step)
            for base, factor in zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        ]
        groups = [
            {**group, "betas": tuple(group["betas"]), "lr": rate}
            for group, rate in zip(state["parameter_groups"], rates, strict=True)
        ]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.scheduler.load_state_dict({**state["scheduler"], "_last_lr": rates})
        if self.kl_controller is not None:
            self.kl_controller.load_state_dict(state["kl_controller"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def restore_random(self, checkpoint: Checkpoint) -> None:
        """Set the generators of this process to where the step after a checkpoint begins."""
        restore_random_state(checkpoint.state["random"][self.accelerator.process_index])
