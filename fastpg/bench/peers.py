"""Other packages that compute the same, each in a few lines, or why one is left out.

`ask` never raises: whatever keeps a package from taking part is a reason, which the report shows.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from . import baselines
from .problem import Solution

Adapter = Callable[[str], Solution]  # from "cpu" or "cuda"

GPU = "its kernels need a GPU"

# Without a GPU torch.compile makes the form that these have.
COMPILED_ON_A_CPU = ("cut-cross-entropy", "liger-kernel")


class LeftOutError(Exception):
    """Why a package takes no part."""


def ask(adapters: Mapping[str, Adapter], device: str) -> tuple[dict[str, Solution], dict[str, str]]:
    """The peers that are there.

    Args:
        adapters: By name; each returns a solution for a device or raises.
        device: "cpu" or "cuda".

    Returns:
        Solutions by name, and reasons by name for those that are left out.
    """
    found, left_out = {}, {}
    for name, adapter in adapters.items():
        try:
            # Some packages print and warn as they are imported.
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                found[name] = adapter(device)
        except LeftOutError as error:
            left_out[name] = str(error)
        except Exception as error:  # An import may fail in any way, on an untested version too.
            reason = str(error).strip().splitlines() or [""]
            left_out[name] = f"it cannot be imported: {type(error).__name__}: {reason[0]}"
    return found, left_out


def needs(module: str, device: str, *, gpu: bool = False) -> None:
    """Raises where a package is not installed, or cannot run on a device."""
    if find_spec(module) is None:
        raise LeftOutError("not installed")
    if gpu and device != "cuda":
        raise LeftOutError(GPU)


def trl_log_probs(device: str) -> Solution:
    """TRL's `selective_log_softmax`."""
    needs("trl", device)
    return import_module("trl.trainer.utils").selective_log_softmax


def trl_log_probs_and_entropy(device: str) -> Solution:
    """The two functions of TRL that its trainers call for both."""
    needs("trl", device)
    utils = import_module("trl.trainer.utils")
    return lambda x, y: (utils.selective_log_softmax(x, y), utils.entropy_from_logits(x))


def trl_kernel(device: str) -> Solution:
    """TRL's kernel for both, of which the log-probs are taken."""
    needs("trl", device, gpu=True)
    kernels = import_module("trl.kernels.logprob_entropy")
    return lambda x, y: kernels.selective_log_softmax_and_entropy(x, y)[0]


def quack_log_probs(device: str) -> Solution:
    """The cross entropy of quack-kernels."""
    needs("quack", device, gpu=True)
    quack = import_module("quack.cross_entropy")
    return lambda x, y: -quack.cross_entropy(x, y, reduction="none")


def flash_log_probs(device: str) -> Solution:
    """The cross entropy of flash-attention."""
    needs("flash_attn", device, gpu=True)
    flash = import_module("flash_attn.ops.triton.cross_entropy")
    return lambda x, y: -flash.cross_entropy_loss(x, y)[0]


def liger_log_probs(device: str) -> Solution:
    """Liger's cross entropy, which writes the gradient over the logits; the sum alone has one."""
    needs("liger_kernel", device, gpu=True)
    liger = import_module("liger_kernel.transformers.functional")
    return lambda x, y: -liger.liger_cross_entropy(x, y, reduction="sum")


def trl_head_log_probs(device: str) -> Solution:
    """TRL's log-probs from hidden states, in chunks."""
    needs("trl", device)
    chunked = import_module("trl.trainer.utils")._ChunkedLogProbFunction

    def log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        arguments = (hidden, weight, None, labels, 1.0, 256, None, 1.0, ("log_probs",))
        return chunked.apply(*arguments)[0]

    return log_probs


def trl_head(device: str) -> Solution:
    """Their negative sum."""
    log_probs = trl_head_log_probs(device)
    return lambda *args: -log_probs(*args).sum()  # type: ignore[union-attr]


def torch_head(device: str) -> Solution:
    """torch's own fused head, from 2.13 on."""
    own = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if own is None:
        raise LeftOutError(f"torch {torch.__version__} has none")
    return lambda *args: own(*args, reduction="sum")


