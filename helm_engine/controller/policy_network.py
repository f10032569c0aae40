"""The learned policy's network in one kernel, from the fields of an observation to the best action.

Each NumPy call that was not made for a second costs about ten microseconds until its code is in the
processor's caches again, and three layers make ten of them; a kernel pays for that once.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import tanh
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from helm_engine.controller.observation_features import features_of

Float32Array = npt.NDArray[np.float32]


def pack_layers(weights: Sequence[Float32Array], biases: Sequence[Float32Array]) -> Float32Array:
    """All parameters in the order of their use, so that a kernel reads them in one go.

    Args:
        weights: of three layers, float32 [inputs, outputs]; those between have one width.
        biases: of each layer, float32 [outputs].

    Returns:
        float32 [parameters]: of each layer the biases, then the weights row by row.
    """
    layers = zip(weights, biases, strict=True)
    return np.concatenate([part.ravel() for weight, bias in layers for part in (bias, weight)])


@njit(cache=True)
def best_action(fields: Any, layers: Any, width: Any, num_actions: Any) -> Any:
    """Place of the action with the highest score; of several the first; -1 where one is no number.

    Args:
        fields: of an `Observation` in their order, a tuple of floats.
        layers: see `pack_layers`.
        width: outputs of each hidden layer.
        num_actions: outputs of the last layer.
    """
    scores = action_scores(features_of(fields), layers, width, num_actions)
    best = 0
    for place in range(num_actions):
        if not np.isfinite(scores[place]):
            return -1
        if scores[place] > scores[best]:
            best = place
    return best


@njit(cache=True)
def action_scores(features: Any, layers: Any, width: Any, num_actions: Any) -> Any:
    """Two hidden layers of tanh and a score for each action: float32 [num_actions]."""
    first, second = np.empty(width, np.float32), np.empty(width, np.float32)
    scores = np.empty(num_actions, np.float32)
    place = _add_layer(features, layers, 0, first)
    _squash(first)
    place = _add_layer(first, layers, place, second)
    _squash(second)
    _add_layer(second, layers, place, scores)
    return scores


@njit(cache=True)
def _add_layer(inputs: Any, layers: Any, place: Any, outputs: Any) -> Any:
    """Fills `outputs` from the parameters that begin at `place`; returns where the next begin."""
    width = len(outputs)
    for j in range(width):
        outputs[j] = layers[place + j]
    for i in range(len(inputs)):
        place += width
        for j in range(width):
            outputs[j] += inputs[i] * layers[place + j]
    return place + width


@njit(cache=True)
def _squash(values: Any) -> None:
    for i in range(len(values)):
        values[i] = tanh(values[i])
