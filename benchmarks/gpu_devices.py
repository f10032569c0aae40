"""Parts of `make gpu-check`: how a GPU's memory is shared out, and xformers over our pages."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from block_manager.pool_layout import PoolConfig, plan_layout
from helm_engine.config import EngineConfig
from helm_engine.recommender import Recommender
from helm_engine.sample_request import sample_request
from model_executor.attention.backend import AttentionBackend
from model_executor.attention.registry import attention_backend
from model_executor.attention.rule import AttentionRule
from model_executor.model_config import parse_model_config
from model_executor.page_arena import PageArena
from model_executor.paged_batch import PagedBatch, build_paged_batch
from model_executor.step import NO_ROW, ScheduledRequest

UTILIZATION = 0.5
SASREC: dict[str, Any] = {
    "model_type": "sasrec",
    "dialect": "sasrec",
    "dtype": "float32",
    "num_items": 1000,
    "embedding_dim": 256,
    "num_layers": 2,
    "num_heads": 4,
    "dqk": 64,
    "dv": 64,
    "max_sequence_len": 4096,
    "ffn_dim": 256,
    "layer_norm_eps": 1e-6,
}
SHAPES = ((64, 0, 200), (64, 190, 10), (8, 0, 1024), (8, 3968, 128), (1, 0, 4096))
"""Sequences, rows in the cache, rows computed."""
TOLERANCE = 2e-2
"""Of bfloat16 results of about 1."""
REPEATS = 20


def check_pool_sizing(config: EngineConfig) -> dict[str, int]:
    """Gives the pool what a share of the GPU leaves; the largest steps against full batches.

    Args:
        config: of an engine on a GPU; its pool's size is not read.

    Raises:
        SystemExit: the engine holds more than its share, or a batch takes more than was measured.
    """
    executor = replace(config.executor, gpu_memory_utilization=UTILIZATION)
    with Recommender.from_config(replace(config, executor=executor)) as recommender:
        served = recommender.engine.served
        device = torch.device(served.config.executor.device)
        share = int(UTILIZATION * torch.cuda.mem_get_info(device)[1])
        assert served.workspace is not None
        model, rng = served.model_config, np.random.default_rng(0)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        for _ in range(3):
            length = min(model.max_sequence_len, 2 * config.scheduler.max_num_batched_tokens)
            items = (model.first_item_id + rng.integers(0, model.num_items, length)).tolist()
            body = sample_request(model, items, list(range(length)), items[:256])
            recommender.recommend_batch([body] * config.scheduler.max_num_seqs)
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - held
        found = {
            "share": share,
            "weights": served.memory.weights,
            "workspace": served.workspace,
            "pool": served.layout.total_bytes,
            "peak_of_traffic": peak,
        }
    if served.memory.total + served.workspace > share or peak > served.workspace:
        raise SystemExit(f"gpu-check: the engine takes more than its share: {found}")
    del recommender
    gc.collect()
    torch.cuda.empty_cache()
    return found


def paged_step(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], config: dict[str, Any]
) -> tuple[PagedBatch, PageArena, torch.Tensor]:
    """Rows of a step over full pages in random order; NaN in all other memory.

    Args:
        device: where.
        dtype: of rows and pages.
        shape: sequences, rows in the cache, rows computed.
        config: of the model.

    Returns:
        The batch, the pool, and numbers for q, k and v of the rows, [3, T, H, d].
    """
    model = parse_model_config(config, "gpu_devices")
    number, start, num_rows = shape
    block_tokens, length = 64, start + num_rows
    blocks = -(-length // block_tokens)
    block_bytes = block_tokens * model.kv_elements_per_token * dtype.itemsize
    layout = plan_layout(
        PoolConfig((number * blocks + blocks + 2) * block_bytes, 0.0, block_tokens),
        kv_bytes_per_token=model.kv_elements_per_token * dtype.itemsize,
        row_bytes=model.row_dim * dtype.itemsize,
        max_context_tokens=length,
        staging_rows=0,
    )
    arena = PageArena(layout, model, device, dtype)
    arena.poison()
    pages = np.random.default_rng(0).permutation(np.arange(1, layout.num_pages))
    requests = [
        ScheduledRequest(
            request_id=str(place),
            start=start,
            row_index=np.full(num_rows, NO_ROW),
            block_table=pages[place * blocks : (place + 1) * blocks],
            features=np.zeros((length, 1), dtype=np.int64),
            task=None,
        )
        for place in range(number)
    ]
    torch.manual_seed(0)
    used = torch.from_numpy(pages[: number * blocks]).to(device)
    for tensor in (arena.kv.k, arena.kv.v):
        tensor[used] = torch.randn(tensor[used].shape, device=device).to(dtype)
    rows = torch.randn(3, number * num_rows, model.num_heads, model.dqk, device=device).to(dtype)
    return build_paged_batch(requests, block_tokens, device), arena, rows


def attend(
    backend: AttentionBackend, batch: PagedBatch, arena: PageArena, rows: torch.Tensor
) -> torch.Tensor:
    """Attention of the rows in the first layer; their own K and V are in the pages already."""
    rule = AttentionRule(weights="softmax", scale=rows.shape[-1] ** -0.5)
    return backend.attend(rows[0], rows[1], rows[2], arena.kv, 0, batch, rule)


def check_xformers(device: torch.device) -> list[dict[str, Any]]:
    """Its kernel in bfloat16 against the reference, and the milliseconds of both.

    Returns:
        A figure for each shape; none where xformers is not installed.

    Raises:
        SystemExit: results differ.
    """
    try:
        backends = [attention_backend(name, device) for name in ("xformers", "torch")]
    except ValueError as error:
        print(f"gpu-check: {error}; its kernel was not checked")
        return []
    figures = []
    for shape in SHAPES:
        step = paged_step(device, torch.bfloat16, shape, SASREC)
        got, want = (attend(backend, *step).float() for backend in backends)
        largest = float((got - want).abs().max())
        if not largest <= TOLERANCE:
            raise SystemExit(f"gpu-check: xformers differs by {largest} at {shape}")
        times: list[list[float]] = [[], []]
        for _ in range(REPEATS):
            for backend, found in zip(backends, times, strict=True):
                torch.cuda.synchronize(device)
                started = time.perf_counter()
                attend(backend, *step)
                torch.cuda.synchronize(device)
                found.append((time.perf_counter() - started) * 1e3)
        fast, slow = (float(np.median(found)) for found in times)
        names = ("sequences", "cached", "rows")
        figures.append(
            {
                **dict(zip(names, shape, strict=True)),
                "ms": fast,
                "ms_reference": slow,
                "largest_difference": largest,
            }
        )
    return figures
