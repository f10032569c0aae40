"""How lines are read ahead, put together by user, and put back in order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helm_engine.batch.lines import BatchLine, LineDigest
from helm_engine.batch.output_lines import OutputLine
from helm_engine.batch.read_ahead import MAX_LINES, ReadAhead, answer_lines
from helm_engine.protocol import Recommendation
from helm_engine.recommender import Recommender
from tests.toy_models import toy_config, toy_engine_config, write_toy_model

NUM_EVENTS = 13
NUM_FULL_BLOCKS = 3


def batch_line(number: int, user: str | None, num_bytes: int = 1) -> BatchLine:
    """A line of a user with a history that fills a few blocks."""
    history = {
        "item_ids": [1 + (number + place) % 60 for place in range(NUM_EVENTS)],
        "timestamps": list(range(NUM_EVENTS)),
    }
    if user is not None:
        first = int.from_bytes(hashlib.blake2b(user.encode(), digest_size=2).digest()) % 60
        history["item_ids"] = [1 + (first + place) % 60 for place in range(NUM_EVENTS)]
    body = {"history": history, **({} if user is None else {"user": user})}
    return BatchLine(number, f"batch-{number}", str(number), body, None, num_bytes, number)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model."""
    return write_toy_model(tmp_path_factory.mktemp("models") / "toy", toy_config())


@given(
    users=st.lists(st.sampled_from([None, "a", "b", "c", "d", "e"]), max_size=60),
    max_lines=st.integers(1, 12),
    max_bytes=st.integers(1, 60),
    seats=st.integers(1, 6),
    data=st.data(),
)
def test_each_line_comes_out_once_in_order_and_little_is_read_ahead(
    users: list[str | None], max_lines: int, max_bytes: int, seats: int, data: st.DataObject
) -> None:
    num_read = 0
    sizes = [data.draw(st.integers(1, 20)) for _ in users]

    def lines() -> Iterator[BatchLine]:
        nonlocal num_read
        for number, user in enumerate(users):
            num_read += 1
            yield batch_line(number, user, sizes[number])

    ahead = ReadAhead(lines(), max_lines, max_bytes)
    under_way: list[BatchLine] = []
    started: list[int] = []
    written: list[int] = []
    while True:
        while len(under_way) < seats and (line := ahead.next_line()) is not None:
            started.append(line.number)
            under_way.append(line)
            named = [one.user for one in under_way if one.user is not None]
            assert len(set(named)) == len(named)
            assert num_read - len(written) <= max_lines
            assert sum(sizes[len(written) : num_read - 1]) < max_bytes
        if not under_way:
            break
        line = under_way.pop(data.draw(st.integers(0, len(under_way) - 1)))
        ahead.end(line, OutputLine(b"x" * data.draw(st.integers(1, 30)), True))
        for answered, _ in ahead.take_next():
            written.append(answered.number)
        held = [number for number in started if number not in written]
        assert len(held) <= max_lines
    assert written == list(range(len(users)))
    for user in set(users) - {None}:
        own = [number for number in started if users[number] == user]
        assert own == sorted(own)


def test_answers_that_wait_to_be_written_are_bounded() -> None:
    """The first line is slow; others run until their answers fill the bound, then none but it."""
    ahead = ReadAhead(iter([batch_line(n, f"u{n}") for n in range(100)]), max_bytes=1000)
    first = ahead.next_line()
    assert first is not None
    num_ended = 0
    while (line := ahead.next_line()) is not None:
        ahead.end(line, OutputLine(b"x" * 100, True))
        assert not list(ahead.take_next())
        num_ended += 1
    assert num_ended == 10
    ahead.end(first, OutputLine(b"x", True))
    assert [one.number for one, _ in ahead.take_next()] == list(range(11))
    assert ahead.next_line() is not None


def test_a_long_file_is_not_read_to_its_end(model_dir: Path) -> None:
    recommender = Recommender.from_config(toy_engine_config(model_dir, max_num_seqs=4))
    num_read = 0

    def lines() -> Iterator[BatchLine]:
        nonlocal num_read
        for number in range(10 * MAX_LINES):
            num_read += 1
            yield batch_line(number, None)

    answers = answer_lines(recommender, lines())
    for num_written in range(1, 20):
        next(answers)
        assert num_read <= MAX_LINES + num_written
    answers.close()
    assert not recommender.engine.core.has_work


def test_a_users_scattered_lines_meet_the_kv_of_the_one_before(model_dir: Path) -> None:
    """The pool holds few users, so in the order of the file every visit finds its KV evicted."""
    users = [f"u{n % 20}" for n in range(100)]
    lines = [batch_line(number, user) for number, user in enumerate(users)]
    config = toy_engine_config(model_dir, num_pages=24, max_num_seqs=4)
    in_file_order = [
        answer.usage.cached_tokens
        for answer in Recommender.from_config(config).stream(line.body for line in lines)
        if isinstance(answer, Recommendation)
    ]
    assert in_file_order == [0] * 100

    recommender = Recommender.from_config(config)
    bodies = {line.number: line for line in lines}
    cached: dict[int, int] = {}
    ahead = ReadAhead(iter(lines))

    def next_request() -> tuple[BatchLine, object] | None:
        line = ahead.next_line()
        return None if line is None else (line, line.body)

    for line, answer in recommender.answer_as_ended(next_request):
        assert isinstance(answer, Recommendation)
        cached[line.number] = answer.usage.cached_tokens
        ahead.end(line, OutputLine(b"", True))
        list(ahead.take_next())
    block = recommender.config.pool.block_tokens
    wanted = [0] * 20 + [NUM_FULL_BLOCKS * block] * 80
    assert [cached[number] for number in sorted(bodies)] == wanted


def test_the_same_line_has_the_same_id_and_another_one_has_another() -> None:
    def line_id(version: str, number: int, *pieces: bytes) -> str:
        digest = LineDigest(version, number)
        for piece in pieces:
            digest.add(piece)
        return digest.id

    ids = [
        line_id("model", 1, b"line"),
        line_id("other", 1, b"line"),
        line_id("model", 2, b"line"),
        line_id("model", 1, b"lime"),
        line_id("model1", 1, b"line"),
    ]
    assert len(set(ids)) == len(ids)
    assert line_id("model", 1, b"li", b"ne") == ids[0]
    assert ids[0].startswith("batch-")
    assert len(bytes.fromhex(ids[0].removeprefix("batch-"))) == 16
