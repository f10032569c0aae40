"""`config.json` of a model directory: every value validated, unknown keys refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_executor.exceptions import ModelDirectoryError

SUPPORTED_DIALECTS = ("research",)

Dimension = Annotated[int, Field(ge=1, le=65_536)]
Epsilon = Annotated[float, Field(gt=0.0, le=1e-2)]


class ModelConfig(BaseModel):
    """One HSTU model of the `research` dialect.

    The dialect names the function, because "HSTU" is several incompatible ones; this one follows
    meta-recsys/generative-recommenders, `research/modeling/sequential/hstu.py`.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    model_type: Literal["hstu"]
    dialect: Literal["research"]
    dtype: Literal["float32"]
    num_items: Annotated[int, Field(ge=1, le=2**31 - 2)]
    """Item ids are 1..num_items; row 0 of the item table is padding."""
    embedding_dim: Dimension
    num_layers: Annotated[int, Field(ge=1, le=256)]
    num_heads: Annotated[int, Field(ge=1, le=256)]
    dqk: Dimension
    """Width of a query and of a key, per head."""
    dv: Dimension
    """Width of a value, per head."""
    max_sequence_len: Annotated[int, Field(ge=1, le=1_048_576)]
    """Events of a history the model reads; longer ones are cut to the newest."""
    max_output_len: Annotated[int, Field(ge=0, le=65_536)]
    """Positions beyond `max_sequence_len` that the tables hold (11 in the published configs)."""
    num_time_buckets: Annotated[int, Field(ge=1, le=1_024)]
    """Largest time bucket; the time table has one entry more."""
    layer_norm_eps: Epsilon
    l2_norm_eps: Epsilon

    @property
    def num_positions(self) -> int:
        """Rows of the position table, and the constant n that divides attention weights."""
        return self.max_sequence_len + self.max_output_len

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers that K and V of one token take over all layers."""
        return self.num_layers * self.num_heads * (self.dqk + self.dv)


def parse_model_config(raw: dict[str, Any], source: str) -> ModelConfig:
    """Validates the parsed `config.json`.

    Raises:
        ModelDirectoryError: names the file, the field and what it must be.
    """
    dialect = raw.get("dialect")
    if isinstance(dialect, str) and dialect not in SUPPORTED_DIALECTS:
        supported = ", ".join(SUPPORTED_DIALECTS)
        raise ModelDirectoryError(
            f"{source}: dialect: {dialect!r} is not supported (supported: {supported})"
        )
    try:
        return ModelConfig.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'config'}: {item['msg']}"
            for item in error.errors(include_url=False)
        )
        raise ModelDirectoryError(f"{source}: {problems}") from error


def read_model_config(path: Path) -> ModelConfig:
    """Reads and validates a `config.json` file.

    Raises:
        ModelDirectoryError: if it is absent, not a JSON object, or has a bad value.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelDirectoryError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelDirectoryError(f"{path}: is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelDirectoryError(f"{path}: must hold a JSON object")
    return parse_model_config(raw, str(path))
