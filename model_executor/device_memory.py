"""What stays on the device between steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes that stay on the device between steps."""

    weights: int
    """Dense weights and, where there is a retrieval head, its item matrix."""
    pages: int
    staging: int
    """Rows of a step that were not admitted, and rows on their way from the host."""
    graphs: int = 0
    """Captured graphs: their inputs, and what they compute in."""

    @property
    def total(self) -> int:
        """All of it: nothing else may stay."""
        return self.weights + self.pages + self.staging + self.graphs
