"""The flags of every command that runs an engine, each spelled once."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from block_manager.pool_layout import PoolConfig
from helm_engine.config import (
    GPU_MEMORY_UTILIZATION,
    EngineConfig,
    ExecutorConfig,
    HostTierConfig,
    RequestLimits,
    ResidencyConfig,
    SchedulerConfig,
)
from helm_engine.controller.controller_config import ControllerConfig
from helm_engine.entrypoints.command import CommandError
from helm_engine.entrypoints.config_file import ConfigOptions, configuration_toml
from helm_engine.entrypoints.option_groups import KEYWORD, declare, takes_option_groups
from helm_engine.entrypoints.sizes import mebibytes, size_in_bytes
from helm_engine.entrypoints.stderr_log import StderrHandler
from helm_engine.entrypoints.value_source import secret_option, with_place
from helm_engine.entrypoints.waiting import SlowNotice

_POOL = PoolConfig()
_SCHEDULER = SchedulerConfig()
_EXECUTOR = ExecutorConfig()
_LIMITS = RequestLimits()
_HOST_TIER = HostTierConfig()
_CONTROLLER = ControllerConfig()
_RESIDENCY = ResidencyConfig()

ENGINE_CONTEXT = {"auto_envvar_prefix": "HELM"}
"""Settings of an engine's command: `HELM_POOL_BYTES` is the variable of `--pool-bytes`."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the command line says about an engine."""

    served_model_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel="Model and execution",
            help="Name of the model in requests; default: the directory's.",
        ),
    ] = None
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            rich_help_panel="Model and execution",
            help="cpu; cuda, a GPU for each engine; cuda:N, one GPU for all; auto, GPUs if any.",
        ),
    ] = _EXECUTOR.device
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            rich_help_panel="Model and execution",
            help="What is computed and cached in: float32 or bfloat16.",
        ),
    ] = _EXECUTOR.dtype
    row_dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            rich_help_panel="Model and execution",
            help="What rows are kept in: auto (as --dtype), int8 or fp8.",
        ),
    ] = _EXECUTOR.row_dtype
    kv_cache_dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            rich_help_panel="Model and execution",
            help="What K and V are kept in: auto (as --dtype) or fp8.",
        ),
    ] = _EXECUTOR.kv_cache_dtype
    attention_backend: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel="Model and execution",
            help="How attention is computed: auto, cpu, torch or xformers.",
        ),
    ] = _EXECUTOR.attention_backend
    enforce_eager: Annotated[
        bool,
        typer.Option(rich_help_panel="Model and execution", help="Capture no CUDA graphs."),
    ] = _EXECUTOR.enforce_eager
    max_retrieval_matrix_bytes: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            rich_help_panel="Model and execution",
            help="Limit of the item matrix of retrieval; 0 = candidates only.",
        ),
    ] = mebibytes(_EXECUTOR.max_retrieval_matrix_bytes)
    host_tier: Annotated[
        str | None,
        secret_option(
            "Where all rows are: mmap, the directory's own file (default), or a parameter server "
            "that `publish-rows` filled, redis://[user:password@]host:port/db. Whoever lists "
            "processes sees a flag: with a password prefer the variable or a file.",
            metavar="SOURCE",
            rich_help_panel="Host tier",
        ),
    ] = None
    host_tier_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0.001,
            rich_help_panel="Host tier",
            help="Time that a parameter server has to answer; then requests that need its rows "
            "get 503.",
        ),
    ] = _HOST_TIER.timeout
    refill_bytes_per_second: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            rich_help_panel="Host tier",
            help="Most that is read in the background to fill pages that rows got; 0 = nothing.",
        ),
    ] = mebibytes(_HOST_TIER.refill_bytes_per_second)
    host_link_bytes_per_second: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel="Host tier",
            help="What the link to the rows carries: refill takes what requests leave of it; "
            "default: unknown.",
        ),
    ] = None
    pool_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel="Page pool",
            help="Size of the page pool, for instance 8GiB; on a GPU the default is what "
            f"--gpu-memory-utilization leaves, else {mebibytes(_POOL.pool_bytes)}.",
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            rich_help_panel="Page pool",
            help="Share of the GPU's memory to take, in place of --pool-bytes: the pool is what "
            f"weights and the largest step leave of it; default: {GPU_MEMORY_UTILIZATION}.",
        ),
    ] = None
    emb_fraction: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            rich_help_panel="Page pool",
            help="Share of the pool for embedding rows, 0 to 1.",
        ),
    ] = _POOL.emb_fraction
    block_tokens: Annotated[
        int,
        typer.Option(
            metavar="TOKENS", rich_help_panel="Page pool", help="History tokens of one KV block."
        ),
    ] = _POOL.block_tokens
    cost_profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel="Page pool",
            help="Milliseconds of the device; metrics then tell what one page more would save.",
        ),
    ] = None
    controller: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel="Boundary controller",
            help="What moves the boundary: helm, static:X, threshold, hill_climb, marginal, "
            "kv_only, emb_only or ms_per_byte; +residual and +recovery may follow. "
            "Default: nothing.",
        ),
    ] = _CONTROLLER.name
    control_period: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            rich_help_panel="Boundary controller",
            help="Time from one decision to the next, 0.25 to 5.",
        ),
    ] = _CONTROLLER.period_s
    slo_ms: Annotated[
        float,
        typer.Option(
            metavar="MS",
            rich_help_panel="Boundary controller",
            help="Service level: a request that takes longer violates it.",
        ),
    ] = _CONTROLLER.slo_ms
    decision_log: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel="Boundary controller",
            help="Append each decision, with what it was made on, as a line of JSON.",
        ),
    ] = None
    kv_events_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            rich_help_panel="Events for routers",
            help="ZeroMQ address to publish on what the engine holds, for instance tcp://*:5557; "
            "default: nothing is published.",
        ),
    ] = None
    kv_events_replay_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            rich_help_panel="Events for routers",
            help="Address for subscribers that missed events, for instance tcp://*:5558.",
        ),
    ] = None
    kv_events_buffer: Annotated[
        int,
        typer.Option(
            metavar="BATCHES",
            rich_help_panel="Events for routers",
            help="Last batches that these can still have.",
        ),
    ] = _RESIDENCY.buffer_batches
    kv_events_redact: Annotated[
        bool,
        typer.Option(
            rich_help_panel="Events for routers",
            help="Leave out item ids and the digest of features.",
        ),
    ] = _RESIDENCY.redact
    engine_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel="Events for routers",
            help="Name of the engine in topics; default: the host's.",
        ),
    ] = None
    row_digest_positions: Annotated[
        int,
        typer.Option(
            metavar="POSITIONS",
            rich_help_panel="Events for routers",
            help="Size of the digest that says which rows are there; larger tables are hashed.",
        ),
    ] = _RESIDENCY.digest_positions
    row_digest_interval: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0.0,
            rich_help_panel="Events for routers",
            help="Its changes are published no more often.",
        ),
    ] = _RESIDENCY.digest_interval_s
    poison_freed_memory: Annotated[
        bool,
        typer.Option(
            rich_help_panel="Page pool",
            help="Debugging: fill freed memory with NaN, so that reading it shows.",
        ),
    ] = False
    max_num_batched_tokens: Annotated[
        int,
        typer.Option(
            metavar="TOKENS",
            rich_help_panel="Scheduling",
            help="History tokens and candidates of one step together.",
        ),
    ] = _SCHEDULER.max_num_batched_tokens
    max_num_seqs: Annotated[
        int,
        typer.Option(
            metavar="REQUESTS", rich_help_panel="Scheduling", help="Requests that run at once."
        ),
    ] = _SCHEDULER.max_num_seqs
    max_pages_per_step: Annotated[
        int | None,
        typer.Option(
            metavar="PAGES",
            rich_help_panel="Page pool",
            help="Pages that may change hands between two steps; default: a 64th of the pool.",
        ),
    ] = _SCHEDULER.max_pages_per_step
    max_num_waiting: Annotated[
        int,
        typer.Option(
            metavar="REQUESTS",
            rich_help_panel="Scheduling",
            help="Requests that may wait beyond those; further ones get 429.",
        ),
    ] = _SCHEDULER.max_num_waiting
    max_body_bytes: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            rich_help_panel="Limits of a request",
            help="Size of a request's body; larger ones get 413.",
        ),
    ] = mebibytes(_LIMITS.max_body_bytes)
    max_history_events: Annotated[
        int,
        typer.Option(
            metavar="EVENTS",
            rich_help_panel="Limits of a request",
            help="Events that a request may send.",
        ),
    ] = _LIMITS.max_history_events
    max_candidates: Annotated[
        int,
        typer.Option(
            metavar="ITEMS",
            rich_help_panel="Limits of a request",
            help="Candidates that a request may send.",
        ),
    ] = _LIMITS.max_candidates
    max_requests: Annotated[
        int,
        typer.Option(
            metavar="REQUESTS",
            rich_help_panel="Limits of a request",
            help="Requests that one body may bring.",
        ),
    ] = _LIMITS.max_requests
    max_top_k: Annotated[
        int,
        typer.Option(
            metavar="ITEMS",
            rich_help_panel="Limits of a request",
            help="Items that a request may ask for.",
        ),
    ] = _LIMITS.max_top_k
    log_level: Annotated[
        Literal["debug", "info", "warning"], typer.Option(help="What is logged to stderr.")
    ] = "info"

    def resolve(self, model_dir: Path) -> EngineConfig:
        """Builds the configuration.

        Raises:
            ValueError: names the field and its limit.
        """
        return EngineConfig(
            model_dir=model_dir,
            pool=PoolConfig(
                _POOL.pool_bytes
                if self.pool_bytes is None
                else size_in_bytes("pool_bytes", self.pool_bytes),
                self.emb_fraction,
                self.block_tokens,
            ),
            scheduler=SchedulerConfig(
                max_num_batched_tokens=self.max_num_batched_tokens,
                max_num_seqs=self.max_num_seqs,
                max_num_waiting=self.max_num_waiting,
                max_pages_per_step=self.max_pages_per_step,
            ),
            executor=ExecutorConfig(
                device=self.device,
                dtype=self.dtype,
                row_dtype=self.row_dtype,
                kv_cache_dtype=self.kv_cache_dtype,
                attention_backend=self.attention_backend,
                max_retrieval_matrix_bytes=size_in_bytes(
                    "max_retrieval_matrix_bytes", self.max_retrieval_matrix_bytes
                ),
                gpu_memory_utilization=self._gpu_memory_utilization(),
                enforce_eager=self.enforce_eager,
            ),
            host_tier=HostTierConfig(
                source=self.host_tier or _HOST_TIER.source,
                timeout=self.host_tier_timeout,
                refill_bytes_per_second=size_in_bytes(
                    "refill_bytes_per_second", self.refill_bytes_per_second
                ),
                link_bytes_per_second=None
                if self.host_link_bytes_per_second is None
                else size_in_bytes("host_link_bytes_per_second", self.host_link_bytes_per_second),
            ),
            limits=RequestLimits(
                max_body_bytes=size_in_bytes("max_body_bytes", self.max_body_bytes),
                max_history_events=self.max_history_events,
                max_candidates=self.max_candidates,
                max_requests=self.max_requests,
                max_top_k=self.max_top_k,
            ),
            controller=ControllerConfig(
                name=self.controller,
                period_s=self.control_period,
                slo_ms=self.slo_ms,
                decision_log=self.decision_log,
            ),
            residency=ResidencyConfig(
                endpoint=self.kv_events_endpoint,
                replay_endpoint=self.kv_events_replay_endpoint,
                redact=self.kv_events_redact,
                buffer_batches=self.kv_events_buffer,
                digest_positions=self.row_digest_positions,
                digest_interval_s=self.row_digest_interval,
                engine_name=self.engine_name,
            ),
            served_model_name=self.served_model_name,
            cost_profile=self.cost_profile,
            poison_freed_memory=self.poison_freed_memory,
        )

    def _gpu_memory_utilization(self) -> float | None:
        """What there is to go by where the pool's size was not said."""
        if self.pool_bytes is None:
            if self.gpu_memory_utilization is not None and self.device == "cpu":
                raise ValueError("gpu_memory_utilization: is for GPUs; pool_bytes is for cpu")
            share = self.gpu_memory_utilization
            return GPU_MEMORY_UTILIZATION if share is None else share
        if self.gpu_memory_utilization is not None:
            raise ValueError("gpu_memory_utilization: in place of pool_bytes, not beside it")
        return None

    def start_logging(self) -> None:
        """Logs to stderr from the chosen level on."""
        logging.basicConfig(
            level=self.log_level.upper(),
            format="%(levelname)s %(name)s: %(message)s",
            handlers=[StderrHandler()],
        )


def takes_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Makes a command that runs an engine of a function on `options`, a `notice` and a `model`.

    The command gets a flag for each of `EngineOptions`, `--config` and `--dump-config`. Bad values
    are refused before the function is called, and errors that it raises say which variable or file
    set them.
    """

    @wraps(command)
    def checked(context: typer.Context, config_options: ConfigOptions, **values: Any) -> None:
        try:
            values["options"].resolve(values["model"])
        except ValueError as error:
            raise CommandError(with_place(context, str(error))) from error
        if config_options.dump_config:
            print(configuration_toml(context), end="")
            return
        try:
            with SlowNotice() as notice:
                command(notice=notice, **values)
        except CommandError as error:
            raise CommandError(with_place(context, str(error))) from error

    own = [
        parameter.replace(kind=KEYWORD)
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        if parameter.annotation is not SlowNotice
    ]
    context = inspect.Parameter("context", KEYWORD, annotation=typer.Context)
    common = inspect.Parameter("config_options", KEYWORD, annotation=ConfigOptions)
    declare(checked, [*own, context, common])
    return takes_option_groups(checked)
