"""What a server takes is written down beside it, and whatever goes wrong there, it goes on."""

from __future__ import annotations

import asyncio
import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helm_engine.clock import VirtualClock
from helm_engine.config import EngineConfig
from helm_engine.engine_loader import load_engine
from helm_engine.exceptions import EngineUnavailableError
from helm_engine.request import Request
from helm_engine.request_trace.file_format import read_trace_file
from helm_engine.request_trace.recorder import TraceRecorder
from helm_engine.served_model import ServedModel
from helm_engine.simulator.trace import make_trace
from tests.simulator.small import workload
from tests.toy_models import toy_config, toy_engine_config, write_toy_model

TRACE = make_trace(workload(), 1)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    directory = write_toy_model(tmp_path_factory.mktemp("model") / "toy", toy_config())
    config: EngineConfig = toy_engine_config(directory)
    engine = load_engine(config, VirtualClock())
    engine.runner.close()
    return engine.served


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "served.trace"


async def answered(request: Request) -> Request:
    return request


async def failed(request: Request) -> Request:
    raise EngineUnavailableError("gone")


def ask(recorder: TraceRecorder, served: ServedModel, *numbers: int, how: Any = answered) -> None:
    for number in numbers:
        request = TRACE.request(number)
        asyncio.run(recorder.follow(how(request), request, served))


def test_each_end_is_recorded_as_it_was(path: Path, served: ServedModel) -> None:
    recorder = TraceRecorder(path, 1 << 20, VirtualClock())
    recorder.begin(served)
    ask(recorder, served, 0, 1)
    with pytest.raises(EngineUnavailableError):
        ask(recorder, served, 2, how=failed)

    async def leave() -> None:
        request = TRACE.request(3)
        never: asyncio.Future[Request] = asyncio.get_running_loop().create_future()
        following = asyncio.create_task(recorder.follow(never, request, served))
        await asyncio.sleep(0)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    asyncio.run(leave())
    recorder.close()
    file = read_trace_file(path)
    assert [one.status for one in file.records] == [200, 200, 503, 499]
    assert [one.at for one in file.records] == TRACE.arrivals[:4].tolist()
    assert (file.end, file.lost, recorder.num_recorded, recorder.num_lost) == ("stopped", 0, 4, 0)
    assert file.header.num_rows == served.model_config.num_rows
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_finds_no_room_in_the_queue_is_counted(path: Path, served: ServedModel) -> None:
    recorder = TraceRecorder(path, 1 << 20, VirtualClock(), max_queued_tokens=1)
    recorder.begin(served)
    ask(recorder, served, 0, 1, 2)
    recorder.close()
    file = read_trace_file(path)
    assert (file.records, file.lost, file.end, recorder.num_lost) == ([], 3, "stopped", 3)


def test_a_file_has_no_more_bytes_than_it_may(path: Path, served: ServedModel) -> None:
    recorder = TraceRecorder(path, 1 << 16, VirtualClock())
    recorder.begin(served)
    ask(recorder, served, *range(200))
    recorder.close()
    file = read_trace_file(path)
    assert (1 << 15) < path.stat().st_size <= 1 << 16
    assert (file.end, file.torn_at) == ("size", None)
    assert 0 < len(file.records) == recorder.num_recorded < 200
    assert recorder.num_recorded + recorder.num_lost == 200


def test_a_full_disk_ends_the_recording_and_nothing_else(
    path: Path, served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = TraceRecorder(path, 1 << 20, VirtualClock())
    recorder.begin(served)
    ask(recorder, served, 0)
    while recorder.num_recorded < 1:
        asyncio.run(asyncio.sleep(0.001))
    write = os.write

    def full(descriptor: int, data: Any) -> int:
        write(descriptor, bytes(data)[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    ask(recorder, served, 1, 2)
    recorder.close()
    ask(recorder, served, 3)
    file = read_trace_file(path)
    assert (len(file.records), file.end, file.torn_at) == (1, None, None)
    assert (recorder.num_recorded, recorder.num_lost) == (1, 3)


def test_a_model_of_other_tables_ends_the_file(path: Path, served: ServedModel) -> None:
    recorder = TraceRecorder(path, 1 << 20, VirtualClock())
    recorder.begin(served)
    ask(recorder, replace(served, version="the same once more"), 0)
    layout = replace(served.layout, block_tokens=served.layout.block_tokens * 2)
    other = replace(served, layout=layout)
    ask(recorder, other, 1, 2)
    recorder.close()
    file = read_trace_file(path)
    assert (len(file.records), file.end, recorder.num_lost) == (1, "another engine", 2)


def test_a_file_that_is_there_is_left_alone(path: Path) -> None:
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"record_trace: .* is there already"):
        TraceRecorder(path, 1 << 20)
    assert path.read_text() == "mine"
    with pytest.raises(ValueError, match=r"record_trace: .*Not a directory"):
        TraceRecorder(path / "none", 1 << 20)


def test_a_start_that_failed_leaves_no_file_in_the_way(
    path: Path, served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    TraceRecorder(path, 1 << 20, VirtualClock()).close()
    assert not path.exists()
    recorder = TraceRecorder(path, 1 << 20, VirtualClock())

    def is_full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", is_full)
        with pytest.raises(ValueError, match=r"record_trace: .*No space"):
            recorder.begin(served)
    recorder.close()
    recorder.close()
    assert not path.exists()


def test_what_clients_may_ask_for_at_most_can_be_read_back(path: Path, served: ServedModel) -> None:
    recorder = TraceRecorder(path, 1 << 20, VirtualClock())
    recorder.begin(served)
    for priority, deadline in ((2**53 - 1, 1e300), (1 - 2**53, 1e10)):
        request = TRACE.request(0)
        request.priority, request.deadline = priority, deadline
        asyncio.run(recorder.follow(answered(request), request, served))
    recorder.close()
    records = read_trace_file(path).records
    assert [one.priority for one in records] == [2**31 - 1, 1 - 2**31]
    assert [one.deadline_ms for one in records] == [None, None]
    assert recorder.num_lost == 0
