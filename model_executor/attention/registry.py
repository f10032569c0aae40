"""Attention backends by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from model_executor.attention.backend import AttentionBackend, AttentionShape
from model_executor.attention.cpu_fused import CpuFusedAttention
from model_executor.attention.torch_reference import TorchReferenceAttention

AUTO = "auto"


class _Entry(NamedTuple):
    make: Callable[[], AttentionBackend]
    devices: tuple[str, ...]
    refusal: Callable[[AttentionShape, torch.device], str | None] | None = None
    reads_fp8: bool = False
    """Reads K and V by `PagedKV.gather` alone, which makes numbers of float8."""


def _triton() -> _Entry:
    try:
        from model_executor.attention.triton_paged import TritonAttention, refusal
    except ModuleNotFoundError as error:
        raise _not_installed("triton", error) from error
    return _Entry(TritonAttention, ("cpu", "cuda"), refusal)


def _xformers() -> _Entry:
    try:
        from model_executor.attention.xformers_paged import XFormersAttention, refusal
    except ModuleNotFoundError as error:
        raise _not_installed("xformers", error) from error
    return _Entry(XFormersAttention, ("cpu", "cuda"), refusal)


def _not_installed(name: str, error: ModuleNotFoundError) -> ValueError:
    return ValueError(
        f"attention_backend: {name!r} needs the package {error.name}: "
        "pip install 'helm-engine[gpu]'"
    )


_BACKENDS: dict[str, Callable[[], _Entry]] = {
    "cpu": lambda: _Entry(CpuFusedAttention, ("cpu",)),
    "torch": lambda: _Entry(TorchReferenceAttention, ("cpu", "cuda"), reads_fp8=True),
    "triton": _triton,
    "xformers": _xformers,
}


def attention_backend(
    name: str, device: torch.device, shape: AttentionShape | None = None
) -> AttentionBackend:
    """Makes a backend; `auto` is the fastest that there is for the device.

    Args:
        name: `auto` or that of a backend.
        device: where it is to work.
        shape: the model's and its pool's; None = nothing of them is checked.

    Raises:
        ValueError: no backend has this name, it is not installed, or it does not work on the
            device or for the model.
    """
    fp8_kv = shape is not None and shape.fp8_kv
    if name == AUTO:
        name = "cpu" if device.type == "cpu" and not fp8_kv else "torch"
    if name not in _BACKENDS:
        known = ", ".join([AUTO, *_BACKENDS])
        raise ValueError(f"attention_backend: {name!r} is unknown (known: {known})")
    entry = _BACKENDS[name]()
    if device.type not in entry.devices:
        raise ValueError(
            f"attention_backend: {name!r} works on {', '.join(entry.devices)}, not on {device.type}"
        )
    if fp8_kv and not entry.reads_fp8:
        raise ValueError(f"kv_cache_dtype: {name!r} attention reads no fp8 (torch does)")
    reason = None if shape is None or entry.refusal is None else entry.refusal(shape, device)
    if reason is not None:
        raise ValueError(f"attention_backend: {name!r} {reason}")
    return entry.make()
