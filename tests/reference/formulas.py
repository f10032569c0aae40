"""What the slow references share: elementary functions in float64, and how weights are named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def sigmoid(x: Array) -> Array:
    result: Array = 1.0 / (1.0 + np.exp(-x))
    return result


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def standardise(x: Array, eps: float) -> Array:
    """Layer norm without weights, over the last dimension."""
    centred = x - x.mean(axis=-1, keepdims=True)
    result: Array = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return result


def l2_normalise(x: Array, eps: float) -> Array:
    """Divided by max(eps, L2 norm), over the last dimension."""
    result: Array = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), eps)
    return result


@dataclass(frozen=True)
class Weights:
    """Tensors by their names in `model.safetensors`, all of them below one prefix."""

    tensors: Mapping[str, Array]
    prefix: str = ""

    def __getitem__(self, name: str) -> Array:
        return self.tensors[self.prefix + name]

    def below(self, name: str) -> Weights:
        """The weights of one part."""
        return Weights(self.tensors, f"{self.prefix}{name}.")

    def linear(self, name: str, x: Array) -> Array:
        """A part that is a linear layer with a bias, weight stored (out, in)."""
        result: Array = x @ self[f"{name}.weight"].T + self[f"{name}.bias"]
        return result

    def layer_norm(self, name: str, x: Array, eps: float) -> Array:
        """A part that is a layer norm with weight and bias."""
        result: Array = standardise(x, eps) * self[f"{name}.weight"] + self[f"{name}.bias"]
        return result


def columns(z: Array, widths: list[int]) -> list[Array]:
    """z [n, sum of widths] cut into its parts, left to right."""
    parts, first = [], 0
    for width in widths:
        parts.append(z[:, first : first + width])
        first += width
    return parts


def head_columns(x: Array, head: int, width: int) -> Array:
    """Columns of one head, heads lying side by side."""
    return x[:, head * width : (head + 1) * width]
