"""Recorded requests run like the ones they were recorded of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from block_manager.block_hash import hash_blocks, root_hash, user_tag
from helm_engine.request import Request
from helm_engine.request_trace.encoder import Taken, TraceEncoder
from helm_engine.request_trace.file_format import MAGIC, framed
from helm_engine.simulator.recording import Recording, Stretch, read_recording
from helm_engine.simulator.scaling import sampled_rows
from helm_engine.simulator.simulation import EngineModel, Result, simulate
from helm_engine.simulator.trace import make_trace
from model_executor.inputs.features import TokenSequence
from model_executor.step import NO_ROW
from tests.simulator.recorded import header, write_recording
from tests.simulator.small import PROFILE, regime, workload

BUSY: dict[str, Any] = {"pool_bytes": 1_500_000, "requests_per_s": 120.0}
BLOCK = 4


def run(recording: Recording, scale: int = 1) -> Result:
    engine = recording.engine(PROFILE)
    model = EngineModel(
        engine.setting, PROFILE, engine.scheduler, engine.refill, scale=scale, rules=engine.rules
    )
    return simulate(recording.trace(recording.workload(model.setting), scale), model, 0.4)


def test_a_recorded_trace_runs_as_the_drawn_one_did(tmp_path: Path) -> None:
    drawn = make_trace(workload(regime(seconds=10.0), **BUSY), 3)
    recording, remarks = read_recording(write_recording(tmp_path / "served.trace", drawn))
    assert remarks == []
    refill = recording.engine(PROFILE).refill
    wanted = simulate(drawn, EngineModel(drawn.setting, PROFILE, refill=refill), 0.4)
    found = run(recording)
    for name in ("cached_tokens", "rows_requested", "rows_resident"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    np.testing.assert_allclose(found.latencies_ms, wanted.latencies_ms)
    assert 0 < found.cached_tokens.sum() < found.trace.lengths.sum()
    assert 0 < found.rows_resident.sum() < found.rows_requested.sum()


def test_at_a_scale_hits_are_about_those_of_the_whole(tmp_path: Path) -> None:
    drawn = make_trace(workload(regime(seconds=20.0), **BUSY), 3)
    recording, _ = read_recording(write_recording(tmp_path / "served.trace", drawn))
    full, quarter = run(recording), run(recording, 4)
    for part, whole in (("cached_tokens", None), ("rows_resident", "rows_requested")):
        shares = [
            getattr(one, part).sum() / (one.trace.lengths if whole is None else
                                        getattr(one, whole)).sum()
            for one in (full, quarter)
        ]  # fmt: skip
        assert shares[0] == pytest.approx(shares[1], abs=0.04)


def test_rows_of_a_sample_are_spread_over_all_ranks(tmp_path: Path) -> None:
    """Rows are numbered by popularity: a sample of one in four has a quarter of the hottest."""
    drawn = make_trace(workload(), 3)
    recording, _ = read_recording(write_recording(tmp_path / "served.trace", drawn))
    together = np.concatenate([*recording.rows, *recording.candidates])
    counts = np.bincount(together)
    assert (np.diff(counts) <= 0).all()
    numbers, _ = sampled_rows(recording.engine(PROFILE).setting, 4)
    assert np.count_nonzero(numbers[:400] != NO_ROW) == pytest.approx(100, abs=5)


# ---------------------------------------------------------------- whatever is asked

_IDS = st.integers(-1, 30)
_CONTEXT = st.lists(_IDS, min_size=1, max_size=14)
_ASKED = st.lists(
    st.tuples(st.integers(0, 3), _CONTEXT, st.integers(0, 14), st.lists(st.integers(0, 30))),
    min_size=1,
    max_size=12,
)


def requests(asked: list[tuple[int, list[int], int, list[int]]]) -> list[Request]:
    """Of four users, the first of whom is nobody; each goes on from a part of the last context."""
    contexts: dict[int, list[int]] = {}
    found = []
    for number, (user, news, kept, candidates) in enumerate(asked):
        rows = contexts[user] = [*contexts.get(user, [])[:kept], *news][:40]
        array = np.array(rows, dtype=np.int64)
        inputs = np.stack([array, array + 100], axis=1)
        digest = bytes([user] * 16)
        shown = np.array(candidates, dtype=np.int64)
        found.append(
            Request(
                request_id=str(number),
                tokens=TokenSequence(
                    array, array[:, None], shown, shown[:, None], num_final=len(rows)
                ),
                top_k=0,
                excluded_ids=shown[:0],
                block_hashes=hash_blocks(root_hash("m", digest), inputs, BLOCK) if user else [],
                arrival=float(number),
                deadline=number + 0.5 if number % 3 else float("inf"),
                priority=number % 5 - 2,
                user_tag=user_tag(digest) if user else 0,
            )
        )
    return found


@settings(max_examples=60)
@given(_ASKED)
def test_whatever_is_recorded_is_put_together_again(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[int, list[int], int, list[int]]]
) -> None:
    """Ids become others, one for one; all else is as it was."""
    path = tmp_path_factory.getbasetemp() / "served.trace"
    small = make_trace(workload(regime(seconds=1.0)), 1)
    encoder = TraceEncoder(BLOCK)
    taken = requests(asked)
    payloads = [encoder.encode(Taken(one, one.arrival, 200, 1.0)) for one in taken]
    head = msgspec.msgpack.encode(header(small, block_tokens=BLOCK, max_context_tokens=40))
    path.write_bytes(MAGIC + b"".join(map(framed, [head, *payloads])))
    recording, _ = read_recording(path)
    trace = recording.trace(recording.workload(recording.engine(PROFILE).setting))
    again = [trace.request(number) for number in range(len(trace))]
    names: dict[str, dict[Any, Any]] = {"row": {NO_ROW: NO_ROW}, "block": {}, "user": {0: 0}}
    for mine, theirs in zip(taken, again, strict=True):
        pairs = {
            "row": [
                *zip(mine.tokens.rows.tolist(), theirs.tokens.rows.tolist(), strict=True),
                *zip(
                    mine.tokens.candidate_rows.tolist(),
                    theirs.tokens.candidate_rows.tolist(),
                    strict=True,
                ),
            ],
            "block": [*zip(mine.block_hashes, theirs.block_hashes, strict=True)],
            "user": [(mine.user_tag, theirs.user_tag)],
        }
        for kind, found in pairs.items():
            for one, other in found:
                assert names[kind].setdefault(one, other) == other
        assert theirs.arrival == mine.arrival
        assert theirs.deadline == pytest.approx(mine.deadline)
        assert theirs.priority == mine.priority
    for renamed in names.values():
        assert len(set(renamed.values())) == len(renamed)


# ---------------------------------------------------------------- told as regimes


def test_stretches_of_one_kind_are_told_alike(tmp_path: Path) -> None:
    laws = [regime(seconds=10.0), regime(name="b", seconds=10.0, hot_user_share=0.0, load=2.0)]
    drawn = make_trace(workload(*laws, regime(name="c", seconds=10.0)), 3)
    recording, _ = read_recording(write_recording(tmp_path / "served.trace", drawn))
    setting = recording.engine(PROFILE).setting
    last = recording.seconds - 25.0
    told = recording.workload(
        setting, 5.0, [Stretch("a", 10.0, 0), Stretch("b", 10.0, 1), Stretch("c", last, 0)]
    )
    one, other, again = told.regimes
    assert msgspec.structs.replace(again, name="a", seconds=10.0) == one
    assert other.load / one.load == pytest.approx(2.0, rel=0.2)
    assert told.ends[-1] == pytest.approx(recording.seconds)
    trace = recording.trace(told)
    assert np.bincount(trace.regimes).sum() == len(trace)


def test_without_a_cost_profile_one_is_asked_for(tmp_path: Path) -> None:
    from helm_engine.simulator.recording import device_of

    path = write_recording(tmp_path / "served.trace", make_trace(workload(), 1), profile=None)
    recording, _ = read_recording(path)
    with pytest.raises(ValueError, match="profile: the server that recorded the trace had no"):
        device_of(recording, None)
    assert device_of(recording, "l20-25gbe").device.startswith("L20")
