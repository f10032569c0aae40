"""Gives the pool what a share of a GPU's memory leaves: measured, and in one ledger."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from block_manager.pool_layout import PoolConfig, PoolLayout
from helm_engine.config import ExecutorConfig
from helm_engine.input_processor import new_user_key
from helm_engine.largest_steps import largest_steps
from helm_engine.served_model import ServedModel
from model_executor.capabilities import StepRules
from model_executor.device_budget import DeviceBudget
from model_executor.memory_meter import MemoryMeter, measure_workspace, memory_errors_told
from model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


def device_budget(config: ExecutorConfig, device: torch.device) -> DeviceBudget | None:
    """What the engine may take of a GPU, before it takes any; None = the pool's size is given.

    Raises:
        DeviceMemoryError: others hold so much that it is not there.
    """
    if device.type != "cuda" or config.gpu_memory_utilization is None:
        return None
    free, total = torch.cuda.mem_get_info(device)
    # A GPU named by its number is that of all engines of the front.
    sharing = config.num_engines if ":" in config.device else 1
    budget = DeviceBudget(str(device), total, free, config.gpu_memory_utilization, sharing)
    budget.check_free()
    return budget


def size_pool(
    served: ServedModel,
    runner: ModelRunner,
    rules: StepRules,
    budget: DeviceBudget,
    meter: MemoryMeter,
    plan: Callable[[PoolConfig], PoolLayout],
) -> ServedModel:
    """Measures the largest steps and gives the runner the pool that there is room for.

    Args:
        served: the model, with the smallest pool that it can have.
        runner: likewise.
        rules: the model's.
        budget: of the device.
        meter: of its memory.
        plan: cuts a pool.

    Returns:
        The model with its pool, and what the largest step takes.

    Raises:
        DeviceMemoryError: there is no room; the message gives the bytes and what to lower.
        RowsUnavailableError: the host tier could not deliver rows.
    """
    device = torch.device(budget.device)
    steps = largest_steps(served, served.input_processor(new_user_key()), rules)
    tokens = served.config.scheduler.max_num_batched_tokens
    with memory_errors_told(
        device,
        f"a step of {tokens} tokens beside {served.memory.weights} bytes of weights",
        "lower max_num_batched_tokens or max_num_seqs",
    ):
        workspace = measure_workspace(runner, steps, meter)
    # Rings of buffers and graphs stay like weights; they do not grow with the pool.
    held, smallest = runner.memory, served.layout.total_bytes
    weights = held.total - smallest
    pool_bytes = budget.pool_bytes(weights, workspace, smallest)
    pool = replace(served.config.pool, pool_bytes=pool_bytes)
    layout = plan(pool)
    runner.replace_pool(layout)
    logger.info(
        "%s: %d bytes for this engine: %d of weights, %d measured for the largest step, %d for "
        "the pool",
        budget.device,
        budget.share,
        weights,
        workspace,
        layout.total_bytes,
    )
    return replace(
        served,
        config=replace(served.config, pool=pool),
        layout=layout,
        memory=runner.memory,
        workspace=workspace,
    )
