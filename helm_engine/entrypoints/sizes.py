"""Sizes of memory on a command line."""

from __future__ import annotations

from pydantic import ByteSize, TypeAdapter, ValidationError


def mebibytes(value: int) -> str:
    """Bytes as a flag would say them."""
    return f"{value >> 20}MiB"


def size_in_bytes(field: str, text: str) -> int:
    """What a flag says as `64MiB`.

    Raises:
        ValueError: it is no size; names the field.
    """
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ValueError(f"{field}: {text!r} is not a size such as 64MiB") from None
