"""A refill on its way from the host tier to its slots, while steps run."""

from __future__ import annotations

import logging

import torch

from block_manager.row_plan import RefillPlan
from model_executor.paged_batch import to_device
from model_executor.row_loader import LandedRows, RowLoader
from model_executor.row_pages import RowPages

logger = logging.getLogger(__name__)


class BackgroundRefill:
    """Carries out one refill plan at a time; the step's thread only copies what has landed."""

    def __init__(
        self, loader: RowLoader, rows: RowPages, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Rows come from `loader`, and are written to `rows` as `dtype`."""
        self._loader = loader
        self._rows = rows
        self._device = device
        self._dtype = dtype
        self._plan: RefillPlan | None = None
        self._num_landed = 0
        self._has_failed = False
        self._done: RefillPlan | None = None
        self._failed: RefillPlan | None = None

    def begin(self, plan: RefillPlan) -> None:
        """Begins to read the plan's rows; the refill before has been taken. Raises nothing."""
        try:
            self._loader.start_refill(plan.row_ids)
        except RuntimeError:
            # No thread is to be had, say. The step that planned it has done its work.
            logger.exception("a refill cannot begin")
            self._failed = plan
        else:
            self._plan, self._num_landed, self._has_failed = plan, 0, False

    def write_landed(self) -> None:
        """Copies what has landed since the last call to its slots."""
        for landed in self._loader.take_landed():
            self._write(landed)
        plan = self._plan
        if plan is not None and self._num_landed == len(plan):
            self._plan = None
            if self._has_failed:
                self._failed = plan
            else:
                self._done = plan

    def take_ended(self) -> tuple[RefillPlan | None, RefillPlan | None]:
        """The refill that is complete, and the one that failed, since the last call."""
        ended = self._done, self._failed
        self._done = self._failed = None
        return ended

    def _write(self, landed: LandedRows) -> None:
        assert self._plan is not None
        first, self._num_landed = self._num_landed, self._num_landed + len(landed.row_ids)
        if landed.rows is None:
            # The host tier itself says so aloud.
            logger.debug("rows that were to be refilled are not to be had: %s", landed.error)
            self._has_failed = True
            return
        try:
            slots = to_device(self._plan.slots[first : self._num_landed], self._device)
            landed.rows.land(lambda _, rows: self._rows.write(slots, rows.to(self._dtype)))
        except RuntimeError:
            # What is not written must not be committed; the step that meets this may go on.
            logger.exception("rows of a refill could not be written")
            self._has_failed = True
