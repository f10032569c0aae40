"""The tensors of a checkpoint by name: what is used is crossed off, and the rest is unknown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from model_executor.converters.errors import CheckpointError
from model_executor.converters.tables import check_plain

_DDP_PREFIX = "module."


class StateDict:
    """A checkpoint's tensors; every one must be taken or dropped for a reason."""

    def __init__(self, tensors: Mapping[str, Any], source: Path) -> None:
        self._left = dict(tensors)
        self.source = source
        self.dropped: dict[str, str] = {}
        """Reasons by name."""

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def names(self, pattern: str) -> list[re.Match[str]]:
        """Matches of a pattern with whole names that are left, in the file's order."""
        matches = [re.fullmatch(pattern, name) for name in self._left]
        return [match for match in matches if match]

    def value(self, name: str) -> object:
        """What is there under a name, whatever it is."""
        return self._left[name]

    def shape(self, name: str, num_dimensions: int) -> tuple[int, ...]:
        """Shape of a tensor that stays.

        Raises:
            CheckpointError: it is missing, no tensor, or has another number of dimensions.
        """
        tensor = self._find(name)
        if tensor.ndim != num_dimensions:
            raise self.error(
                name, f"has shape {list(tensor.shape)}, not {num_dimensions} dimensions"
            )
        return tuple(tensor.shape)

    def take(self, name: str) -> Tensor:
        """A tensor, which counts as used from now on.

        Raises:
            CheckpointError: it is missing or no tensor.
        """
        tensor = self._find(name)
        del self._left[name]
        return tensor

    def drop(self, name: str, reason: str) -> None:
        """Leaves a tensor out of the model, if it is there."""
        if name in self._left:
            del self._left[name]
            self.dropped[name] = reason

    def check_all_used(self) -> None:
        """Refuses names that nobody took.

        Raises:
            CheckpointError: names the first one, and says how many there are.
        """
        if self._left:
            name, number = min(self._left), len(self._left)
            more = f" ({number} such names in all)" if number > 1 else ""
            raise self.error(name, f"belongs to no model of this dialect that is supported{more}")

    def label(self, name: str) -> str:
        """File and name of a tensor, for messages."""
        return f"{self.source}: tensor {name!r}"

    def error(self, name: str, message: str) -> CheckpointError:
        """An error about one of the tensors."""
        return CheckpointError(f"{self.label(name)}: {message}")

    def _find(self, name: str) -> Tensor:
        if name not in self._left:
            raise self.error(name, "is missing")
        return check_plain(self._left[name], self.label(name))


def state_dict_of(checkpoint: Mapping[Any, Any], key: str, path: Path) -> StateDict:
    """The state dict that a checkpoint holds under a key, less the prefix that DDP adds.

    Raises:
        CheckpointError: there is none, or a name in it is no string.
    """
    found = checkpoint.get(key)
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"{path}: holds no dictionary of tensors under {key!r}")
    if found and all(name.startswith(_DDP_PREFIX) for name in found):
        found = {name.removeprefix(_DDP_PREFIX): value for name, value in found.items()}
    state = StateDict(found, path)
    for other in sorted(str(name) for name in checkpoint if name != key):
        state.dropped[other] = "no weights of the model"
    return state


def num_layers(state: StateDict, pattern: str) -> int:
    """How many different layers a pattern finds; its first group is a layer's number."""
    return len({int(match[1]) for match in state.names(pattern)})
