"""What goes wrong in a conversion."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be converted; the message names the file and the tensor or field."""
