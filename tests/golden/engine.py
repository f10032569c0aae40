"""An engine over few small pages, from the weights of a case."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from block_manager.pool_layout import PAGE_ALIGNMENT, PoolConfig
from helm_engine.clock import SystemClock
from helm_engine.config import EngineConfig, ExecutorConfig, SchedulerConfig
from helm_engine.engine_loader import LoadedEngine, load_engine
from helm_engine.request import Request
from model_executor.capabilities import capabilities_of
from model_executor.checkpoint import save_model
from model_executor.model_config import ModelConfig
from model_executor.models.registry import build_model
from model_executor.models.sequence_model import SequenceModel
from tests.golden.case import CaseError, GoldenCase

BLOCK_TOKENS = 4
TOKENS_PER_STEP = 7
ELEMENT_BYTES = 4


def pool_for(config: ModelConfig, step_tokens: int, histories: int, emb: float) -> PoolConfig:
    """A pool that holds a few longest contexts, and a quarter more."""
    blocks = 1 + histories * -(-config.max_context_tokens // BLOCK_TOKENS)
    row_bytes = config.row_dim * ELEMENT_BYTES
    block_bytes = BLOCK_TOKENS * config.kv_elements_per_token * ELEMENT_BYTES
    page_bytes = max(block_bytes, row_bytes) + PAGE_ALIGNMENT
    return PoolConfig(
        pool_bytes=step_tokens * row_bytes + page_bytes * (5 * blocks // 4 + 1),
        emb_fraction=emb,
        block_tokens=BLOCK_TOKENS,
    )


def fill(model: SequenceModel, weights: Mapping[str, Tensor], path: object) -> None:
    """Sets all weights of a model.

    Raises:
        CaseError: one is missing, is not the model's, or has another shape.
    """
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise CaseError(f"{path}: {' '.join(str(error).split())}") from error
    model.requires_grad_(False).eval()


def load(
    case: GoldenCase,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tables: Mapping[str, Tensor],
    device: str,
) -> LoadedEngine:
    """Writes the case as a model directory and loads it as `serve` would."""
    model = build_model(config)
    fill(model, weights, case.path)
    step_tokens = TOKENS_PER_STEP
    if not capabilities_of(config).chunkable.value:
        step_tokens = config.max_context_tokens + 3
    with tempfile.TemporaryDirectory() as directory:
        save_model(Path(directory), model, tables)
        engine = load_engine(
            EngineConfig(
                Path(directory),
                pool=pool_for(config, step_tokens, histories=2, emb=0.2),
                scheduler=SchedulerConfig(max_num_batched_tokens=step_tokens),
                executor=ExecutorConfig(device=device),
                poison_freed_memory=True,
            ),
            SystemClock(),
        )
    # References whose n followed their batch stored it; nobody else may set it.
    runner = engine.runner
    runner.model.rule = replace(runner.model.rule, normaliser=case.header["normaliser_n"])
    return engine


def answer(engine: LoadedEngine, request: Request) -> None:
    """Runs one request to its end.

    Raises:
        CaseError: it failed.
    """
    engine.core.add_request(request)
    engine.core.run_until_idle()
    engine.core.check_integrity()
    if request.error is not None:
        raise CaseError(f"request {request.request_id}: {request.error}")
