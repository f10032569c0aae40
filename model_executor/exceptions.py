"""What can go wrong below the scheduler, by name."""

from __future__ import annotations


class ModelDirectoryError(ValueError):
    """A model directory cannot be served; the message names the file and the field or tensor."""


class RowsUnavailableError(RuntimeError):
    """The host tier could not deliver embedding rows."""


class TablesMismatchError(ValueError):
    """The host tier holds other tables than the model needs; the message names the field."""


class DeviceMemoryError(ValueError):
    """The device has no room for the engine; the message gives the bytes and what to lower."""
