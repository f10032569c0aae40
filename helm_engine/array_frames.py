"""Messages between processes: msgspec, with large arrays beside the message as raw buffers.

A message becomes frames of one ZeroMQ multipart message. The first holds the message in msgpack;
arrays of at least `INLINE_BYTES` follow as frames of their own, sent from where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np

INLINE_BYTES = 16_384
"""Smaller arrays are put into the message: a frame costs more than their copy."""

Buffer = bytes | memoryview

Message = TypeVar("Message")


class FrameEncoder:
    """Turns messages into frames."""

    def __init__(self) -> None:
        self._frames: list[Buffer] = []
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._array)

    def encode(self, message: object) -> list[Buffer]:
        """The frames of a message.

        Raises:
            TypeError: something in it is neither of msgspec's types nor an array of numbers.
        """
        self._frames = []
        head = self._encoder.encode(message)
        return [head, *self._frames]

    def _array(self, value: object) -> tuple[str, tuple[int, ...], int | bytes]:
        """An array's type, its shape, and its bytes or the number of their frame."""
        if not isinstance(value, np.ndarray) or value.dtype.hasobject:
            raise TypeError(f"{type(value).__name__} cannot be sent to another process")
        array = np.ascontiguousarray(value)
        if array.nbytes < INLINE_BYTES:
            return array.dtype.str, array.shape, array.tobytes()
        self._frames.append(array.data.cast("B"))
        return array.dtype.str, array.shape, len(self._frames)


class FrameDecoder(Generic[Message]):
    """Turns frames into messages of one type."""

    def __init__(self, message_type: Any) -> None:
        """Takes the type, for instance a union of tagged structs."""
        self._frames: Sequence[Buffer] = ()
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(
            message_type, dec_hook=self._read
        )

    def decode(self, frames: Sequence[Buffer]) -> Message:
        """The message of a sender's frames.

        Raises:
            msgspec.MsgspecError: they are no message of this type.
        """
        self._frames = frames
        try:
            return self._decoder.decode(frames[0])
        finally:
            self._frames = ()

    def _read(self, expected: Any, value: Any) -> Any:
        dtype, shape, place = value
        buffer = place if isinstance(place, bytes) else self._frames[place]
        # A copy: frames are read-only, and torch warns of tensors over read-only memory.
        return np.frombuffer(buffer, dtype=np.dtype(dtype)).reshape(shape).copy()
