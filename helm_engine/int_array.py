"""Arrays of integers in requests: NumPy from the moment they are parsed, checked as a whole."""

from __future__ import annotations

import contextlib
import json
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import simdjson
from pydantic import PlainSerializer, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_INTEGER = 2**53 - 1
"""What JSON carries exactly everywhere; sums and differences of such numbers fit an int64."""
_MAX_KEYS = 256
"""simdjson looks a key up by going through them all: larger objects would take time squared."""


def to_int_array(value: object) -> npt.NDArray[np.int64]:
    """An int64 array [n] of a list, a tuple, an array or a buffer of integers.

    Raises:
        PydanticCustomError: it is none, or an element is no integer or beyond +-MAX_INTEGER; the
            context's `index` says which element.
    """
    if isinstance(value, bytes):
        value = from_buffer(value)
    if isinstance(value, np.ndarray):
        if value.ndim != 1 or not np.issubdtype(value.dtype, np.integer):
            raise PydanticCustomError("int_array", "must be an array of integers")
        if value.dtype == np.uint64 and len(value) and int(value.max()) > MAX_INTEGER:
            raise _refused(int(value.argmax()))
        # A copy: the caller may fill the array anew while the request is in flight.
        array = value.astype(np.int64)
    elif isinstance(value, list | tuple):
        strange = next((place for place, one in enumerate(value) if type(one) is not int), None)
        if strange is not None:
            raise PydanticCustomError(
                "int_array", "must be an integer, not of type {value}",
                {"index": strange, "value": _type_name(value[strange])},
            )  # fmt: skip
        try:
            array = np.array(value, dtype=np.int64)
        except OverflowError:
            beyond = next(place for place, one in enumerate(value) if abs(one) > MAX_INTEGER)
            raise _refused(beyond) from None
    else:
        raise PydanticCustomError("int_array", "must be an array of integers")
    beyond_limit = np.flatnonzero((array > MAX_INTEGER) | (array < -MAX_INTEGER))
    if len(beyond_limit):
        raise _refused(int(beyond_limit[0]))
    return array


def from_buffer(raw: bytes) -> npt.NDArray[np.int64]:
    """The integers of a msgpack `bin`: int64, little-endian, one after the other.

    Raises:
        PydanticCustomError: its length is no multiple of 8 bytes.
    """
    if len(raw) % 8:
        raise PydanticCustomError(
            "int_array", "must be an array, or a buffer of 8-byte little-endian integers"
        )
    return np.frombuffer(raw, dtype="<i8").astype(np.int64)


def _type_name(value: object) -> str:
    """In a client's words."""
    return "array" if isinstance(value, np.ndarray | list | tuple) else type(value).__name__


def _refused(index: int) -> PydanticCustomError:
    message = f"must be within +-{MAX_INTEGER}"
    return PydanticCustomError("int_array", message, {"index": index})


IntArray = Annotated[
    npt.NDArray[np.int64],
    PlainValidator(to_int_array),
    PlainSerializer(lambda array: array.tolist(), when_used="json"),
    WithJsonSchema(
        {
            "type": "array",
            "items": {"type": "integer", "minimum": -MAX_INTEGER, "maximum": MAX_INTEGER},
        }
    ),
]
"""A pydantic field that takes lists, tuples and arrays of integers."""


def parse_json(raw: bytes) -> Any:
    """Parses JSON; integer arrays in objects become int64 arrays, without an object per element.

    Raises:
        ValueError: it is not JSON, or is nested too deeply.
    """
    # What simdjson cannot do (integers beyond 64 bits, odd or many keys, no JSON at all) the
    # standard library can, or says better what is wrong.
    with contextlib.suppress(RuntimeError, ValueError, KeyError):
        parsed = simdjson.Parser().parse(raw)
        if isinstance(parsed, simdjson.Object):
            reader = _Reader()
            plain = reader.read(parsed)
            # simdjson would flatten arrays of arrays: only bodies without any are read this way.
            if reader.is_exact and raw.count(b"[") == reader.num_arrays:
                return plain
    try:
        return json.loads(raw)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


class _Reader:
    """Makes Python values of simdjson's, and counts the arrays."""

    def __init__(self) -> None:
        self.num_arrays = 0
        self.is_exact = True
        """Whether simdjson finds by every key what the standard library would: keys stand once in
        their object and hold no NUL."""

    def read(self, value: Any) -> Any:
        if isinstance(value, simdjson.Object):
            if len(value) > _MAX_KEYS:
                raise ValueError("more keys than simdjson finds quickly")
            keys = list(value.keys())
            self.is_exact &= len(set(keys)) == len(keys) and "\0" not in "".join(keys)
            # By key: `items` would make a Python list of every array.
            return {key: self.read(value[key]) for key in keys}
        if isinstance(value, simdjson.Array):
            self.num_arrays += 1
            try:
                return np.frombuffer(value.as_buffer(of_type="i"), dtype=np.int64)
            except TypeError:
                return [self.read(one) for one in value]
        return value
