"""The one protocol behind which a real device and a simulated one look alike."""

from __future__ import annotations

from typing import Protocol

from model_executor.step import ModelOutput, SchedulerOutput


class Executor(Protocol):
    """Carries out steps, one at a time."""

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        """Carries out one step.

        Raises:
            RowsUnavailableError: the host tier could not deliver rows. No request of the step
                got a result, none of its rows may be counted as resident and its refill has not
                begun; its moves were made.
        """
        ...
