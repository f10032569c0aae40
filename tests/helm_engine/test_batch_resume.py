"""`run-batch` that was killed, ran out of disk or is run twice, as real processes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running_server import BUNDLED_MODEL
from tests.helm_engine.batches import (
    arguments,
    assert_same_answers,
    line,
    read_answers,
    refusal,
    run,
    scattered_bodies,
)
from tests.toy_models import toy_config, write_toy_model

NUM_LINES = 3000
NUM_KILLS = 5
INTERRUPTED_AT_LINE = """
import os, signal, sys
from helm_engine.batch.journal import Journal
from helm_engine.entrypoints.cli import main

left = int(sys.argv.pop(1))
append = Journal.append

def append_and_interrupt(journal, line):
    global left
    append(journal, line)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGINT)

Journal.append = append_and_interrupt
main()
"""
"""The command, which sends itself Ctrl-C once so many lines are there."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model."""
    return write_toy_model(tmp_path_factory.mktemp("models") / "toy", toy_config())


@pytest.fixture(scope="module")
def done(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a batch over the toy model, `in.jsonl`, and its answers, `out.jsonl`."""
    directory = tmp_path_factory.mktemp("done")
    bodies: list[Any] = scattered_bodies(120, 20, max_events=24, num_items=60)
    bodies[7] = bodies[70] = {"history": {}}
    lines = [line(f"line-{n}", body) for n, body in enumerate(bodies)]
    (directory / "in.jsonl").write_text("\n".join(lines) + "\n")
    finished = run(directory / "in.jsonl", directory / "out.jsonl", model_dir)
    assert finished.returncode == 0, finished.stderr
    return directory


@pytest.fixture
def partly(done: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The batch, and a copy of its output that ends within the 51st line."""
    target = tmp_path / "out.jsonl"
    lines = (done / "out.jsonl").read_bytes().splitlines(keepends=True)
    target.write_bytes(b"".join(lines[:50]) + lines[50][:-30])
    return done / "in.jsonl", target


@pytest.fixture
def scattered(tmp_path: Path) -> tuple[Path, Path]:
    """A batch that keeps the bundled model busy for seconds, and where its answers may go."""
    bodies = scattered_bodies(NUM_LINES, 60, max_events=200, num_items=1682)
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(line(f"c{n}", body) for n, body in enumerate(bodies)))
    return source, tmp_path / "out.jsonl"


def wait_for_lines(process: subprocess.Popen[str], target: Path, number: int) -> None:
    while not target.exists() or target.read_bytes().count(b"\n") < number:
        assert process.poll() is None, "the run ended too soon"
        time.sleep(0.002)


