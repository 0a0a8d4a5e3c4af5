"""AdaptiveKL against the controller of lm-human-preferences (train_policy.py), by its formula."""

import pytest
import torch

from fastpg import AdaptiveKL


def test_it_moves_as_the_formula_says():
    controller = AdaptiveKL(0.2, target=6.0, horizon=10_000)
    expected = 0.2
    for kl, n, error in [(6.6, 64, 0.1), (100.0, 64, 0.2), (3.0, 10, -0.2), (6.0, 64, 0.0)]:
        expected *= 1 + error * n / 10_000
        assert controller.update(kl, n) == controller.value == pytest.approx(expected, rel=1e-12)


def test_it_finds_the_coefficient_that_holds_the_target():
    controller = AdaptiveKL(1.0, target=5.0, horizon=1_000)
    for _ in range(500):
        kl = 2.0 / controller.value  # a policy that drifts the less, the dearer it is
        controller.update(torch.tensor(kl), 100)
    assert controller.value == pytest.approx(0.4, rel=1e-3)


def test_its_state_can_be_saved():
    first, second = (AdaptiveKL(0.1, target=1.0, horizon=100) for _ in range(2))
    first.update(3.0, 50)
    second.load_state_dict(first.state_dict())
    assert first.value == second.value != 0.1


def test_bad_numbers_are_refused():
    with pytest.raises(TypeError, match="AdaptiveKL: init must be a number, got str"):
        AdaptiveKL("0.1", target=1, horizon=1)
    with pytest.raises(TypeError, match="AdaptiveKL: n must be a number, got NoneType"):
        AdaptiveKL(0.1, target=1, horizon=1).update(0.0, None)
    with pytest.raises(ValueError, match="target must be finite and > 0, got 0"):
        AdaptiveKL(0.1, target=0, horizon=1)
    with pytest.raises(ValueError, match="horizon must be finite and > 0, got inf"):
        AdaptiveKL(0.1, target=1, horizon=float("inf"))
    with pytest.raises(ValueError, match="kl_per_sequence must be finite, got nan"):
        AdaptiveKL(0.1, target=1, horizon=1).update(float("nan"), 1)
    for n in (-1, 2, float("nan")):
        with pytest.raises(ValueError, match=rf"n must be in \[0, horizon=1\], got {n}"):
            AdaptiveKL(0.1, target=1, horizon=1).update(0.0, n)
