"""From a configuration to an engine that computes: model, pool, scheduler, warm-up."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial

import torch

from block_manager.page_value import PageValueEstimator
from block_manager.pool_layout import PoolLayout, plan_layout, smallest_pool
from helm_engine.clock import Clock, SystemClock
from helm_engine.config import EngineConfig
from helm_engine.controller.engine_control import build_control
from helm_engine.engine_core import EngineCore
from helm_engine.input_processor import InputProcessor, new_user_key
from helm_engine.page_values import page_value_estimator
from helm_engine.pool_sizing import device_budget, size_pool
from helm_engine.protocol import parse_request
from helm_engine.residency_publisher import ResidencyPublisher
from helm_engine.sample_request import sample_request
from helm_engine.scheduler import Scheduler, build_scheduler
from helm_engine.served_model import ServedModel
from model_executor.attention.backend import AttentionBackend, AttentionShape
from model_executor.attention.registry import attention_backend
from model_executor.capabilities import StepRules, capabilities_of, step_rules
from model_executor.checkpoint import (
    load_config,
    load_dense_weights,
    map_tables,
    model_version,
    tables_version,
)
from model_executor.cost_profile import CostProfile, load_cost_profile
from model_executor.devices import select_device
from model_executor.exceptions import RowsUnavailableError, TablesMismatchError
from model_executor.host_store import HOST_NUMBER_BYTES, HostStore, MemoryMappedTables
from model_executor.memory_ledger import activation_bound
from model_executor.memory_meter import CudaMemoryMeter, memory_errors_told
from model_executor.model_config import ModelConfig
from model_executor.model_runner import ModelRunner
from model_executor.models.sequence_model import SequenceModel
from model_executor.scaled_rows import ScaledRows, scaled_row_bytes
from model_executor.step_graphs import CudaGraphCapture

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine that computes, with what its front needs to know."""

    served: ServedModel
    runner: ModelRunner
    processor: InputProcessor
    """For requests that are made in this process."""
    core: EngineCore
    residency: ResidencyPublisher | None
    """Tells routers what the engine holds; None = nobody listens."""

    def close(self) -> None:
        """Ends the threads; nothing may be asked after it."""
        if self.residency is not None:
            self.residency.close()
        self.runner.close()


def load_engine(config: EngineConfig, clock: Clock, table: HostStore | None = None) -> LoadedEngine:
    """Loads a model directory and allocates the pool.

    Args:
        config: the engine's.
        clock: what deadlines and queueing times are measured with.
        table: host tier of the pooled tables; what the configuration names by default.

    Raises:
        ModelDirectoryError: the directory cannot be served.
        HelmError: the first step failed.
        PoolTooSmallError: the pool cannot hold what one request may need.
        DeviceMemoryError: the device has no room; the message gives the bytes and what to lower.
        ValueError: a setting names what is not there or cannot be used: the device, the attention
            backend, the host tier, the cost profile, the controller, an address for events.
    """
    model_config = load_config(config.model_dir)
    device = select_device(
        config.executor.device, config.executor.place, config.executor.num_engines
    )
    budget = device_budget(config.executor, device)
    config = replace(config, executor=replace(config.executor, device=str(device)))
    dtype = compute_dtype(config.executor.dtype)
    rules = step_rules(model_config, capabilities_of(model_config))
    sizes = {
        "kv_bytes_per_token": model_config.kv_elements_per_token * config.executor.kv_number_bytes,
        "row_bytes": model_config.row_dim * dtype.itemsize
        if config.executor.row_dtype == "auto"
        else scaled_row_bytes(model_config.row_dim),
        "max_context_tokens": model_config.max_context_tokens,
        "staging_rows": config.scheduler.max_num_batched_tokens,
    }
    layout = plan_layout(
        config.pool if budget is None else smallest_pool(config.pool, **sizes), **sizes
    )
    runner = _build_runner(config, model_config, layout, dtype, device, table)
    served = _served_model(config, model_config, runner, layout, dtype)
    if budget is not None:
        # What graphs take is known only when they are there; they go with the pool.
        _capture_graphs(config, runner, device)
        plan = partial(plan_layout, **sizes)
        served = size_pool(served, runner, rules, budget, CudaMemoryMeter(device), plan)
    _capture_graphs(config, runner, device)
    served = replace(served, memory=runner.memory)
    _log_memory(served)
    _log_capabilities(served)
    processor = served.input_processor(new_user_key())
    _warm_up(served, processor, runner, rules)
    runner.loader.forget_traffic()
    if config.poison_freed_memory:
        runner.arena.poison()
    scheduler = build_scheduler(
        config.scheduler,
        served.layout,
        model_config.num_rows,
        rules,
        config.poison_freed_memory,
        _page_values(served.cost_profile, served.layout, model_config.num_rows),
        config.host_tier.refill,
        HOST_NUMBER_BYTES * model_config.row_dim,
    )
    control = build_control(config.controller, scheduler, clock.now())
    residency = _tell_residency(config, scheduler)
    core = EngineCore(scheduler, runner, clock, control, residency)
    return LoadedEngine(_with_addresses(served, residency), runner, processor, core, residency)


