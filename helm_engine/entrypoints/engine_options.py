"""The flags of every command that runs an engine, each spelled once."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from block_manager.pool_layout import PoolConfig
from helm_engine.config import EngineConfig, ExecutorConfig, RequestLimits, SchedulerConfig

_POOL = PoolConfig()
_SCHEDULER = SchedulerConfig()
_EXECUTOR = ExecutorConfig()
_LIMITS = RequestLimits()


def _size(value: int) -> str:
    return f"{value >> 20}MiB"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the command line says about an engine."""

    pool_bytes: Annotated[
        str, typer.Option(help="Size of the page pool, for instance 64MiB or 8GiB.")
    ] = _size(_POOL.pool_bytes)
    emb_fraction: Annotated[
        float, typer.Option(help="Share of the pool for embedding rows, 0 to 1.")
    ] = _POOL.emb_fraction
    block_tokens: Annotated[int, typer.Option(help="History tokens of one KV block.")] = (
        _POOL.block_tokens
    )
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="History tokens and candidates of one step together.")
    ] = _SCHEDULER.max_num_batched_tokens
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once.")] = (
        _SCHEDULER.max_num_seqs
    )
    max_num_waiting: Annotated[
        int, typer.Option(help="Requests that may wait beyond those; further ones get 429.")
    ] = _SCHEDULER.max_num_waiting
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = _EXECUTOR.device
    dtype: Annotated[
        str, typer.Option(help="What is computed and cached in: float32 or bfloat16.")
    ] = _EXECUTOR.dtype
    attention_backend: Annotated[
        str, typer.Option(help="How attention is computed: auto, cpu or torch.")
    ] = _EXECUTOR.attention_backend
    max_retrieval_matrix_bytes: Annotated[
        str,
        typer.Option(help="Limit of the item matrix of retrieval; 0 = candidates only."),
    ] = _size(_EXECUTOR.max_retrieval_matrix_bytes)
    max_body_bytes: Annotated[
        str, typer.Option(help="Size of a request's body; larger ones get 413.")
    ] = _size(_LIMITS.max_body_bytes)
    max_history_events: Annotated[int, typer.Option(help="Events that a request may send.")] = (
        _LIMITS.max_history_events
    )
    max_candidates: Annotated[int, typer.Option(help="Candidates that a request may send.")] = (
        _LIMITS.max_candidates
    )
    max_top_k: Annotated[int, typer.Option(help="Items that a request may ask for.")] = (
        _LIMITS.max_top_k
    )
    served_model_name: Annotated[
        str | None, typer.Option(help="Name of the model in requests; default: the directory's.")
    ] = None
    poison_freed_memory: Annotated[
        bool,
        typer.Option(
            "--poison-freed-memory",
            help="Debugging: fill freed memory with NaN, so that reading it shows.",
        ),
    ] = False
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
                _bytes("pool_bytes", self.pool_bytes), self.emb_fraction, self.block_tokens
            ),
            scheduler=SchedulerConfig(
                max_num_batched_tokens=self.max_num_batched_tokens,
                max_num_seqs=self.max_num_seqs,
                max_num_waiting=self.max_num_waiting,
            ),
            executor=ExecutorConfig(
                device=self.device,
                dtype=self.dtype,
                attention_backend=self.attention_backend,
                max_retrieval_matrix_bytes=_bytes(
                    "max_retrieval_matrix_bytes", self.max_retrieval_matrix_bytes
                ),
            ),
            limits=RequestLimits(
                max_body_bytes=_bytes("max_body_bytes", self.max_body_bytes),
                max_history_events=self.max_history_events,
                max_candidates=self.max_candidates,
                max_top_k=self.max_top_k,
            ),
            served_model_name=self.served_model_name,
            poison_freed_memory=self.poison_freed_memory,
        )

    def start_logging(self) -> None:
        """Logs to stderr from the chosen level on."""
        logging.basicConfig(
            level=self.log_level.upper(), format="%(levelname)s %(name)s: %(message)s"
        )


def _bytes(field: str, text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ValueError(f"{field}: {text!r} is not a size such as 64MiB") from None


def takes_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command whose first parameter is an `EngineOptions` a flag for each of its fields."""
    hints = get_type_hints(EngineOptions, include_extras=True)
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    flags = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in fields(EngineOptions)
    ]

    @wraps(command)
    def with_flags(**values: Any) -> None:
        options = EngineOptions(**{flag.name: values.pop(flag.name) for flag in flags})
        command(options, **values)

    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own] + flags
    with_flags.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_flags.__annotations__ = {one.name: one.annotation for one in parameters}
    return with_flags
