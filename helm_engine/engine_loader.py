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
from helm_engine.protocol import parse_request
from helm_engine.sample_request import sample_request
from helm_engine.scheduler import build_scheduler
from model_executor.attention.registry import attention_backend
from model_executor.capabilities import Capabilities, StepRules, capabilities_of, step_rules
from model_executor.checkpoint import load_config, load_dense_weights, map_tables, model_version
from model_executor.host_store import HostStore, MemoryMappedTables
from model_executor.memory_ledger import activation_bound
from model_executor.model_config import ModelConfig
from model_executor.model_runner import ModelRunner

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
        table: host tier of the pooled tables; the directory's memory-mapped file by default.

    Raises:
        ModelDirectoryError: the directory cannot be served.
        HelmError: the first step failed.
        PoolTooSmallError: the pool cannot hold what one request may need.
        ValueError: the device or the attention backend is not available.
    """
    model_config = load_config(config.model_dir)
    device = _device(config.executor.device)
    dtype = compute_dtype(config.executor.dtype)
    model = load_dense_weights(config.model_dir, model_config, device).to(dtype)
    table = table or MemoryMappedTables(map_tables(config.model_dir, model_config))
    if table.num_rows != model_config.num_rows:
        raise ValueError(
            f"table: has {table.num_rows} rows, the model needs {model_config.num_rows}"
        )
    capabilities = capabilities_of(model_config)
    rules = step_rules(model_config, capabilities)
    layout = plan_layout(
        config.pool,
        kv_bytes_per_token=model_config.kv_elements_per_token * dtype.itemsize,
        row_bytes=model_config.row_dim * dtype.itemsize,
        max_context_tokens=model_config.max_context_tokens,
        staging_rows=config.scheduler.max_num_batched_tokens,
    )
    runner = ModelRunner(
        model,
        table,
        layout,
        attention_backend(config.executor.attention_backend, device),
        device,
        config.executor.max_retrieval_matrix_bytes,
    )
    bound = activation_bound(
        model_config,
        config.scheduler.max_num_batched_tokens,
        config.scheduler.max_num_seqs,
        retrieves=runner.retrieval_head is not None,
        element_bytes=dtype.itemsize,
    )
    _log_memory(runner, layout, bound)
    _log_capabilities(capabilities, model_config, config)
    processor = InputProcessor(
        model=model_config,
        capabilities=capabilities,
        model_name=config.model_name,
        model_version=model_version(config.model_dir),
        limits=config.limits,
        block_tokens=layout.block_tokens,
        max_step_tokens=config.scheduler.max_num_batched_tokens,
        can_retrieve=runner.retrieval_head is not None,
    )
    _warm_up(config, processor, layout, runner, rules)
    poisons = config.poison_freed_memory
    if poisons:
        runner.arena.poison()
    scheduler = build_scheduler(config.scheduler, layout, table.num_rows, rules, poisons)
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
    rules: StepRules,
) -> None:
    """Runs a long history of each kind, so that the first client finds all initialised.

    Its books are thrown away: nothing of it is resident or counted afterwards.
    """
    clock = SystemClock()
    model = runner.model.config
    core = EngineCore(
        build_scheduler(config.scheduler, layout, model.num_rows, rules), runner, clock
    )
    step_events = max(1, config.scheduler.max_num_batched_tokens // model.tokens_per_event)
    number = min(model.max_sequence_len, step_events, config.limits.max_history_events)
    if not rules.chunkable:
        number = max(1, number - model.num_contextual_tokens)
    items, times = [model.first_item_id] * number, list(range(number))
    kinds = [items[:1], None] if runner.retrieval_head is not None else [items[:1]]
    bodies = [parse_request(sample_request(model, items, times, kind)) for kind in kinds]
    for place, body in enumerate(bodies):
        request = processor.process(body, f"warm-up-{place}", clock.now()).request
        core.add_request(request)
        core.run_until_idle()
        if request.error is not None:
            raise request.error


def compute_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name that `ExecutorConfig` accepts."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


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


def _log_capabilities(capabilities: Capabilities, model: ModelConfig, config: EngineConfig) -> None:
    for name, capability in capabilities.describe().items():
        logger.info("%s: %s, because %s", name, capability["value"], capability["reason"])
    limit, longest = config.scheduler.max_num_batched_tokens, model.max_context_tokens
    if not capabilities.chunkable.value and limit < longest:
        logger.warning(
            "contexts are computed in one step: those of more than %d tokens are refused, the "
            "model reads up to %d (max_num_batched_tokens)",
            limit,
            longest,
        )


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