def _capture_graphs(config: EngineConfig, runner: ModelRunner, device: torch.device) -> None:
    if device.type != "cuda" or config.executor.enforce_eager:
        return
    with memory_errors_told(device, "CUDA graphs", "use enforce_eager"):
        runner.capture_graphs(CudaGraphCapture(device), config.scheduler.max_num_batched_tokens)


def _build_runner(
    config: EngineConfig,
    model_config: ModelConfig,
    layout: PoolLayout,
    dtype: torch.dtype,
    device: torch.device,
    table: HostStore | None,
) -> ModelRunner:
    """Loads the weights, opens the host tier and allocates a pool."""
    with memory_errors_told(
        device, "the weights", "lower max_retrieval_matrix_bytes, or use dtype bfloat16"
    ):
        model = load_dense_weights(config.model_dir, model_config, device).to(dtype)
        attention = _attention(config, model, layout, dtype, device)
        table = table or _open_host_tier(config, model_config)
        if table.num_rows != model_config.num_rows:
            raise ValueError(
                f"table: has {table.num_rows} rows, the model needs {model_config.num_rows}"
            )
        executor = config.executor
        return ModelRunner(
            model,
            table,
            layout,
            attention,
            device,
            executor.max_retrieval_matrix_bytes,
            None
            if executor.row_dtype == "auto"
            else ScaledRows(executor.row_dtype, model_config.row_dim, dtype),
            fp8_kv=executor.kv_cache_dtype == "fp8",
        )


def _served_model(
    config: EngineConfig,
    model_config: ModelConfig,
    runner: ModelRunner,
    layout: PoolLayout,
    dtype: torch.dtype,
) -> ServedModel:
    """What fronts are told."""
    retrieves = runner.retrieval_head is not None
    bound = activation_bound(
        model_config,
        config.scheduler.max_num_batched_tokens,
        config.scheduler.max_num_seqs,
        retrieves=retrieves,
        element_bytes=dtype.itemsize,
    )
    return ServedModel(
        config=config,
        model_config=model_config,
        version=model_version(config.model_dir),
        capabilities=capabilities_of(model_config),
        layout=layout,
        memory=runner.memory,
        activation_bound=bound,
        can_retrieve=retrieves,
        cost_profile=load_cost_profile(config.cost_profile) if config.cost_profile else None,
    )


def _attention(
    config: EngineConfig,
    model: SequenceModel,
    layout: PoolLayout,
    dtype: torch.dtype,
    device: torch.device,
) -> AttentionBackend:
    """The backend that the configuration names, if it can serve the model."""
    shape = AttentionShape(
        rule=model.rule,
        num_heads=model.config.num_heads,
        dqk=model.config.dqk,
        dv=model.config.dv,
        dtype=dtype,
        candidates_in_sequence=model.config.candidates_in_sequence,
        block_tokens=layout.block_tokens,
        page_bytes=layout.page_bytes,
        fp8_kv=config.executor.kv_cache_dtype == "fp8",
    )
    return attention_backend(config.executor.attention_backend, device, shape)


