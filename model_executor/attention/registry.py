"""Attention backends by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from model_executor.attention.backend import AttentionBackend
from model_executor.attention.torch_reference import TorchReferenceAttention

_BACKENDS: dict[str, Callable[[], AttentionBackend]] = {"torch": TorchReferenceAttention}


def default_backend(device: torch.device) -> str:
    """The fastest backend for a device."""
    return "torch"


def attention_backend(name: str) -> AttentionBackend:
    """Makes a backend.

    Raises:
        ValueError: no backend has this name.
    """
    try:
        return _BACKENDS[name]()
    except KeyError:
        known = ", ".join(sorted(_BACKENDS))
        raise ValueError(f"attention_backend: {name!r} is unknown (known: {known})") from None
