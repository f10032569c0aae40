"""The network's kernel against the same three layers in NumPy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from msgspec.structs import astuple, replace

from helm_engine.controller.observation import FEATURES, Observation
from helm_engine.controller.policy_network import action_scores, best_action, pack_layers

NUM_ACTIONS = 7


def layers(width: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    sizes = [len(FEATURES), width, width, NUM_ACTIONS]
    shapes = list(pairwise(sizes))
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    return weights, [rng.standard_normal(shape[1]).astype(np.float32) / 10 for shape in shapes]


def reference(
    weights: list[np.ndarray], biases: list[np.ndarray], values: np.ndarray
) -> np.ndarray:
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        values = np.tanh(values @ weight + bias)
    return np.asarray(values @ weights[-1] + biases[-1])


@pytest.mark.parametrize("width", [1, 5, 64])
def test_scores_and_the_best_action_are_those_of_numpy(width: int) -> None:
    weights, biases = layers(width, seed=width)
    packed = pack_layers(weights, biases)
    assert packed.dtype == np.float32
    rng = np.random.default_rng(1)
    found = set()
    for _ in range(50):
        seen = Observation(*(10.0 * rng.random(len(Observation.__struct_fields__))).tolist())
        expected = reference(weights, biases, seen.vector())
        scores = action_scores(seen.vector(), packed, width, NUM_ACTIONS)
        np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4)
        best = best_action(astuple(seen), packed, width, NUM_ACTIONS)
        assert expected[best] == pytest.approx(expected.max(), abs=1e-3)
        found.add(best)
    assert width == 1 or len(found) > 1


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_without_numbers_there_is_no_best_action(wrong: float) -> None:
    weights, biases = layers(4, seed=1)
    seen = Observation(*[0.5] * len(Observation.__struct_fields__))
    broken = pack_layers(weights, [*biases[:2], np.full(NUM_ACTIONS, wrong, dtype=np.float32)])
    assert best_action(astuple(seen), broken, 4, NUM_ACTIONS) == -1
    whole = pack_layers(weights, biases)
    assert best_action(astuple(seen), whole, 4, NUM_ACTIONS) >= 0
    assert best_action(astuple(replace(seen, kv_hit_rate=np.nan)), whole, 4, NUM_ACTIONS) == -1
