"""gae against torchrl, whose episodes end by flags, inside a row too."""

import pytest
import torch
from torchrl.objectives.value import functional

from fastpg import gae


def episodes():
    """Rewards, values, those of the next states, and where episodes are done and terminated."""
    reward, value, next_value = torch.randn(3, 5, 60, dtype=torch.float64)
    done = torch.rand(5, 60) < 0.1
    terminated = done & (torch.rand(5, 60) < 0.5)
    done[:, -1] = True  # A row that just ends is one that is truncated there.
    follows = torch.cat([value[:, 1:], next_value[:, -1:]], dim=1)
    return reward, value, torch.where(done, next_value, follows), done, terminated


@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.5)])
@pytest.mark.parametrize(
    "name", ["generalized_advantage_estimate", "vec_generalized_advantage_estimate"]
)
def test_advantages_and_value_targets(name, gamma, lam):
    reward, value, next_value, done, terminated = episodes()
    columns = (x[..., None] for x in (value, next_value, reward, done, terminated))
    oracle = getattr(functional, name)(gamma, lam, *columns)
    results = gae(
        reward,
        value,
        gamma=gamma,
        lam=lam,
        terminated=terminated,
        truncated=done & ~terminated,
        bootstrap=next_value,
    )
    # torchrl rounds the discounts to fp32.
    for result, expected in zip(results, oracle, strict=True):
        torch.testing.assert_close(result, expected[..., 0], rtol=1e-6, atol=1e-6)
