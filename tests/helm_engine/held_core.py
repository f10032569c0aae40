"""An engine core whose steps wait while a file is there, so that tests can act in between."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from helm_engine.clock import SystemClock
from helm_engine.config import EngineConfig
from helm_engine.core_process import run_core_process
from helm_engine.engine_client import EngineClient
from helm_engine.engine_loader import LoadedEngine, load_engine
from model_executor.step import ModelOutput, SchedulerOutput


class Hold:
    """Two files beside a model directory: steps wait, and a step has begun."""

    def __init__(self, model_dir: Path) -> None:
        self._held = model_dir.with_suffix(".hold")
        self._begun = model_dir.with_suffix(".begun")

    def hold(self) -> None:
        self._begun.unlink(missing_ok=True)
        self._held.touch()

    def release(self) -> None:
        self._held.unlink(missing_ok=True)

    @property
    def has_begun(self) -> bool:
        return self._begun.exists()

    def pass_step(self) -> None:
        """Called in the core."""
        if self._held.exists():
            self._begun.touch()
        while self._held.exists():
            time.sleep(0.005)


def load_held(config: EngineConfig) -> LoadedEngine:
    """A real engine; its steps pass the gate first, and fail while a third file is there."""
    engine = load_engine(config, SystemClock())
    hold = Hold(config.model_dir)
    execute = engine.runner.execute

    def held(step: SchedulerOutput) -> ModelOutput:
        hold.pass_step()
        if config.model_dir.with_suffix(".break").exists():
            raise RuntimeError("the device is broken")
        return execute(step)

    engine.runner.execute = held  # type: ignore[method-assign]
    return engine


def held_client(config: EngineConfig, hang_seconds: float = 60.0) -> EngineClient:
    """A client of such a core."""
    return EngineClient(config, hang_seconds, partial(run_core_process, load=load_held))
