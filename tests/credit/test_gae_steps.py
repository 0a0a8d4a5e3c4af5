"""gae with masked="step": masked tokens between unmasked ones are time steps."""

import pytest
import torch
from accuracy import leaves
from gae_inputs import CU, POISON, flags, inputs, shorten_blocks

from bench.inputs import DEVICE
from fastpg import gae

OP = "gae"
SETTINGS = {"gamma": 0.9, "lam": 0.8, "masked": "step"}


@pytest.fixture(autouse=True)
def short_blocks(request, monkeypatch):
    shorten_blocks(request, monkeypatch)


def by_openrlhf(rewards, values, mask, gamma, lam):
    """RemoteExperienceMaker.get_advantages_and_returns of OpenRLHF, by its words."""
    rewards, values = rewards * mask, values * mask
    advantage, advantages = torch.zeros_like(rewards[:, 0]), []
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * advantage
        advantages.append(advantage)
    advantages = torch.stack(advantages[::-1], dim=1)
    return advantages, advantages + values


def test_it_is_what_openrlhf_computes(kernel):
    rewards, values, mask = inputs((4, 40))
    ours = gae(rewards, values, mask, **SETTINGS)
    expected = by_openrlhf(rewards, values, mask, 0.9, 0.8)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want * mask, rtol=1e-12, atol=1e-12)
    skipped = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    assert (ours[0] - skipped[0]).abs().max() > 0.1  # there are tokens masked inside


def test_without_tokens_masked_inside_both_readings_agree(kernel):
    rewards, values, _ = inputs((3, 9))
    mask = torch.arange(9) < torch.tensor([[9], [4], [0]])
    terminated, _, _ = flags((3,))
    for given in {}, {"bootstrap": values[:, 0]}, {"bootstrap": rewards, "truncated": values > 1}:
        more = given if "truncated" in given else given | {"terminated": terminated}
        step, skip = (
            gae(rewards, values, mask, gamma=0.9, lam=0.8, masked=masked, **more)
            for masked in ("step", "skip")
        )
        assert all(map(torch.equal, step, skip))


def test_the_gradient_of_steps(kernel):
    rewards, values, mask = inputs((2, 6))
    bootstrap = rewards[:, 0] + 1
    given = leaves(rewards, values, bootstrap)

    def both(rewards, values, bootstrap):
        return gae(rewards, values, mask, bootstrap=bootstrap, **SETTINGS)

    assert torch.autograd.gradcheck(both, given, fast_mode=kernel == "triton")


@pytest.mark.parametrize("poison", POISON)
def test_masked_slots_change_no_bit_as_steps(kernel, poison):
    rewards, values, mask = inputs((3, 9))
    terminated, truncated, bootstrap = flags((3, 9))
    rho, c = values.exp(), rewards.exp()
    tensors = {"rewards": rewards, "values": values, "bootstrap": bootstrap, "rho": rho, "c": c}
    bad = {name: x.masked_fill(~mask, poison) for name, x in tensors.items()}
    results = []
    for given in tensors, bad:
        given["rewards"].requires_grad_()
        out = gae(mask=mask, terminated=terminated, truncated=truncated, **given, **SETTINGS)
        results.append((*out, *torch.autograd.grad(sum(x.sum() for x in out), given["rewards"])))
    assert all(map(torch.equal, *results))
    assert all((x[~mask] == 0).all() for x in results[0])


def test_packed_steps_are_those_of_each_sequence_alone(kernel):
    rewards, values, mask = inputs((20,))
    bootstrap = torch.arange(6, dtype=torch.float64)
    packed = gae(rewards, values, mask, bootstrap=bootstrap, cu_seqlens=CU, **SETTINGS)
    for i, (begin, end) in enumerate(zip(CU[:-1].tolist(), CU[1:].tolist(), strict=True)):
        own = [x[None, begin:end] for x in (rewards, values, mask)]
        alone = gae(*own, bootstrap=bootstrap[i : i + 1], **SETTINGS)
        assert all(torch.equal(x[begin:end], y[0]) for x, y in zip(packed, alone, strict=True))


def test_a_bad_reading_of_masked_tokens_raises():
    rewards, _, mask = inputs((3, 7))
    with pytest.raises(ValueError, match="masked must be one of skip, step, got 'zero'"):
        gae(rewards, None, mask, masked="zero")
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to N = 7, got 7 at index 2"):
        bad = torch.tensor([0, 8, 7], dtype=torch.int32)
        gae(rewards[0], None, mask[0], masked="step", cu_seqlens=bad)


@pytest.mark.parametrize("name", ["gamma", "lam"])
@pytest.mark.parametrize("value", [5.0, float("nan")])
def test_the_discount_of_a_masked_step_is_read_and_that_of_padding_is_not(name, value):
    rewards, mask = torch.ones(1, 4), torch.tensor([[1, 0, 1, 0]])
    discount = torch.tensor([[1.0, value, 1.0, 1.0]])
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], holds"):
            gae(rewards, None, mask, masked="step", **{name: discount})
    padded = torch.tensor([[1.0, 1.0, 1.0, value]])
    advantages, _ = gae(rewards, None, mask, masked="step", **{name: padded})
    assert advantages.tolist() == [[2.0, 0.0, 1.0, 0.0]]