def _tell_residency(config: EngineConfig, scheduler: Scheduler) -> ResidencyPublisher | None:
    """What tells routers what the engine holds, where they have an address to listen at."""
    if config.residency.endpoint is None:
        return None
    return ResidencyPublisher(config.residency, config.model_name, scheduler.kv, scheduler.emb)


def _with_addresses(served: ServedModel, residency: ResidencyPublisher | None) -> ServedModel:
    """With the addresses of events as they were bound."""
    if residency is None:
        return served
    return replace(served, config=replace(served.config, residency=residency.config))


def _open_host_tier(config: EngineConfig, model_config: ModelConfig) -> HostStore:
    address = config.host_tier.redis_address
    if address is None:
        return MemoryMappedTables(map_tables(config.model_dir, model_config))
    try:
        from model_executor.redis_layout import tables_of
        from model_executor.redis_store import RedisTables
    except ModuleNotFoundError as error:
        raise ValueError("host_tier: needs redis-py: pip install 'helm-engine[redis]'") from error
    tables = tables_of(model_config, tables_version(config.model_dir))
    try:
        return RedisTables(address, tables, config.host_tier.timeout)
    except (RowsUnavailableError, TablesMismatchError) as error:
        raise ValueError(f"host_tier: {error}") from error


def _page_values(
    cost_profile: CostProfile | None, layout: PoolLayout, num_rows: int
) -> PageValueEstimator | None:
    """What watches the worth of pages, where the device's costs are known."""
    if cost_profile is None:
        return None
    return page_value_estimator(cost_profile, layout, num_rows)


def _warm_up(
    served: ServedModel, processor: InputProcessor, runner: ModelRunner, rules: StepRules
) -> None:
    """Runs a long history of each kind, so that the first client finds all initialised.

    Its books are thrown away: nothing of it is resident or counted afterwards.
    """
    clock = SystemClock()
    config, model = served.config, served.model_config
    scheduler = build_scheduler(config.scheduler, served.layout, model.num_rows, rules)
    core = EngineCore(scheduler, runner, clock)
    step_events = max(1, config.scheduler.max_num_batched_tokens // model.tokens_per_event)
    number = min(model.max_sequence_len, step_events, config.limits.max_history_events)
    if not rules.chunkable:
        number = max(1, number - model.num_contextual_tokens)
    items, times = [model.first_item_id] * number, list(range(number))
    kinds = [items[:1], None] if served.can_retrieve else [items[:1]]
    for place, kind in enumerate(kinds):
        body = parse_request(sample_request(model, items, times, kind))
        request = processor.process(body, f"warm-up-{place}", clock.now()).request
        core.add_request(request)
        core.run_until_idle()
        if request.error is not None:
            raise request.error


def compute_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name that `ExecutorConfig` accepts."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _log_capabilities(served: ServedModel) -> None:
    for name, capability in served.capabilities.describe().items():
        logger.info("%s: %s, because %s", name, capability["value"], capability["reason"])
    limit = served.config.scheduler.max_num_batched_tokens
    longest = served.model_config.max_context_tokens
    if not served.capabilities.chunkable.value and limit < longest:
        logger.warning(
            "contexts are computed in one step: those of more than %d tokens are refused, the "
            "model reads up to %d (max_num_batched_tokens)",
            limit,
            longest,
        )


def _log_memory(served: ServedModel) -> None:
    layout = served.layout
    logger.info(
        "device memory: %d bytes of weights, %d pages of %d bytes (KV %d, EMB %d), "
        "%d bytes of staging, %d of graphs; a step adds at most %d bytes of activations%s; "
        "a row page holds %d rows and leaves %d bytes unused",
        served.memory.weights,
        layout.num_pages,
        layout.page_bytes,
        layout.num_kv_pages,
        layout.num_emb_pages,
        served.memory.staging,
        served.memory.graphs,
        served.activation_bound,
        "" if served.workspace is None else f" ({served.workspace} were measured)",
        layout.rows_per_page,
        layout.page_tail_bytes,
    )
