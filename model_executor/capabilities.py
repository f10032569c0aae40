"""What may be cached, chunked and split without changing a score, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model_executor.model_config import ModelConfig, NvidiaConfig, ResearchConfig, StuConfig


@dataclass(frozen=True, slots=True)
class Capability:
    """A value and the reason for it."""

    value: bool | int
    reason: str


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Computed for a model, not for a dialect; the scheduler obeys all three."""

    cross_request_reuse: Capability
    """K and V of a history's prefix may serve a later request with a longer history."""
    chunkable: Capability
    """A context may be prefilled over several steps; where it may not, a prefix of it has no K
    and V of its own and nothing is kept for reuse."""
    microbatch_unit: Capability
    """Candidates may be split at multiples of this."""

    def describe(self) -> dict[str, dict[str, Any]]:
        """For `/v1/models` and the log."""
        return {
            name: {"value": capability.value, "reason": capability.reason}
            for name in self.__slots__
            for capability in [getattr(self, name)]
        }


@dataclass(frozen=True, slots=True)
class StepRules:
    """What the scheduler obeys when it cuts a request into steps."""

    chunkable: bool = True
    """A context may come in several chunks."""
    microbatch_unit: int = 1
    """Candidates are split at multiples of this."""
    recomputes_last_row: bool = True
    """The context's last row is what candidates are scored with: each step that scores computes
    it, and it is never taken from the cache."""

    shortest_context: int = 1
    """Tokens of a context with one event, where it must come in one chunk."""

    @property
    def min_tokens(self) -> int:
        """Tokens that a step must have room for."""
        return max(self.microbatch_unit + self.recomputes_last_row, self.shortest_context)


def step_rules(config: ModelConfig, capabilities: Capabilities) -> StepRules:
    """The rules of a model."""
    return StepRules(
        chunkable=bool(capabilities.chunkable.value),
        microbatch_unit=capabilities.microbatch_unit.value,
        recomputes_last_row=not config.candidates_in_sequence,
        shortest_context=(
            1
            if capabilities.chunkable.value
            else config.num_contextual_tokens + config.tokens_per_event
        ),
    )


def capabilities_of(config: ModelConfig) -> Capabilities:
    """Capabilities of a model."""
    return Capabilities(_reuse(config), _chunks(config), _micro_batches(config))


def _has_open_rows(config: ModelConfig) -> bool:
    """Whether there are contextual rows that read the whole history."""
    opens = isinstance(config, NvidiaConfig) or (
        isinstance(config, StuConfig) and config.contextual_rows_see_history
    )
    return opens and config.num_contextual_tokens > 0


def _context_reads_ahead(config: ModelConfig) -> bool:
    """Whether contextual rows that read the whole history reach its rows' K and V.

    K and V of the first layer are projections of the inputs. Those of the second layer's
    contextual rows hold the whole history, and every later row reads them.
    """
    return _has_open_rows(config) and config.num_layers > 1


_ONE_LAYER = (
    "contextual rows read the whole history, but with one layer no K and V are made of what they "
    "read: K and V of a row are projections of its own inputs"
)


_READS_AHEAD = (
    "contextual rows read the whole history, and from the second layer on all rows read them: "
    "K and V of every row depend on the newest event"
)


def _reuse(config: ModelConfig) -> Capability:
    if _context_reads_ahead(config):
        return Capability(False, _READS_AHEAD)
    if isinstance(config, StuConfig):
        return Capability(
            False,
            "positions count from the newest event and times from the request, so the inputs of "
            "all rows change when the history grows; within a request, and for the same history "
            "at the same request time, K and V are reused",
        )
    if isinstance(config, ResearchConfig):
        return Capability(
            True,
            "positions count from the oldest event read and n is the constant "
            f"{config.normaliser}: all rows but the last depend on earlier events and on the "
            "next event's time alone, which the block hashes cover",
        )
    if _has_open_rows(config):
        return Capability(True, _ONE_LAYER)
    return Capability(
        True,
        "positions count from the oldest event read and attention is causal with no factor that "
        "follows the batch: a row depends on the tokens before it alone, which the block hashes "
        "cover",
    )


def _chunks(config: ModelConfig) -> Capability:
    if _context_reads_ahead(config):
        return Capability(False, _READS_AHEAD)
    if _has_open_rows(config):
        return Capability(True, _ONE_LAYER)
    return Capability(True, "attention is causal, so no row's K and V depend on a later one")


def _micro_batches(config: ModelConfig) -> Capability:
    if not config.candidates_in_sequence:
        return Capability(
            1, "a candidate is scored by an inner product that involves no other candidate"
        )
    unit = config.candidate_group_size
    if unit == 1:
        return Capability(1, "a candidate reads the context and itself, no other candidate")
    return Capability(unit, f"a candidate reads the ones before it in its group of {unit}")
