"""The frozen base policy: a small network that was trained in the simulator, and is only read."""

from __future__ import annotations

import json
from itertools import pairwise
from math import nan
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from helm_engine.controller.baselines import STEPS
from helm_engine.controller.observation import FEATURES, Observation
from helm_engine.controller.policy_network import action_scores, best_action, pack_layers

Float32Array = npt.NDArray[np.float32]

ACTIONS = (*(-step for step in reversed(STEPS)), 0.0, *STEPS)
"""Shares of the slew limit that the network chooses between."""

SHIPPED = Path(__file__).with_name("base_policy.safetensors")
"""What `helm-engine train-controller` made for the package; `docs/controller.md` says how."""

_LAYERS = 3


class BasePolicy:
    """Two hidden layers of tanh, and a score for each action; the best one is taken."""

    def __init__(self, weights: list[Float32Array], biases: list[Float32Array]) -> None:
        """Takes the layers.

        Args:
            weights: of each layer, float32 [inputs, outputs]; the first has `FEATURES` as inputs,
                the last `ACTIONS` as outputs.
            biases: of each layer, float32 [outputs].

        Raises:
            ValueError: shapes do not fit each other, or a number is none; names the layer.
        """
        if len(weights) != _LAYERS or {one.ndim for one in biases} != {1}:
            raise ValueError("there must be three layers, each with one bias for an output")
        if len(biases[0]) != len(biases[1]):
            raise ValueError("there must be three layers, the hidden ones of one width")
        width = len(FEATURES)
        for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            outputs = len(ACTIONS) if number == len(weights) - 1 else len(bias)
            if weight.shape != (width, outputs) or bias.shape != (outputs,):
                raise ValueError(
                    f"layer {number}: {weight.shape} and {bias.shape} are not "
                    f"({width}, {outputs}) and ({outputs},)"
                )
            if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                raise ValueError(f"layer {number}: holds what is not a number")
            width = outputs
        self._layers = pack_layers(
            [weight.astype(np.float32) for weight in weights],
            [bias.astype(np.float32) for bias in biases],
        )
        self._width = len(biases[0])

    def rate(self, observation: Observation) -> float:
        """See `Policy.rate`: one of `ACTIONS`, or NaN where a score is none."""
        fields = msgspec.structs.astuple(observation)
        best = best_action(fields, self._layers, self._width, len(ACTIONS))
        return ACTIONS[best] if best >= 0 else nan

    def scores(self, features: Float32Array) -> Float32Array:
        """Of each action, float32 [len(ACTIONS)], for `Observation.vector`."""
        scores: Float32Array = action_scores(features, self._layers, self._width, len(ACTIONS))
        return scores

    @classmethod
    def random(cls, seed: int, width: int = 64) -> BasePolicy:
        """The same network before it has learned anything."""
        rng = np.random.default_rng(seed)
        sizes = [len(FEATURES), width, width, len(ACTIONS)]
        shapes = list(pairwise(sizes))
        weights = [
            (rng.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32) for shape in shapes
        ]
        return cls(weights, [np.zeros(shape[1], dtype=np.float32) for shape in shapes])


def load_base_policy(path: Path = SHIPPED) -> BasePolicy:
    """Reads a policy.

    Raises:
        ValueError: the file is missing, damaged, or made for other observations or actions.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            weights = [file.get_tensor(f"layer{number}.weight") for number in range(_LAYERS)]
            biases = [file.get_tensor(f"layer{number}.bias") for number in range(_LAYERS)]
    except (OSError, SafetensorError) as error:
        raise ValueError(f"policy {path}: cannot be read: {error}") from error
    for name, expected in (("features", FEATURES), ("actions", ACTIONS)):
        if about.get(name) != json.dumps(expected):
            raise ValueError(f"policy {path}: was trained for other {name}")
    try:
        return BasePolicy(weights, biases)
    except ValueError as error:
        raise ValueError(f"policy {path}: {error}") from error
