"""Ties a controller to one engine: feeds it, sets the boundary's target, and keeps the record."""

from __future__ import annotations

from collections.abc import Sequence

from helm_engine.controller.allocation_controller import AllocationController, Decision
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.controller.decision_log import DecisionLog
from helm_engine.controller.observation_collector import ObservationCollector, WindowConfig
from helm_engine.controller.registry import check_controller, make_controller
from helm_engine.request import Request
from helm_engine.scheduler import Scheduler


class EngineControl:
    """What `EngineCore` calls before and after each step."""

    def __init__(
        self,
        scheduler: Scheduler,
        controller: AllocationController,
        slo_ms: float,
        now: float,
        log: DecisionLog | None = None,
        windows: WindowConfig | None = None,
    ) -> None:
        """Begins to watch an engine.

        Args:
            scheduler: the engine's.
            controller: decides; belongs to this engine alone.
            slo_ms: a request that takes longer violates the service level.
            now: engine clock, seconds.
            log: gets each decision.
            windows: how fast observations fade.
        """
        self.controller = controller
        self._scheduler = scheduler
        self._collector = ObservationCollector(scheduler, slo_ms, now, windows)
        self._log = log or DecisionLog(None)
        self._logged: Decision | None = None
        self._stops_refill = False

    def observe_arrival(self, request: Request) -> None:
        """A request came, whether or not it is let in."""
        self._collector.observe_arrival(request.arrival)

    def observe_ended(self, requests: Sequence[Request], now: float) -> None:
        """Requests have ended, with results or with errors."""
        if requests:
            self._collector.observe_ended(requests, now)

    def act(self, now: float) -> None:
        """Asks the controller and hands its target on; between two steps."""
        controller, boundary = self.controller, self._scheduler.boundary
        target = controller.decide(now, boundary.committed, self._collector.observe)
        if target != boundary.target:
            boundary.set_target(target)
        decision = controller.latest
        if decision is not None and decision is not self._logged:
            self._logged = decision
            if controller.stops_refill is not self._stops_refill:
                self._stops_refill = controller.stops_refill
                self._scheduler.refills.is_suspended = self._stops_refill
            if self._log.is_kept:
                self._log.write(decision)


def build_control(
    config: ControllerConfig, scheduler: Scheduler, now: float
) -> EngineControl | None:
    """What a configuration asks for; None = the split stays where it is put.

    Raises:
        ValueError: the controller is unknown or needs a cost profile, or its log cannot be written.
    """
    if config.name is None:
        return None
    check_controller(config.name, has_costs=scheduler.page_values is not None)
    controller = make_controller(config.name, config)
    log = DecisionLog(config.decision_log)
    return EngineControl(scheduler, controller, config.slo_ms, now, log)
