"""Compiles the engine's kernels once, so that the first start finds them on disk.

python -m helm_engine.compile_kernels
"""

from __future__ import annotations

import numpy as np

from block_manager.block_pool import BlockPool
from model_executor.attention.cpu_fused import compile_kernels


def main() -> None:
    """Compiles the KV tenant's bookkeeping and the attention of CPUs."""
    BlockPool(np.arange(1))
    compile_kernels()


if __name__ == "__main__":
    main()
