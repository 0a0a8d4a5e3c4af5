"""The KL coefficient that steers towards a target (Ziegler et al. 2019, lm-human-preferences).

    error = clip(KL / target − 1, −0.2, 0.2)    coefficient ← coefficient · (1 + error n / horizon)

KL is that of whole sequences: summed over the tokens of each, then averaged over the sequences. A
mean over tokens would be too small by their length, and the coefficient would sink to 0.
"""

from __future__ import annotations

import math


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"AdaptiveKL: {name} must be finite and > 0, got {value}")
    return float(value)


class AdaptiveKL:
    """A coefficient, `value`, that rises while the KL is above its target, and sinks below it.

    init: the first value.
    target: the wanted KL per sequence.
    horizon: sequences; in that many the value changes by a fifth at most.
    """

    def __init__(self, init: float, target: float, horizon: float) -> None:
        self.value = _positive("init", init)
        self.target = _positive("target", target)
        self.horizon = _positive("horizon", horizon)

    def update(self, kl_per_sequence: float, n: int) -> float:
        """Moves the value after n sequences of this mean KL, and returns it.

        kl_per_sequence may be a 0-d tensor; it is read on the host, which waits for its device.
        """
        kl_per_sequence = float(kl_per_sequence)
        if not math.isfinite(kl_per_sequence):
            raise ValueError(f"AdaptiveKL: kl_per_sequence must be finite, got {kl_per_sequence}")
        if not 0 <= n <= self.horizon:  # many more would turn the sign of the value
            raise ValueError(f"AdaptiveKL: n must be in [0, horizon={self.horizon:g}], got {n}")
        error = min(max(kl_per_sequence / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n / self.horizon
        return self.value

    def state_dict(self) -> dict[str, float]:
        """What training changes: the value. Target and horizon are settings."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = _positive("value", state["value"])