def test_killed_at_random_lines_it_ends_as_if_it_had_never_been(tmp_path: Path) -> None:
    bodies: list[Any] = scattered_bodies(NUM_LINES, 60, max_events=200, num_items=1682)
    rng = random.Random(1)
    for number in rng.sample(range(NUM_LINES), 40):
        bodies[number] = {"history": {"item_ids": [0], "timestamps": [1]}}
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(line(f"c{n}", body) for n, body in enumerate(bodies)))
    whole = run(source, tmp_path / "whole.jsonl", BUNDLED_MODEL)
    assert whole.returncode == 0, whole.stderr
    wanted = read_answers(tmp_path / "whole.jsonl")
    assert [one["custom_id"] for one in wanted] == [f"c{n}" for n in range(NUM_LINES)]

    before = b""
    for kill_at in sorted(rng.sample(range(1, NUM_LINES // 2), NUM_KILLS)):
        with subprocess.Popen(
            arguments(source, target, BUNDLED_MODEL), stderr=subprocess.PIPE, text=True
        ) as process:
            wait_for_lines(process, target, max(kill_at, before.count(b"\n") + 1))
            process.kill()
        assert process.returncode == -signal.SIGKILL
        left = target.read_bytes()
        complete = left[: left.rindex(b"\n") + 1]
        assert complete.startswith(before)
        before = complete
        if rng.random() < 0.5:
            # What a machine that lost power may leave: the last line is torn.
            begin = complete[:-1].rindex(b"\n") + 1
            os.truncate(target, rng.randrange(begin, len(complete)))
            before = complete[:begin]
    last = run(source, target, BUNDLED_MODEL)
    assert last.returncode == 0, last.stderr
    num_kept = before.count(b"\n")
    assert f"{num_kept} lines were there already" in last.stderr
    assert last.stderr.endswith(f"{NUM_LINES - 40} answered, 40 failed\n")
    assert target.read_bytes().startswith(before)
    assert_same_answers(read_answers(target), wanted)


def test_a_torn_last_line_is_cut_and_answered_again(
    partly: tuple[Path, Path], done: Path, model_dir: Path
) -> None:
    source, target = partly
    before = target.read_bytes()
    finished = run(source, target, model_dir)
    assert finished.returncode == 0, finished.stderr
    assert target.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert_same_answers(read_answers(target), read_answers(done / "out.jsonl"))


def test_a_complete_output_needs_no_model(done: Path, model_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    shutil.copy(done / "out.jsonl", target)
    again = run(done / "in.jsonl", target, model_dir)
    assert again.returncode == 0
    assert again.stderr.splitlines() == [
        f"{target}: 120 lines were there already; nothing was left to do",
        "118 answered, 2 failed",
    ]
    assert target.read_bytes() == (done / "out.jsonl").read_bytes()


def test_lines_added_to_the_input_are_answered(done: Path, model_dir: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    shutil.copy(done / "out.jsonl", target)
    more = line("more", {"history": {"item_ids": [1], "timestamps": [1]}})
    source.write_text((done / "in.jsonl").read_text() + more)
    assert run(source, target, model_dir).stderr.endswith("119 answered, 2 failed\n")
    assert target.read_bytes().startswith((done / "out.jsonl").read_bytes())
    assert [one["custom_id"] for one in read_answers(target)][119:] == ["line-119", "more"]


def _edited(source: Path, number: int, text: str, to: Path) -> Path:
    lines = source.read_text().splitlines()
    lines[number - 1] = text
    to.write_text("\n".join(lines) + "\n")
    return to


def test_an_output_of_something_else_is_refused_and_left_alone(
    partly: tuple[Path, Path], model_dir: Path, tmp_path: Path
) -> None:
    source, target = partly
    before = target.read_bytes()
    changed = json.loads(source.read_text().splitlines()[29])
    changed["body"]["top_k"] = 21
    other_model = write_toy_model(tmp_path / "other", toy_config(), seed=1)
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text("\n".join(source.read_text().splitlines()[:20]))
    cases = [
        (_edited(source, 9, line("x", {}), tmp_path / "a"), model_dir, "line 9 answers custom_id"),
        (_edited(source, 30, json.dumps(changed), tmp_path / "b"), model_dir, "line 30 has id"),
        (_edited(source, 1, "", tmp_path / "c"), model_dir, "line 1 answers custom_id 'line-0'"),
        (_edited(source, 51, line("x", {}), tmp_path / "d"), model_dir, "line 51 is torn"),
        (shorter, model_dir, "line 21 is beyond the last input line"),
        (source, other_model, "line 1 has id"),
    ]
    for other_source, model, problem in cases:
        message = refusal(run(other_source, target, model))
        assert f"{target}: {problem}" in message
        assert "choose another -o" in message
        assert target.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["a letter without an end", "a letter\nof two lines\n", "{}\n", "\x00" * 9, "\n"]
)
def test_a_file_that_is_no_output_is_refused_and_left_alone(
    content: str, done: Path, model_dir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "letter.txt"
    target.write_text(content)
    assert "letter.txt: line 1 is" in refusal(run(done / "in.jsonl", target, model_dir))
    assert target.read_text() == content


def test_a_full_disk_is_said_and_a_rerun_goes_on(
    done: Path, model_dir: Path, tmp_path: Path
) -> None:
    wanted = (done / "out.jsonl").read_bytes()
    target = tmp_path / "out.jsonl"
    before = b""
    for limit in (len(wanted) // 3, len(wanted) // 2):
        full = run(
            done / "in.jsonl", target, model_dir, "--log-level", "warning", max_file_bytes=limit
        )
        assert "out.jsonl: File too large" in refusal(full)
        left = target.read_bytes()
        assert left.endswith(b"\n")
        assert left.startswith(before)
        assert len(before) < len(left) <= limit
        before = left
    assert run(done / "in.jsonl", target, model_dir).returncode == 0
    assert target.read_bytes().startswith(before)
    assert_same_answers(read_answers(target), read_answers(done / "out.jsonl"))


def test_an_output_directory_that_cannot_be_written_is_said(
    done: Path, model_dir: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "sealed"
    directory.mkdir(mode=0o555)
    if os.geteuid() == 0:
        # The superuser may write anywhere but where the kernel itself says no.
        directory = Path("/sys")
    assert str(directory / "out.jsonl") in refusal(
        run(done / "in.jsonl", directory / "out.jsonl", model_dir)
    )


def test_an_interrupted_run_says_how_to_go_on(done: Path, model_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    started = arguments(done / "in.jsonl", target, model_dir, "--log-level", "warning")
    interrupted = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_AT_LINE, "3", *started[started.index("run-batch") :]],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert interrupted.returncode == 130
    assert interrupted.stderr == f"interrupted; the same command goes on with {target}\n"
    left = target.read_bytes()
    assert left.count(b"\n") == 3
    assert run(done / "in.jsonl", target, model_dir).returncode == 0
    assert target.read_bytes().startswith(left)
    assert_same_answers(read_answers(target), read_answers(done / "out.jsonl"))


def test_a_second_run_over_the_same_output_is_refused(scattered: tuple[Path, Path]) -> None:
    source, target = scattered
    with subprocess.Popen(
        arguments(source, target, BUNDLED_MODEL), stderr=subprocess.PIPE, text=True
    ) as first:
        wait_for_lines(first, target, 1)
        first.send_signal(signal.SIGSTOP)
        try:
            second = run(source, target, BUNDLED_MODEL)
        finally:
            first.send_signal(signal.SIGCONT)
        first.communicate()
    assert "out.jsonl is being written by another process" in refusal(second)
    assert first.returncode == 0
    assert [one["custom_id"] for one in read_answers(target)] == [f"c{n}" for n in range(NUM_LINES)]
