"""Taking blocks and giving them back: our block pool against vLLM's own, in turns in one run.

A request's blocks are taken (`get_new_blocks`) and freed at once, on pools of 10,001 blocks.
`array_api` is what the engine calls, ids in and out; `block_objects` is the same pool behind vLLM's
objects. A ratio is our time over vLLM's of the same turn; the median and both quartiles are given.
Needs vLLM beside our packages, as in the environment that `make compat` makes:

    make compat
    PYTHONPATH=. .venv-compat/bin/python benchmarks/vllm_blocks.py --json /tmp/alloc.json
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # For `python benchmarks/NAME.py`.

import numpy as np

from benchmarks.report import benchmark_parser, write_result
from block_manager.block_pool import BlockPool
from block_manager.vllm_block_pool import VllmBlockPool

POOL_BLOCKS = 10_001
HASH_TOKENS = 16
REQUEST_BLOCKS = (32, 256)
TURNS = 2000
QUICK_TURNS = 400
CALLS_PER_TURN = 10

Figures = dict[str, dict[str, float]]


def has_vllm() -> bool:
    """Whether vLLM can be measured here."""
    return importlib.util.find_spec("vllm") is not None


def measure(turns: int = TURNS) -> Figures:
    """Measures all pools in turns.

    Args:
        turns: of each pool, for each size of request.

    Returns:
        For "array_api_32" and so on: `us` (ours, median microseconds of taking and giving back),
        `vllm_us`, `ratio`, and its quartiles `ratio_q1` and `ratio_q3`.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
    """
    from vllm.v1.core.block_pool import BlockPool as VllmsOwn

    books = BlockPool(np.arange(POOL_BLOCKS))
    face = VllmBlockPool(POOL_BLOCKS, True, HASH_TOKENS)
    vllms = VllmsOwn(POOL_BLOCKS, True, HASH_TOKENS)

    def array_api(number: int) -> None:
        books.free_blocks(books.get_new_blocks(number))

    def block_objects(number: int) -> None:
        face.free_blocks(face.get_new_blocks(number))

    def vllm(number: int) -> None:
        vllms.free_blocks(vllms.get_new_blocks(number))

    figures: Figures = {}
    for number in REQUEST_BLOCKS:
        times: dict[str, list[float]] = {"array_api": [], "block_objects": [], "vllm": []}
        for _ in range(turns):
            for operation in (array_api, vllm, block_objects):
                times[operation.__name__].append(_microseconds(operation, number))
        for name in ("array_api", "block_objects"):
            figures[f"{name}_{number}"] = _compared(times[name], times["vllm"])
    return figures


def worst_ratio(figures: Figures) -> float:
    """That of what the engine calls, for the size of request where it is worse."""
    return max(figures[f"array_api_{number}"]["ratio"] for number in REQUEST_BLOCKS)


def _microseconds(operation: Callable[[int], None], number: int) -> float:
    start = time.perf_counter()
    for _ in range(CALLS_PER_TURN):
        operation(number)
    return (time.perf_counter() - start) / CALLS_PER_TURN * 1e6


def _compared(ours: list[float], theirs: list[float]) -> dict[str, float]:
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    first, median, third = statistics.quantiles(ratios, n=4)
    return {
        "us": round(statistics.median(ours), 2),
        "vllm_us": round(statistics.median(theirs), 2),
        "ratio": round(median, 3),
        "ratio_q1": round(first, 3),
        "ratio_q3": round(third, 3),
    }


def main() -> None:
    """Measures and writes the result."""
    args = benchmark_parser(__doc__).parse_args()
    if not has_vllm():
        sys.exit("vLLM is not installed here: `make compat` makes an environment that has it")
    figures = measure(QUICK_TURNS if args.quick else TURNS)
    ratio = worst_ratio(figures)
    result = {"pool_blocks": POOL_BLOCKS, "alloc_vs_vllm_ratio": ratio, **figures}
    write_result(args.json, result, args.seeds)
    for name, figure in figures.items():
        print(f"{name}: {figure}")


if __name__ == "__main__":
    main()
