"""The file of a recorded trace: ids tell nothing, what is written is read, damage is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helm_engine.request_trace.file_format import (
    MAGIC,
    MAX_FRAME_BYTES,
    TraceEnd,
    TraceGap,
    framed,
    read_trace_file,
)
from helm_engine.request_trace.siphash import SipKey, hashed_ids, siphash
from helm_engine.simulator.recording import read_recording
from helm_engine.simulator.trace import make_trace
from tests.simulator.recorded import header, payloads, write_recording
from tests.simulator.small import regime, workload

MASK = (1 << 64) - 1
TRACE = make_trace(workload(regime(seconds=1.0), warm_up_s=0.0), 1)

# ---------------------------------------------------------------- hashes


def plain_siphash(message: bytes, secret: bytes) -> int:
    """SipHash-2-4 as the paper writes it, over whole words only."""
    k0, k1 = (int.from_bytes(secret[at : at + 8], "little") for at in (0, 8))
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D,
         k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]  # fmt: skip

    def turn(value: int, bits: int) -> int:
        return (value << bits | value >> (64 - bits)) & MASK

    def rounds(number: int) -> None:
        for _ in range(number):
            v[0] = (v[0] + v[1]) & MASK
            v[2] = (v[2] + v[3]) & MASK
            v[1], v[3] = turn(v[1], 13) ^ v[0], turn(v[3], 16) ^ v[2]
            v[0] = turn(v[0], 32)
            v[2] = (v[2] + v[1]) & MASK
            v[0] = (v[0] + v[3]) & MASK
            v[1], v[3] = turn(v[1], 17) ^ v[2], turn(v[3], 21) ^ v[0]
            v[2] = turn(v[2], 32)

    words = [message[at : at + 8] for at in range(0, len(message), 8)]
    for word in [*words, bytes(7) + bytes([len(message) % 256])]:
        v[3] ^= int.from_bytes(word, "little")
        rounds(2)
        v[0] ^= int.from_bytes(word, "little")
    v[2] ^= 0xFF
    rounds(4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def test_hashes_are_those_of_the_reference_implementation() -> None:
    """Two of the vectors that its authors publish, of messages 00 01 02 ..."""
    key = SipKey.of(bytes(range(16)))
    for length, expected in ((8, "6224939a79f5f593"), (16, "db9bc2577fcc2a3f")):
        words = np.frombuffer(bytes(range(length)), dtype="<u8").reshape(1, -1)
        assert int(siphash(words, key)[0]).to_bytes(8, "little").hex() == expected


@given(
    st.lists(st.tuples(*[st.integers(0, MASK)] * 3), min_size=1, max_size=4),
    st.binary(min_size=16, max_size=16),
)
def test_hashes_are_those_of_the_paper(messages: list[tuple[int, ...]], secret: bytes) -> None:
    words = np.array(messages, dtype=np.uint64)
    found = siphash(words, SipKey.of(secret))
    assert found.tolist() == [plain_siphash(one.tobytes(), secret) for one in words]
    ids = hashed_ids(words, SipKey.of(secret))
    assert ids.tolist() == [int(one) >> 1 for one in found]


def test_the_same_requests_have_other_ids_in_another_file() -> None:
    one, other = payloads(TRACE), payloads(TRACE)
    assert len(one) == len(other)
    assert not set(one) & set(other)


# ---------------------------------------------------------------- what is read


def test_notes_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "served.trace"
    notes = [TraceGap(3), TraceGap(4), TraceEnd("size")]
    frames = [header(TRACE), *notes]
    path.write_bytes(MAGIC + b"".join(framed(msgspec.msgpack.encode(one)) for one in frames))
    file = read_trace_file(path)
    assert file.header == header(TRACE)
    assert (file.records, file.lost, file.end, file.torn_at) == ([], 7, "size", None)
    with pytest.raises(ValueError, match=r"served\.trace: has no request"):
        read_recording(path)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    path = tmp_path / "served.trace"
    path.write_bytes(
        write_recording(path, TRACE)
        .read_bytes()
        .replace(
            framed(msgspec.msgpack.encode(TraceEnd("stopped"))),
            framed(msgspec.msgpack.encode(TraceGap(3)))
            + framed(msgspec.msgpack.encode(TraceEnd("size"))),
        )
    )
    _, remarks = read_recording(path)
    assert [one.partition(": ")[2] for one in remarks] == [
        "3 requests could not be recorded and are missing",
        "what came later was not recorded, for the file was full",
    ]


def test_a_file_that_ends_anywhere_is_used_up_to_there(tmp_path: Path) -> None:
    whole = write_recording(tmp_path / "whole.trace", TRACE).read_bytes()
    frames = [framed(msgspec.msgpack.encode(header(TRACE))), *map(framed, payloads(TRACE))]
    begins = len(MAGIC) + np.cumsum([0, *map(len, frames)])
    path = tmp_path / "torn.trace"
    rng = np.random.default_rng(1)
    for cut in rng.integers(int(begins[2]), len(whole) - 1, 50).tolist():
        path.write_bytes(whole[:cut])
        complete = int(np.searchsorted(begins, cut, side="right")) - 2
        recording, remarks = read_recording(path)
        assert len(recording) == min(complete, len(TRACE))
        if cut not in begins:
            place = begins[min(complete + 1, len(begins) - 1)]
            assert remarks[0].startswith(f"{path}: byte {place}: ends within a record")
    for cut in (0, 5, len(MAGIC), len(MAGIC) + 4, int(begins[1]) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"torn\.trace: (is no trace|byte 20: the header)"):
            read_recording(path)


def test_any_damage_is_an_error_that_names_file_and_place(tmp_path: Path) -> None:
    whole = bytearray(write_recording(tmp_path / "whole.trace", TRACE).read_bytes())
    path = tmp_path / "damaged.trace"
    rng = np.random.default_rng(2)
    for at in rng.integers(0, len(whole), 200).tolist():
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            recording, remarks = read_recording(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            assert "\n" not in str(error)
        else:
            # A length that points behind the end looks like a torn frame.
            assert len(recording) < len(TRACE) and "ends within" in remarks[0]


def test_a_frame_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "served.trace", TRACE)
    place = path.stat().st_size - len(framed(msgspec.msgpack.encode(TraceEnd("stopped"))))
    with path.open("r+b") as file:
        file.seek(place)
        file.write((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))
    with pytest.raises(ValueError, match=f"byte {place}: is damaged: a frame of {1 + (1 << 24)}"):
        read_trace_file(path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({1: float("nan")}, "Expected `float`"),
        ({1: "soon"}, "Expected `float`"),
        ({3: 5}, "base: 5 is no earlier record"),
        ({4: 1}, "shared_blocks: 1 is more than"),
        ({5: 10**6}, "num_tokens: 1000000 is above the limit 200"),
        ({5: 3}, "do not make the 3 of num_tokens"),
        ({6: bytes(8 * 100)}, "blocks: 100 do not fit"),
        ({6: bytes(7)}, "blocks: 7 bytes are no whole ids"),
        ({6: b"\xff" * 8}, "blocks: an id is below 0"),
        ({8: b"\xff" * 8}, "candidates: an id is below 0"),
        ({11: 42}, "Expected `int` >= 100"),
        ({0: "other"}, "Invalid value 'other'"),
    ],
)
def test_a_record_that_cannot_be_is_refused(
    tmp_path: Path, changes: dict[int, Any], named: str
) -> None:
    """Field by field, in the order of `TraceRecord`, its tag first; the checksum is right."""
    fields = msgspec.msgpack.decode(payloads(TRACE)[0])
    for place, value in changes.items():
        fields[place] = value
    frames = [msgspec.msgpack.encode(header(TRACE)), msgspec.msgpack.encode(fields)]
    path = tmp_path / "served.trace"
    path.write_bytes(MAGIC + b"".join(map(framed, frames)))
    with pytest.raises(ValueError, match=rf"served\.trace: (byte|request) \d+: .*{named}"):
        read_recording(path)


def test_more_rows_than_the_tables_have_are_refused(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "served.trace", TRACE, num_rows=10)
    with pytest.raises(ValueError, match=r"served\.trace: has \d+ different rows, the tables have"):
        read_recording(path)


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.trace").write_bytes(b"PAR1" * 100)
    for name, named in (("other.trace", "is no trace"), ("none.trace", "No such file")):
        with pytest.raises(ValueError, match=rf"{name}: {named}"):
            read_trace_file(tmp_path / name)