def liger_head(device: str) -> Solution:
    """Liger's fused linear cross entropy."""
    needs("liger_kernel", device, gpu=True)
    liger = import_module("liger_kernel.transformers.functional")
    return lambda *args: liger.liger_fused_linear_cross_entropy(*args, reduction="sum")


def cut_cross_entropy_head(device: str) -> Solution:
    """Apple's; without a GPU what it has torch.compile make."""
    needs("cut_cross_entropy", device)
    cce = import_module("cut_cross_entropy").linear_cross_entropy
    impl = "cce" if device == "cuda" else "torch_compile"
    return lambda *args: cce(*args, reduction="sum", impl=impl)


def quack_head(device: str) -> Solution:
    """The linear cross entropy of quack-kernels."""
    needs("quack", device, gpu=True)
    quack = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda *args: quack(*args, reduction="sum")


def liger_policy_loss(device: str) -> Solution:
    """Liger's loss of GRPO from hidden states, in chunks of sequences, by torch.compile."""
    needs("liger_kernel", device)
    chunked = import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    grpo = chunked(beta=0.0, use_ref_model=False, loss_type="bnpo")

    def loss(
        hidden: Tensor, weight: Tensor, labels: Tensor, advantages: Tensor, old_logp: Tensor
    ) -> Tensor:
        mask = torch.ones_like(labels)
        return grpo(hidden, weight, labels, mask, advantages, old_per_token_logps=old_logp)[0]

    return loss


def scipy_gae(gamma: float, lam: float) -> Adapter:
    """scipy's C loop, in numpy."""

    def adapter(device: str) -> Solution:
        needs("scipy", device)
        if device != "cpu":
            raise LeftOutError("it runs on a CPU only")
        return partial(baselines.gae_by_filter, gamma=gamma, lam=lam)

    return adapter


def torchrl_gae(gamma: float, lam: float) -> Adapter:
    """torchrl's vectorised form."""

    def adapter(device: str) -> Solution:
        needs("torchrl", device)
        functions = import_module("torchrl.objectives.value.functional")

        def advantages(rewards: Tensor, values: Tensor) -> Tensor:
            following = torch.nn.functional.pad(values[:, 1:], (0, 1))[..., None]
            done = torch.zeros_like(following, dtype=torch.bool)
            done[:, -1:] = True
            args = values[..., None], following, rewards[..., None], done, done
            return functions.vec_generalized_advantage_estimate(gamma, lam, *args)[0][..., 0]

        return advantages

    return adapter


def torchaudio_gae(gamma: float, lam: float) -> Adapter:
    """The filter 1 / (1 - γλ z) of torchaudio on the reversed sequence."""

    def adapter(device: str) -> Solution:
        needs("torchaudio", device)

        lfilter = import_module("torchaudio.functional").lfilter

        def advantages(rewards: Tensor, values: Tensor) -> Tensor:
            delta = baselines.deltas(rewards, values, gamma)
            a, b = delta.new_tensor([1.0, -gamma * lam]), delta.new_tensor([1.0, 0.0])
            return lfilter(delta.flip(-1), a, b, clamp=False).flip(-1)

        return advantages

    return adapter


LOG_PROBS = {
    "TRL": trl_log_probs,
    "TRL's kernel": trl_kernel,
    "liger-kernel": liger_log_probs,
    "quack-kernels": quack_log_probs,
    "flash-attention": flash_log_probs,
}
LOG_PROBS_AND_ENTROPY = {"TRL": trl_log_probs_and_entropy}
HEAD_LOG_PROBS = {"TRL": trl_head_log_probs}
HEAD_CROSS_ENTROPY = {
    "torch's linear_cross_entropy": torch_head,
    "TRL": trl_head,
    "liger-kernel": liger_head,
    "cut-cross-entropy": cut_cross_entropy_head,
    "quack-kernels": quack_head,
}
HEAD_POLICY_LOSS = {"liger-kernel": liger_policy_loss}
