"""Parts of a benchmark in virtual time, several at once, each in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TypeVar

Part = TypeVar("Part")
Found = TypeVar("Found")


def run_side_by_side(
    run: Callable[[Part], Found], todo: Sequence[Part], processes: int
) -> Iterator[tuple[Part, Found]]:
    """Yields what each part found as it ends, and says how far it is.

    Args:
        run: a function of a module, so that another process finds it.
        todo: in the order in which they begin.
        processes: at once.
    """
    began = time.perf_counter()
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        futures = {pool.submit(run, part): part for part in todo}
        for number, future in enumerate(as_completed(futures), 1):
            part, found = futures[future], future.result()
            passed = time.perf_counter() - began
            print(f"[{passed:6.0f} s] {number}/{len(todo)} {part}", flush=True)
            yield part, found
