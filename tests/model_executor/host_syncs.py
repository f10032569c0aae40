"""Counts what would make the host wait for a GPU, in code that runs on a CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_DATA_DEPENDENT = {
    "_local_scalar_dense",  # item, float, int, bool
    "nonzero",
    "masked_select",
    "unique_consecutive",
    "_unique2",
    "unique_dim",
    "bincount",
    "equal",
    "allclose",
    "is_nonzero",
}
"""Operators whose result, or its size, the host must know before it goes on."""
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""With a mask they ask how many of it are true."""


class HostSyncs(TorchDispatchMode):
    """Counts operators that wait; use as a context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in _INDEXING and any(
            isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8)
            for one in args[1] or ()
        )
        sizes_itself = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in _DATA_DEPENDENT or by_mask or sizes_itself:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count_reads(monkeypatch: pytest.MonkeyPatch, counts: Counter[str]) -> None:
    """Counts copies to the host that wait, and copies to the device from memory not pinned."""

    def counted(name: str, is_a_wait: Callable[..., bool]) -> None:
        original = getattr(Tensor, name)

        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if is_a_wait(*args, **kwargs):
                counts[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, method)

    def to_host(*args: Any, **kwargs: Any) -> bool:
        return str((*args, None)[0]).startswith("cpu") and not kwargs.get("non_blocking")

    counted("cpu", lambda *_, **__: True)
    counted("tolist", lambda *_, **__: True)
    counted("to", to_host)
