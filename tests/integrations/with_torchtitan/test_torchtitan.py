"""torchtitan's log-probs and ours on the same logits, and what the patch replaces."""

import pytest
import torch
import torch.distributed as dist
import torchtitan.components.loss as stock
from accuracy import assert_no_worse
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torchtitan.experiments.rl.losses import dapo as holder

from fastpg.integrations import torchtitan as ours
from fastpg.integrations.patching import PatchError

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(2, 6, 40, generator=GENERATOR)
LABELS = torch.randint(40, (2, 6), generator=GENERATOR)
LABELS[1, 4:] = stock.IGNORE_INDEX


def test_the_function_is_replaced_where_it_is_held_and_given_back():
    before = stock.compute_logprobs
    with ours.patched(strict=True) as report:
        assert report.version == "0.3.0" and ours.is_patched()
        assert holder.compute_logprobs is stock.compute_logprobs is not before
        assert "already patched" in str(ours.patch())
    assert not ours.is_patched()
    assert holder.compute_logprobs is stock.compute_logprobs is before


def test_another_release_is_in_the_report_and_raises_if_strict(monkeypatch):
    monkeypatch.setattr(ours._patches, "version", lambda: "1.0")
    with pytest.raises(PatchError, match=r"tested with torchtitan 0\.3"):
        ours.patch(strict=True)
    assert not ours.is_patched()


def scores(logits):
    """Log-probs, their gradient, and what is returned with entropies."""
    leaf = logits.clone().requires_grad_()
    logp = stock.compute_logprobs(leaf, LABELS)
    logp.backward(torch.linspace(-1, 1, 12, dtype=logp.dtype).view(2, 6))
    again, entropy = stock.compute_logprobs(leaf, LABELS, return_entropy=True)
    assert again.requires_grad and not entropy.requires_grad
    return logp, leaf.grad, again, entropy[LABELS >= 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_gradients_and_entropies(dtype):
    logits = LOGITS.to(dtype)
    theirs, exact = scores(logits), scores_in_fp64(logits)
    with ours.patched(strict=True):
        mine = scores(logits)
    for result, yardstick, oracle in zip(mine, theirs, exact, strict=True):
        assert result.dtype is yardstick.dtype
        rounding = 2e-6 if result.dtype is torch.float32 else 4e-3
        assert_no_worse(result, yardstick, oracle, rounding)


def scores_in_fp64(logits):
    """The same by the formulas; torchtitan computes nothing in fp64."""
    leaf = logits.double().requires_grad_()
    log_p = leaf.log_softmax(-1)
    logp = log_p.gather(-1, LABELS.clamp(min=0)[..., None])[..., 0]
    logp = logp.masked_fill(LABELS < 0, 0.0)
    logp.backward(torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6))
    entropy = -(log_p.exp() * log_p).sum(-1)
    return logp.detach(), leaf.grad, logp.detach().clone(), entropy[LABELS >= 0].detach()


def test_logits_in_shards_are_left_to_torchtitan_and_noted(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        logits = distribute_tensor(LOGITS, mesh, [Shard(2)])
        with ours.patched() as report:
            found = stock.compute_logprobs(logits, LABELS)
            assert "in shards are left to torchtitan" in str(report)
        torch.testing.assert_close(found, stock.compute_logprobs(LOGITS, LABELS))
    finally:
        dist.destroy_process_group()
