"""The engine's step loop body: schedule, execute, commit."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from block_manager.block_pool import BlockPool
from block_manager.embedding_cache import EmbeddingCache
from block_manager.kv_cache_manager import KVCacheManager
from block_manager.page_pool import PagePool, Tenant
from block_manager.pool_layout import PoolLayout, plan_layout
from helm_engine.clock import Clock
from helm_engine.config import EngineConfig, SchedulerConfig
from helm_engine.exceptions import HelmError, StepFailedError
from helm_engine.request import Request
from helm_engine.scheduler import Scheduler
from model_executor.attention.registry import attention_backend
from model_executor.capabilities import Capabilities, capabilities_of
from model_executor.checkpoint import load_config, load_dense_weights, map_item_table, model_version
from model_executor.executor import Executor
from model_executor.host_store import HostStore, MemoryMappedTable
from model_executor.model_config import ModelConfig
from model_executor.model_runner import ModelRunner
from model_executor.page_arena import ELEMENT_BYTES

logger = logging.getLogger(__name__)


class EngineCore:
    """Owns one scheduler and one executor; single-threaded."""

    def __init__(self, scheduler: Scheduler, executor: Executor, clock: Clock) -> None:
        self.scheduler = scheduler
        self._executor = executor
        self._clock = clock

    def add_request(self, request: Request) -> None:
        """Queues a request; see `Scheduler.add_request`."""
        self.scheduler.add_request(request)

    def fail_request(self, request_id: str, error: HelmError) -> None:
        """Ends an unfinished request with an error, and frees what it held."""
        self.scheduler.fail(request_id, error)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return self.scheduler.has_work

    def check_integrity(self) -> None:
        """Checks the pool's books; see `Scheduler.check_integrity`."""
        self.scheduler.check_integrity()

    def step(self) -> list[Request]:
        """Runs one step; returns the requests that ended, with results or with an error."""
        step = self.scheduler.schedule(self._clock.now())
        finished: list[Request] = []
        if step is not None:
            try:
                output = self._executor.execute(step)
            except Exception as error:
                # A step may fail for reasons outside the engine (a host tier that is down, a
                # device out of memory): its requests are told, the engine goes on.
                logger.exception("a step of %d requests failed", len(step.requests))
                self.scheduler.fail_step(step, StepFailedError(f"the step failed: {error}"))
            else:
                finished = self.scheduler.update(step, output, self._clock.now())
        return finished + self.scheduler.take_failed()


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine that computes, with what its front needs to know."""

    core: EngineCore
    runner: ModelRunner
    model_config: ModelConfig
    capabilities: Capabilities
    model_version: str
    layout: PoolLayout


def build_scheduler(
    config: SchedulerConfig, layout: PoolLayout, num_table_rows: int, track_dead: bool = False
) -> Scheduler:
    """Builds the pool's books and the scheduler over them."""
    pool = PagePool(layout)
    blocks = BlockPool(pool.pages_of(Tenant.KV), track_dead)
    return Scheduler(
        config,
        pool,
        KVCacheManager(blocks, layout.block_tokens),
        EmbeddingCache(pool.pages_of(Tenant.EMB), layout.rows_per_page, num_table_rows, track_dead),
    )


def load_engine(config: EngineConfig, clock: Clock, table: HostStore | None = None) -> LoadedEngine:
    """Loads a model directory and allocates the pool.

    Args:
        config: the engine's.
        clock: what deadlines and queueing times are measured with.
        table: host tier of the item table; the directory's memory-mapped file by default.

    Raises:
        ModelDirectoryError: the directory cannot be served.
        PoolTooSmallError: the pool cannot hold what one request may need.
        ValueError: the device or the attention backend is not available.
    """
    model_config = load_config(config.model_dir)
    device = _device(config.executor.device)
    model = load_dense_weights(config.model_dir, model_config, device)
    table = table or MemoryMappedTable(map_item_table(config.model_dir, model_config))
    layout = plan_layout(
        config.pool,
        kv_bytes_per_token=model_config.kv_elements_per_token * ELEMENT_BYTES,
        row_bytes=model_config.embedding_dim * ELEMENT_BYTES,
        max_sequence_len=model_config.max_sequence_len,
        staging_rows=config.scheduler.max_num_batched_tokens,
    )
    runner = ModelRunner(
        model,
        table,
        layout,
        attention_backend(config.executor.attention_backend),
        device,
        config.executor.max_retrieval_matrix_bytes,
    )
    scheduler = build_scheduler(
        config.scheduler, layout, table.num_rows, track_dead=config.poison_freed_memory
    )
    capabilities = capabilities_of(model_config)
    for name, capability in capabilities.describe().items():
        logger.info("%s: %s, because %s", name, capability["value"], capability["reason"])
    _log_memory(runner, layout)
    return LoadedEngine(
        core=EngineCore(scheduler, runner, clock),
        runner=runner,
        model_config=model_config,
        capabilities=capabilities,
        model_version=model_version(config.model_dir),
        layout=layout,
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: {name!r} is not a torch device") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: {name!r} is not supported (supported: cpu, cuda, cuda:N)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name!r} is not there ({torch.cuda.device_count()} GPUs found)")
    return device


def _log_memory(runner: ModelRunner, layout: PoolLayout) -> None:
    memory = runner.memory
    logger.info(
        "device memory: %d bytes of weights, %d pages of %d bytes (KV %d, EMB %d), "
        "%d bytes of staging; a row page holds %d rows and leaves %d bytes unused",
        memory.weights,
        layout.num_pages,
        layout.page_bytes,
        layout.num_kv_pages,
        layout.num_emb_pages,
        memory.staging,
        layout.rows_per_page,
        layout.page_tail_bytes,
    )
