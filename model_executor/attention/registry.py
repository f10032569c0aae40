"""Attention backends by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from model_executor.attention.backend import AttentionBackend
from model_executor.attention.cpu_fused import CpuFusedAttention
from model_executor.attention.torch_reference import TorchReferenceAttention

AUTO = "auto"


class _Entry(NamedTuple):
    make: Callable[[], AttentionBackend]
    devices: tuple[str, ...]


_BACKENDS = {
    "cpu": _Entry(CpuFusedAttention, ("cpu",)),
    "torch": _Entry(TorchReferenceAttention, ("cpu", "cuda")),
}


def attention_backend(name: str, device: torch.device) -> AttentionBackend:
    """Makes a backend; `auto` is the fastest that there is for the device.

    Raises:
        ValueError: no backend has this name, or it does not work on the device.
    """
    if name == AUTO:
        name = "cpu" if device.type == "cpu" else "torch"
    if name not in _BACKENDS:
        known = ", ".join([AUTO, *_BACKENDS])
        raise ValueError(f"attention_backend: {name!r} is unknown (known: {known})")
    entry = _BACKENDS[name]
    if device.type not in entry.devices:
        raise ValueError(
            f"attention_backend: {name!r} works on {', '.join(entry.devices)}, not on {device.type}"
        )
    return entry.make()
