"""The KL coefficient that steers towards a target (Ziegler et al. 2019, lm-human-preferences).

    error = clip(KL / target − 1, −0.2, 0.2)    coefficient ← coefficient · (1 + error n / horizon)

KL is that of whole sequences: summed over the tokens of each, then averaged over the sequences. A
mean over tokens would be too small by their length, and the coefficient would sink to 0.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..common.checks import check_number

MAX_ERROR = 0.2  # the most that a relative error counts, on either side


def _positive(name: str, value: float) -> float:
    check_number("AdaptiveKL", name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"AdaptiveKL: {name} must be finite and > 0, got {value}")
    return float(value)


class AdaptiveKL:
    """A coefficient that rises while the KL is above its target, and sinks while it is below.

    With error = clip(KL / target − 1, −0.2, 0.2), n sequences multiply the coefficient by
    1 + error · n / horizon. KL is that of whole sequences: summed over tokens, averaged over
    sequences.

    Args:
        init: The first value, > 0.
        target: The wanted KL per sequence, > 0, in nats.
        horizon: A number of sequences, > 0: in so many the value changes by a fifth at most, or by
            22%, e^0.2, where they come in many small updates.

    Attributes:
        value: The coefficient.

    Raises:
        TypeError: An argument is no number.
        ValueError: An argument is not finite and > 0.

    Example:
        >>> coefficient = fastpg.AdaptiveKL(init=0.1, target=6.0, horizon=1000)
        >>> coefficient.update(kl_per_sequence=12.0, n=100)
        0.10200000000000001

    Reference:
        Ziegler et al. 2019, "Fine-tuning language models from human preferences",
        arXiv:1909.08593.
    """

    def __init__(self, init: float, target: float, horizon: float) -> None:
        self.value = _positive("init", init)
        self.target = _positive("target", target)
        self.horizon = _positive("horizon", horizon)

    def update(self, kl_per_sequence: float | Tensor, n: int) -> float:
        """Moves the value after n sequences of this mean KL.

        Args:
            kl_per_sequence: The mean KL of the sequences, in nats: a float, or a 0-d tensor, which
                is read on the host, and that waits for its device.
            n: How many sequences there were, at most the horizon.

        Returns:
            The new value.

        Raises:
            TypeError: An argument is no number.
            ValueError: kl_per_sequence is not finite, or n is not in [0, horizon].
        """
        if not isinstance(kl_per_sequence, Tensor):
            check_number("AdaptiveKL", "kl_per_sequence", kl_per_sequence)
        check_number("AdaptiveKL", "n", n)
        kl_per_sequence = float(kl_per_sequence)
        if not math.isfinite(kl_per_sequence):
            raise ValueError(f"AdaptiveKL: kl_per_sequence must be finite, got {kl_per_sequence}")
        if not 0 <= n <= self.horizon:  # many more would turn the sign of the value
            raise ValueError(f"AdaptiveKL: n must be in [0, horizon={self.horizon:g}], got {n}")
        error = min(max(kl_per_sequence / self.target - 1, -MAX_ERROR), MAX_ERROR)
        self.value *= 1 + error * n / self.horizon
        return self.value

    def state_dict(self) -> dict[str, float]:
        """The value, which training changes. Target and horizon are settings."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes the value from what `state_dict` returned."""
        self.value = _positive("value", state["value"])
