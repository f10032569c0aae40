"""What `make gpu-check` asks of xformers, as far as a CPU can answer it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_devices import SASREC, attend, paged_step
from model_executor.attention.registry import attention_backend

CPU = torch.device("cpu")


def test_its_steps_are_the_same_to_both_backends() -> None:
    pytest.importorskip("xformers")
    small = SASREC | {"embedding_dim": 32, "num_heads": 1, "dqk": 32, "dv": 32}
    step = paged_step(CPU, torch.float32, (2, 50, 20), small)
    got, want = (attend(attention_backend(name, CPU), *step) for name in ("xformers", "torch"))
    assert not want.isnan().any()
    assert ((got - want).abs() <= 1e-4).all()
