"""The online layer: a small network that learns what the frozen policy leaves on the table.

It predicts, from what is seen now, which way the pages of the next window will have wanted to go:
the balance of what a page would have saved one tenant and cost the other. Its bounded prediction
is added to the base policy's rate. The HELM paper (Yu, Han and Zhou, arXiv 2605.04450) has a
three-layer network whose learning rate grows with the gap between P99 and its average; what it is
taught there is not known, so the signal is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, isfinite, tanh

import numpy as np
import numpy.typing as npt

from helm_engine.controller.observation import FEATURES, Observation, balance

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ResidualConfig:
    """How far the adapter may go, and how fast it learns."""

    bound: float = 1.0 / 3.0
    """Share of the slew limit that it adds at most; the smallest step of the base policy."""
    width: int = 16
    """Of both hidden layers."""
    learning_rate: float = 0.01
    """While P99 is what it usually is."""
    urgency: float = 4.0
    """The rate is so many times higher where P99 differs from its average by the average."""
    largest_rate: float = 0.05
    average_s: float = 60.0
    """P99's average fades with it."""
    pause_s: float = 10.0
    """After so long without a query, what was predicted last is not judged by what is seen now."""
    least_samples: float = 50.0
    """Visits and lookups behind the worth of a page, below which nothing is learned from it."""


class ResidualAdapter:
    """Learns one example for each query of the policy; forgets all when it is reset."""

    def __init__(self, config: ResidualConfig | None = None, seed: int = 0) -> None:
        """Begins with a correction of nothing: the last layer is 0."""
        self._config = config or ResidualConfig()
        self._seed = seed
        self.reset()

    def reset(self) -> None:
        """Forgets what was learned; what it was taught no longer holds after a burst."""
        rng = np.random.default_rng(self._seed)
        sizes = (len(FEATURES), self._config.width, self._config.width)
        self._weights: list[Float32Array] = [
            (rng.standard_normal((inputs, outputs)) / inputs**0.5).astype(np.float32)
            for inputs, outputs in ((sizes[0], sizes[1]), (sizes[1], sizes[2]))
        ]
        self._biases: list[Float32Array] = [np.zeros(one, dtype=np.float32) for one in sizes[1:]]
        self._last: Float32Array = np.zeros(sizes[2], dtype=np.float32)
        self._seen: tuple[list[Float32Array], float] | None = None
        """Layers' outputs at the last query, and what was predicted then."""
        self._average = 0.0
        self._at: float | None = None

    def rate(self, observation: Observation) -> float:
        """Learns from what the last window turned out to be, then predicts the next one.

        Returns:
            Share of the slew limit to add, within plus and minus `bound`.
        """
        if self._at is not None and observation.now - self._at > self._config.pause_s:
            self._seen = None
        urgency = self._follow_p99(observation)
        signal = self._signal(observation)
        if signal is not None and self._seen is not None:
            self._learn(*self._seen, signal, urgency)
        if signal is None:
            self._seen = None
            return 0.0
        layers = [observation.vector()]
        for weight, bias in zip(self._weights, self._biases, strict=True):
            layers.append(np.tanh(layers[-1] @ weight + bias))
        predicted = tanh(float(layers[-1] @ self._last))
        self._seen = layers, predicted
        return self._config.bound * predicted

    def _signal(self, observation: Observation) -> float | None:
        """Which way pages wanted to go, -1..1; None where too little was seen to tell."""
        if min(observation.kv_samples, observation.emb_samples) < self._config.least_samples:
            return None
        to_emb = balance(observation.emb_page_gain_ms, observation.kv_page_loss_ms)
        to_kv = balance(observation.kv_page_gain_ms, observation.emb_page_loss_ms)
        signal = max(0.0, to_emb) - max(0.0, to_kv)
        return signal if isfinite(signal) else None

    def _follow_p99(self, observation: Observation) -> float:
        """How far P99 is from its average, as a share of it."""
        now, p99 = observation.now, observation.p99_over_slo
        if self._at is None or self._average <= 0.0:
            self._at, self._average = now, p99
            return 0.0
        share = 1.0 - exp(-(now - self._at) / self._config.average_s)
        gap = abs(p99 - self._average) / self._average
        self._average += share * (p99 - self._average)
        self._at = now
        return gap

    def _learn(
        self, layers: list[Float32Array], predicted: float, signal: float, gap: float
    ) -> None:
        """A step down the gradient of the squared error of one prediction."""
        config = self._config
        rate = min(config.largest_rate, config.learning_rate * (1.0 + config.urgency * gap))
        slope = rate * (signal - predicted) * (1.0 - predicted * predicted)
        upstream = slope * self._last
        self._last = self._last + np.float32(slope) * layers[-1]
        for number in (1, 0):
            local = upstream * (1.0 - layers[number + 1] ** 2)
            upstream = self._weights[number] @ local
            self._weights[number] += np.outer(layers[number], local).astype(np.float32)
            self._biases[number] += local.astype(np.float32)
