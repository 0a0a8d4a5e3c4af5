"""An LM head in an FSDP2 group of its own: a half on each of two ranks with rows of their own."""

import importlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fastpg.integrations import trl as fastpg_trl
from fastpg.integrations.trl_head import OUTPUTS
from fastpg.integrations.trl_verify import Head, Stub

utils = importlib.import_module("trl.trainer.utils")


def on_each_rank(rank, folder):
    """Compares with the mean over the ranks of the gradients of a whole head."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    mesh, generator = init_device_mesh("cpu", (2,)), torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator)
    hidden = torch.randn(2, 6, 8, generator=generator)
    labels = torch.randint(50, (2, 6), generator=generator)
    labels[1, 3:] = -100
    whole = weight.clone().requires_grad_()
    logp = (hidden @ whole.T / 0.7).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])
    (logp[..., 0] * (labels >= 0)).sum().div(2).backward()
    for outputs in (("log_probs",), OUTPUTS):
        parts = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
        model = Stub(parts, None, Head())
        with fastpg_trl.patched(strict=True):
            utils.add_fused_lm_head(model, temperature=0.7, outputs=outputs)
            found = model.forward(
                hidden[rank][None], shift_labels=labels[rank][None], fused_lm_head=True
            )
            found.log_probs.sum().backward()
        torch.testing.assert_close(parts.grad.full_tensor(), whole.grad)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(utils, "add_fused_lm_head"), reason="from TRL 1.15 on")
def test_the_gradient_is_the_mean_over_the_ranks(tmp_path):
    # A fork has imported TRL already.
    mp.start_processes(on_each_rank, (tmp_path,), nprocs=2, start_method="fork")
