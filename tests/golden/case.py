"""Reads a golden case: header, tensors, and the model they describe."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from model_executor.model_config import SUPPORTED_DIALECTS, ModelConfig, parse_model_config
from model_executor.models.hstu import HSTU

ITEM_TABLE = "_embedding_module._item_emb.weight"
POSITION_TABLE = "_input_features_preproc._pos_emb.weight"

_LAYER_NAMES = {
    "_uvqk": "uvqk",
    "_o.weight": "output.weight",
    "_o.bias": "output.bias",
    "_rel_attn_bias._pos_w": "bias.position_weight",
    "_rel_attn_bias._ts_w": "bias.time_weight",
}
_STACKED_LAYER = re.compile(r"(?:_hstu\.)?_attention_layers\.(\d+)\.(.+)")


class CaseError(ValueError):
    """The file is no golden case that can be run."""


@dataclass(frozen=True, slots=True)
class GoldenCase:
    """One `.safetensors` file."""

    path: Path
    header: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def outputs(self) -> list[str]:
        """Names of the tensors to reproduce."""
        return list(self.header["outputs"])

    @property
    def tolerance(self) -> tuple[float, float]:
        """Absolute and relative tolerance."""
        tolerance = self.header["tolerance"]
        return float(tolerance["atol"]), float(tolerance["rtol"])

    def model_config(self) -> ModelConfig:
        """The case's model; all of its N positions may be history, so that nothing is cut."""
        header = self.header
        table = self.tensors.get(ITEM_TABLE)
        layer_weights = self._layer_weights()
        position_weight = layer_weights["layers.0.bias.position_weight"]
        return parse_model_config(
            {
                "model_type": "hstu",
                "dialect": header["dialect"],
                "dtype": "float32",
                "num_items": 1 if table is None else len(table) - 1,
                "embedding_dim": header["embedding_dim"],
                "num_layers": header["num_layers"],
                "num_heads": header["num_heads"],
                "dqk": header["dqk"],
                "dv": header["dv"],
                "max_sequence_len": (len(position_weight) + 1) // 2,
                "max_output_len": 0,
                "num_time_buckets": len(layer_weights["layers.0.bias.time_weight"]) - 1,
                "layer_norm_eps": header["layer_norm_eps"],
                "l2_norm_eps": 1e-6,
            },
            str(self.path),
        )

    def load_dense_weights(self, model: HSTU) -> None:
        """Fills a model with the case's weights, and sets the n that the reference used."""
        state = model.state_dict()
        state.update(self._layer_weights())
        positions = self.tensors.get(POSITION_TABLE)
        # Cases of float rows enter after the embedding and have no positions.
        state["position_embedding"] = (
            state["position_embedding"].zero_() if positions is None else positions
        )
        model.load_state_dict(state)
        model.normaliser = self.header["normaliser_n"]
        model.requires_grad_(False).eval()

    def _layer_weights(self) -> dict[str, Tensor]:
        """The reference's layer weights under our names."""
        weights = {}
        for name, tensor in self.tensors.items():
            stacked = _STACKED_LAYER.fullmatch(name)
            index, part = (stacked[1], stacked[2]) if stacked else ("0", name)
            if part in _LAYER_NAMES:
                weights[f"layers.{index}.{_LAYER_NAMES[part]}"] = tensor
        for layer in range(self.header["num_layers"]):
            for theirs, ours in _LAYER_NAMES.items():
                if f"layers.{layer}.{ours}" not in weights:
                    raise CaseError(f"{self.path}: {theirs!r} of layer {layer} is missing")
        return weights


def read_case(path: Path) -> GoldenCase:
    """Reads a case.

    Raises:
        CaseError: the file cannot be read, is no golden case, or its dialect is not supported.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = json.loads((file.metadata() or {})["golden"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CaseError(f"{path}: cannot be read: {error}") from error
    except (KeyError, ValueError) as error:
        raise CaseError(f"{path}: has no golden header") from error
    if not isinstance(header, dict):
        raise CaseError(f"{path}: has no golden header")
    dialect = header.get("dialect")
    if dialect not in SUPPORTED_DIALECTS:
        supported = ", ".join(SUPPORTED_DIALECTS)
        raise CaseError(f"{path}: dialect {dialect!r} is not supported (supported: {supported})")
    return GoldenCase(path, header, tensors)
