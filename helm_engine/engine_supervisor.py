"""Keeps an engine running: restarts one that died or hung, and replaces it on a reload."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from helm_engine.config import EngineConfig
from helm_engine.engine_client import EngineClient
from helm_engine.exceptions import ControllerActiveError, EngineUnavailableError, ReloadError
from helm_engine.fleet_member import CoreClient, Engine
from helm_engine.input_processor import new_user_key
from helm_engine.served_model import ServedModel

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
"""An engine that cannot be restarted is tried again after a pause that doubles up to this."""


_STOPPED = "the engine has stopped"


class EngineSupervisor:
    """Owns the engine that answers, the one that warms up, and those that finish their last."""

    def __init__(
        self,
        config: EngineConfig,
        start: Callable[[EngineConfig], EngineClient],
        start_seconds: float = 600.0,
        name: str = "0",
        user_key: bytes | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            config: of the first engine.
            start: starts an engine's process.
            start_seconds: an engine that is not ready after so long is given up.
            name: of this engine among those of a fleet.
            user_key: keys the hashes of users; a random one by default.
        """
        self.name = name
        self.config = config
        self.num_restarts = 0
        """Engines that died or hung and were started anew."""
        self.num_reloads = 0
        self._start = start
        self._start_seconds = start_seconds
        # One key for all engines: a user's tag must not change with a restart.
        self._user_key = user_key or new_user_key()
        self._engine: Engine | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._launching: set[EngineClient] = set()
        self._is_closed = False
        self._reloading = asyncio.Lock()
        self._retiring: dict[asyncio.Task[None], CoreClient] = {}
        self._why_none = "the engine is starting"

    @property
    def model_name(self) -> str:
        """The name under which the model is served."""
        return self.config.model_name

    @property
    def is_ready(self) -> bool:
        """Whether requests can be answered."""
        return self.current is not None

    @property
    def current(self) -> Engine | None:
        """The engine that answers, or None while there is none that lives."""
        engine = self._engine
        return engine if engine is not None and engine.client.is_alive else None

    @property
    def is_leaving(self) -> bool:
        """Never: this process decides when its engines end."""
        return False

    @property
    def why_none(self) -> str:
        """Why no engine answers."""
        engine = self._engine
        if engine is not None and engine.client.ended.done():
            return engine.client.ended.result()
        return self._why_none

    @property
    def engine(self) -> Engine:
        """The engine that answers.

        Raises:
            EngineUnavailableError: none is ready.
        """
        if self._engine is None:
            raise EngineUnavailableError(self._why_none)
        return self._engine

    @property
    def clients(self) -> list[CoreClient]:
        """All engines that hold users' KV: the one that answers and those that finish."""
        current: list[CoreClient] = [] if self._engine is None else [self._engine.client]
        return current + list(self._retiring.values())

    async def start(self) -> ServedModel:
        """Starts the first engine and keeps one running from then on.

        Raises:
            ValueError: the model or a setting cannot be served; see `load_engine`.
            OSError: likewise.
            HelmError: the first step failed, or the process died.
        """
        self._engine = await self._launch(self.config)
        self._keeper = asyncio.create_task(self._keep())
        return self._engine.served

    async def _launch(self, config: EngineConfig) -> Engine:
        client = self._start(config)
        self._launching.add(client)
        try:
            async with asyncio.timeout(self._start_seconds):
                served = await client.ready()
            if self._is_closed:
                raise EngineUnavailableError(_STOPPED)
        except TimeoutError:
            await client.close()
            raise EngineUnavailableError(
                f"the engine was not ready within {self._start_seconds:g} s (start_timeout)"
            ) from None
        except BaseException:
            await client.close()
            raise
        finally:
            self._launching.discard(client)
        logger.info("engine core ready: process %s, model %s", client.pid, served.name)
        return Engine(client, served, served.input_processor(self._user_key))

    async def _keep(self) -> None:
        """Starts a new engine whenever the one that answers has ended."""
        while True:
            client = self.engine.client
            reason = await asyncio.shield(client.ended)
            logger.error("%s; a new one is started", reason)
            self._engine, self._why_none = None, f"{reason}; it is being restarted"
            self.config = _with_split_of(client, self.config)
            await client.close()
            self._engine = await self._relaunch()
            self.num_restarts += 1

    async def _relaunch(self) -> Engine:
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return await self._launch(self.config)
            except Exception as error:
                # Whatever it is: without this loop there would never be an engine again.
                logger.error("the engine could not be started: %s; again in %g s", error, pause)
                self._why_none = "the engine could not be started; its log says why"
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def reload(self, model_dir: Path | None) -> ServedModel:
        """Warms a model beside the one served, then puts it in its place.

        Requests in flight end on the engine that they began on. Both pools exist meanwhile.

        Args:
            model_dir: None = read the same directory again.

        Raises:
            ReloadError: another reload is under way, or the model cannot be served.
            EngineUnavailableError: no engine is there to be replaced; it is being restarted.
        """
        if self._is_closed:
            raise EngineUnavailableError(_STOPPED)
        if self._reloading.locked():
            raise ReloadError("another reload is under way")
        async with self._reloading:
            config = _with_split_of(self.engine.client, self.config)
            if model_dir is not None:
                config = replace(config, model_dir=model_dir)
            try:
                engine = await self._launch(config)
            except Exception as error:
                if self._is_closed:
                    raise EngineUnavailableError(_STOPPED) from error
                raise ReloadError(f"the model was not replaced: {error}", "model_dir") from error
            # Somebody may have moved the boundary by hand while it warmed up.
            wanted = self.config.pool.emb_fraction
            if config.controller.name is None and wanted != config.pool.emb_fraction:
                await engine.client.set_target(wanted)
            self.config = replace(self.config, model_dir=config.model_dir)
            self.num_reloads += 1
            self._replace(engine)
            return engine.served

    def _replace(self, engine: Engine) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
        before, self._engine = self._engine, engine
        self._keeper = asyncio.create_task(self._keep())
        if before is not None:  # It may have died while the new one warmed up.
            retiring = asyncio.create_task(self._retire(before.client))
            self._retiring[retiring] = before.client
            retiring.add_done_callback(self._retiring.pop)

    async def settled(self) -> None:
        """Waits until engines that were replaced have finished their last and are gone."""
        if self._retiring:
            await asyncio.wait(list(self._retiring))

    async def _retire(self, client: CoreClient) -> None:
        await client.drain()
        status = await client.close()
        if status:
            logger.error("the engine that was replaced ended with status %d", status)

    async def set_target(self, emb_fraction: float) -> float:
        """Asks for another split of the pool, of this engine and of those that may follow it.

        Returns:
            The share that will be reached; floors may forbid the one that was asked for.

        Raises:
            ValueError: not within 0..1.
            ControllerActiveError: a controller decides on the split.
            EngineUnavailableError: no engine is ready.
        """
        if self.config.controller.name is not None:
            raise ControllerActiveError()
        pool = replace(self.config.pool, emb_fraction=emb_fraction)
        share = await self.engine.client.set_target(emb_fraction)
        self.config = replace(self.config, pool=pool)
        return share

    def fail_pending(self, reason: str) -> None:
        """Answers all waiting clients with an error."""
        for client in self.clients:
            client.fail_pending(reason)

    async def close(self) -> bool:
        """Ends all engines; whether each that was ready ended with its books in order."""
        self._is_closed = True
        if self._keeper is not None:
            self._keeper.cancel()
        await asyncio.gather(*(client.close() for client in list(self._launching)))
        clients = self.clients
        for task in self._retiring:
            task.cancel()
        self._engine, self._why_none = None, _STOPPED
        return not any(await asyncio.gather(*(client.close() for client in clients)))


def _with_split_of(client: CoreClient, config: EngineConfig) -> EngineConfig:
    """Where a controller moves the boundary, the next engine begins where this one stood last."""
    share = client.stats.emb_fraction_committed
    if config.controller.name is None or not share:
        return config
    return replace(config, pool=replace(config.pool, emb_fraction=share))
