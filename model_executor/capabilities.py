"""What may be cached, chunked and split without changing a score, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model_executor.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Capability:
    """A value and the reason for it."""

    value: bool | int
    reason: str


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Computed for a model, not for a dialect.

    The scheduler relies on all three: a model that lacks one cannot be served yet.
    """

    cross_request_reuse: Capability
    """K and V of a history's prefix may serve a later request."""
    chunkable: Capability
    """A history may be prefilled over several steps."""
    microbatch_unit: Capability
    """Candidates may be split at multiples of this."""

    def describe(self) -> dict[str, dict[str, Any]]:
        """For `/v1/models` and the log."""
        return {
            name: {"value": capability.value, "reason": capability.reason}
            for name in self.__slots__
            for capability in [getattr(self, name)]
        }


def capabilities_of(config: ModelConfig) -> Capabilities:
    """Capabilities of a `research` model."""
    return Capabilities(
        cross_request_reuse=Capability(
            True,
            "positions count from the oldest event sent and n is the constant "
            f"{config.num_positions}: all rows but the last depend on earlier events and on the "
            "next event's time alone, which the block hashes cover",
        ),
        chunkable=Capability(True, "attention is causal, so no row reads a later one"),
        microbatch_unit=Capability(
            1, "a candidate is scored by an inner product that involves no other candidate"
        ),
    )
