"""Reads a golden case: header and tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from model_executor.model_config import SUPPORTED_DIALECTS

TWIN = "_table_cap"
"""Outputs of this ending follow the reference's Triton kernel; those of the same name without it
follow a PyTorch kernel that caps time buckets by the wrong axis."""


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

    def is_optional(self, output: str) -> bool:
        """Whether another output says what this one should be."""
        return output + TWIN in self.outputs

    @property
    def tolerance(self) -> tuple[float, float]:
        """Absolute and relative tolerance."""
        tolerance = self.header["tolerance"]
        return float(tolerance["atol"]), float(tolerance["rtol"])


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
