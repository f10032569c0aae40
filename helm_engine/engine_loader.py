"""From a configuration to an engine that computes: model, pool, scheduler, warm-up."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from block_manager.pool_layout import PoolLayout, plan_layout
from helm_engine.clock import Clock, SystemClock
from helm_engine.config import EngineConfig
from helm_engine.engine_core import EngineCore
from helm_engine.input_processor import InputProcessor
from helm_engine.protocol import Candidates, History, RecommendRequest
from helm_engine.scheduler import build_scheduler
from model_executor.attention.registry import attention_backend
from model_executor.capabilities import Capabilities, capabilities_of
from model_executor.checkpoint import load_config, load_dense_weights, map_item_table, model_version
from model_executor.host_store import HostStore, MemoryMappedTable
from model_executor.memory_ledger import activation_bound
from model_executor.model_config import ModelConfig
from model_executor.model_runner import ModelRunner
from model_executor.page_arena import ELEMENT_BYTES

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine that computes, with what its front needs to know."""

    config: EngineConfig
    model_config: ModelConfig
    capabilities: Capabilities
    layout: PoolLayout
    activation_bound: int
    """Bytes that a step adds to what stays on the device, at most."""
    runner: ModelRunner
    processor: InputProcessor
    core: EngineCore


def load_engine(config: EngineConfig, clock: Clock, table: HostStore | None = None) -> LoadedEngine:
    """Loads a model directory and allocates the pool.

    Args:
        config: the engine's.
        clock: what deadlines and queueing times are measured with.
        table: host tier of the item table; the directory's memory-mapped file by default.

    Raises:
        ModelDirectoryError: the directory cannot be served.
        HelmError: the first step failed.
        PoolTooSmallError: the pool cannot hold what one request may need.
        ValueError: the device or the attention backend is not available.
    """
    model_config = load_config(config.model_dir)
    device = _device(config.executor.device)
    model = load_dense_weights(config.model_dir, model_config, device)
    table = table or MemoryMappedTable(map_item_table(config.model_dir, model_config))
    if table.num_rows <= model_config.num_items:
        raise ValueError(
            f"table: has {table.num_rows} rows, the model needs {model_config.num_items + 1}"
        )
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
    capabilities = capabilities_of(model_config)
    for name, capability in capabilities.describe().items():
        logger.info("%s: %s, because %s", name, capability["value"], capability["reason"])
    bound = activation_bound(
        model_config,
        config.scheduler.max_num_batched_tokens,
        config.scheduler.max_num_seqs,
        retrieves=runner.retrieval_head is not None,
    )
    _log_memory(runner, layout, bound)
    processor = InputProcessor(
        model=model_config,
        model_name=config.model_name,
        model_version=model_version(config.model_dir),
        limits=config.limits,
        block_tokens=layout.block_tokens,
        can_retrieve=runner.retrieval_head is not None,
    )
    _warm_up(config, processor, layout, runner, table.num_rows)
    if config.poison_freed_memory:
        runner.arena.poison()
    scheduler = build_scheduler(
        config.scheduler, layout, table.num_rows, track_dead=config.poison_freed_memory
    )
    return LoadedEngine(
        config=config,
        model_config=model_config,
        capabilities=capabilities,
        layout=layout,
        activation_bound=bound,
        runner=runner,
        processor=processor,
        core=EngineCore(scheduler, runner, clock),
    )


def _warm_up(
    config: EngineConfig,
    processor: InputProcessor,
    layout: PoolLayout,
    runner: ModelRunner,
    num_table_rows: int,
) -> None:
    """Runs a long history of each kind, so that the first client finds all initialised.

    Its books are thrown away: nothing of it is resident or counted afterwards.
    """
    clock = SystemClock()
    core = EngineCore(build_scheduler(config.scheduler, layout, num_table_rows), runner, clock)
    longest = min(runner.model.config.max_sequence_len, config.scheduler.max_num_batched_tokens)
    times = list(range(min(longest, config.limits.max_history_events)))
    history = History(item_ids=[1] * len(times), timestamps=times)
    bodies = [RecommendRequest(history=history, candidates=Candidates(item_ids=[1]))]
    if runner.retrieval_head is not None:
        bodies.append(RecommendRequest(history=history, top_k=1))
    for number, body in enumerate(bodies):
        request = processor.process(body, f"warm-up-{number}", clock.now()).request
        core.add_request(request)
        core.run_until_idle()
        if request.error is not None:
            raise request.error


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


def _log_memory(runner: ModelRunner, layout: PoolLayout, bound: int) -> None:
    memory = runner.memory
    logger.info(
        "device memory: %d bytes of weights, %d pages of %d bytes (KV %d, EMB %d), "
        "%d bytes of staging; a step adds at most %d bytes of activations; "
        "a row page holds %d rows and leaves %d bytes unused",
        memory.weights,
        layout.num_pages,
        layout.page_bytes,
        layout.num_kv_pages,
        layout.num_emb_pages,
        memory.staging,
        bound,
        layout.rows_per_page,
        layout.page_tail_bytes,
    )
