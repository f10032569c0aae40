"""Bodies of requests, most of them broken: valid ones with values exchanged and bytes mangled.

The same seed gives the same bodies.
"""

from __future__ import annotations

import copy
import datetime
import json
import random
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec.msgpack import Ext

from helm_engine.body_codec import Encoding

_HISTORY = {
    "item_ids": [7, 3, 59, 7],
    "timestamps": [100, 160, 4000, 4000],
    "actions": [1, 0, 5, 31],
    "category": [0, 6, 2, 1],
    "start_index": 2,
}
_CANDIDATES = {"item_ids": [1, 40, 1], "category": [3, 4, 3]}
VALID: list[dict[str, Any]] = [
    {
        "user": "ada",
        "history": _HISTORY,
        "candidates": _CANDIDATES,
        "context": {"user_id": 4999, "device": 3},
        "top_k": 2,
    },
    {"history": {"item_ids": [1], "timestamps": [-5]}, "request_time": 0, "exclude_history": True},
    {"history": _HISTORY, "fields": ["data.item_id", "usage"], "priority": -3, "deadline_ms": 1e6},
    {"requests": [{"user": "a", "history": _HISTORY}, {"history": {"item_ids": []}}]},
]
"""Some for a model with features and context, some for one without: see `tests.toy_models`."""

_NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 59, 60, 61, 2**31, 2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1,
    -(2**53), -(2**63), 10**30, 10**400, 0.0, -0.0, 1.5, 1e308, 1e-320, float("nan"), float("inf"),
    "", "7", "\0", "\ud800", "ü" * 300, "a" * 513, "\U0001d4b3\u202e", "[key]", "body", "requests",
    [], [[]], [[1, 2], [3]], [1, 2.0], [None], [True, 1], ["1"], [{}], [2**70], [-1],
    list(range(99)), {}, {"": 1}, {"item_ids": [1]}, {"a": {"b": {"c": []}}},
]  # fmt: skip
_ONLY_MSGPACK: list[Any] = [
    b"", b"\1" * 7, b"\1" * 8, b"\0" * 64, b"\xff" * 16, Ext(5, b"abc"), Ext(-7, b""),
    datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC), datetime.datetime.max, {1: 2}, {b"k": 1},
    {None: 1}, {1.5: []}, {True: {}}, {(1, 2): 3}, 2**64 - 1,
]  # fmt: skip
_KEYS = [
    "user",
    "history",
    "item_ids",
    "fields",
    "context",
    "",
    "\0",
    "\ud800",
    "é",
    "a.b",
    "x" * 9,
]
_TOKENS = [
    b"NaN", b"-Infinity", b"1e999", b"0x1", b"01", b"'a'", b"\\u12", b"\xef\xbb\xbf", b"\xff",
    b"/**/", b",", b":", b"{", b"}", b"[", b"]", b'"', b"\\", b"\n", b"9" * 400, b"\xc1", b"\xdf",
    b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xd6\xff\0\0\0\0", b"\x91" * 1500,
    b"[" * 1500, b'{"a":' * 1500,
]  # fmt: skip


def broken_bodies(seed: int, number: int) -> Iterator[tuple[Encoding, bytes]]:
    """That many bodies; one in ten or so is a good one."""
    chance = random.Random(seed)
    for _ in range(number):
        encoding = chance.choice(list(Encoding))
        body = copy.deepcopy(chance.choice(VALID))
        for _ in range(chance.choice((0, 1, 1, 2, 4))):
            body = _with_a_change(body, encoding, chance)
        raw = _encoded(body, encoding)
        for _ in range(chance.choice((0, 0, 0, 1, 1, 5))):
            raw = _mangled(raw, chance)
        yield encoding, raw


def _with_a_change(body: Any, encoding: Encoding, chance: random.Random) -> Any:
    """The body with one value exchanged, dropped, added, or under another key."""
    values = _NASTY + (_ONLY_MSGPACK if encoding is Encoding.MSGPACK else [])
    places = list(_places(body))
    if not places or chance.random() < 0.02:
        return copy.deepcopy(chance.choice(values))
    holder, key = chance.choice(places)
    deed = chance.randrange(4)
    if deed == 0:
        del holder[key]
    elif deed == 1 and isinstance(holder, dict):
        holder[chance.choice(_KEYS)] = holder[key]
    elif deed == 2:
        _, elsewhere = chance.choice(places)
        holder[key] = copy.deepcopy(body) if chance.random() < 0.3 else elsewhere
    else:
        holder[key] = copy.deepcopy(chance.choice(values))
    return body


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a tree: what holds it, and its key or index."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _encoded(body: Any, encoding: Encoding) -> bytes:
    if encoding is Encoding.MSGPACK:
        try:
            return msgspec.msgpack.encode(body)
        except (OverflowError, UnicodeEncodeError, ValueError, TypeError):
            return b"\xc1"  # An integer or text that msgpack cannot carry.
    return json.dumps(body).encode()


def _mangled(raw: bytes, chance: random.Random) -> bytes:
    """Bytes cut off, dropped, doubled, exchanged or put in."""
    first, last = sorted(chance.randrange(len(raw) + 1) for _ in range(2))
    deed = chance.randrange(6)
    if deed == 0:
        return raw[:first]
    if deed == 1:
        return raw[:first] + raw[last:]
    if deed == 2:
        return raw[:last] + raw[first:]
    if deed == 3:
        return raw[:first] + chance.choice(_TOKENS) + raw[first:]
    if deed == 4:
        return raw[:first] + bytes([chance.randrange(256)]) + raw[first + 1 :]
    # Two members of equal names, where this is JSON.
    return raw.replace(b"{", b'{"history": 1, "user": 2, ', 1)
