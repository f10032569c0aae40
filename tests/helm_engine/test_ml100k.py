"""The MovieLens-100K loader, on invented files, and on the real data where it can be had."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from helm_engine.datasets import ml100k
from helm_engine.datasets.ml100k import (
    NUM_RATINGS,
    NUM_USERS,
    WHEEL_FILE,
    WHEEL_MEMBER,
    DatasetError,
    MovieLens100K,
    load_ml100k,
    read_rows,
)

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
# User 2 has three events in one second, out of the order of their ids; user 1 comes last.
SMALL = "2\t30\t4\t500\n2\t10\t3\t500\n2\t20\t5\t500\n2\t40\t1\t400\n1\t7\t2\t900\n1\t8\t2\t100\n"


def whole_data_set() -> str:
    """Invented rows with the counts of MovieLens-100K."""
    rows = np.arange(NUM_RATINGS)
    users, items = rows % NUM_USERS + 1, rows // NUM_USERS + 1
    cells = zip(users, items, rows % 5 + 1, 1_000_000 - rows, strict=True)
    return "".join(f"{user}\t{item}\t{rating}\t{time}\n" for user, item, rating, time in cells)


def write_wheel(path: Path, text: str, member: str = WHEEL_MEMBER) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, text)
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ---------------------------------------------------------------- formats


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    sources = [
        write(tmp_path / "ml-100k.inter", HEADER + SMALL),
        write(tmp_path / "u.data", SMALL),
        write_wheel(tmp_path / "any.whl", HEADER + SMALL),
        write(tmp_path / "folder" / "u.data", SMALL).parent,
    ]
    for source in sources:
        rows = read_rows(source)
        assert rows.dtype == np.int64
        assert rows[0].tolist() == [2, 30, 4, 500]
        assert rows.shape == (6, 4)


def test_whole_numbers_written_as_floats_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "u.data", "1\t2\t3.0\t400.0\r\n")
    assert read_rows(path).tolist() == [[1, 2, 3, 400]]


@pytest.mark.parametrize("kind", ["wheel", "inter", "u.data", "folder"])
def test_whole_data_set_loads(tmp_path: Path, kind: str) -> None:
    text = whole_data_set()
    source = {
        "wheel": lambda: write_wheel(tmp_path / WHEEL_FILE, HEADER + text),
        "inter": lambda: write(tmp_path / "ml-100k.inter", HEADER + text),
        "u.data": lambda: write(tmp_path / "u.data", text),
        "folder": lambda: write_wheel(tmp_path / WHEEL_FILE, HEADER + text).parent,
    }[kind]()
    dataset = load_ml100k(source)
    assert (dataset.num_users, dataset.num_items, dataset.num_events) == (943, 1682, 100_000)
    items, times = dataset.history(0)
    assert items.tolist() == list(range(len(items), 0, -1))  # the newest row comes first in time
    assert bool((np.diff(times) > 0).all())


# ---------------------------------------------------------------- order


def test_events_are_sorted_by_user_and_time_and_ties_keep_the_order_of_the_file(
    tmp_path: Path,
) -> None:
    dataset = MovieLens100K.from_rows(read_rows(write(tmp_path / "u.data", SMALL)))
    assert dataset.user_offsets.tolist() == [0, 2, 6]
    assert dataset.history(0)[0].tolist() == [8, 7]
    assert dataset.history(1)[0].tolist() == [40, 30, 10, 20]
    assert dataset.history(1)[1].tolist() == [400, 500, 500, 500]
    assert dataset.item_ids.dtype == dataset.timestamps.dtype == dataset.user_offsets.dtype
    assert dataset.item_ids.dtype == np.int64


def test_arrays_cannot_be_changed(tmp_path: Path) -> None:
    dataset = MovieLens100K.from_rows(read_rows(write(tmp_path / "u.data", SMALL)))
    with pytest.raises(ValueError, match="read-only"):
        dataset.history(0)[0][0] = 1


@pytest.mark.parametrize("user_index", [-1, 2])
def test_unknown_user_is_an_index_error(tmp_path: Path, user_index: int) -> None:
    dataset = MovieLens100K.from_rows(read_rows(write(tmp_path / "u.data", SMALL)))
    with pytest.raises(IndexError, match=r"is not in 0\.\.1"):
        dataset.history(user_index)


# ---------------------------------------------------------------- leave-one-out


def test_test_split_asks_for_the_last_event_and_knows_all_before_it(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "u.data", SMALL))
    first, second = MovieLens100K.from_rows(rows).held_out("test")
    assert (first.user_index, first.target_item, first.request_time) == (0, 7, 900)
    assert (second.user_index, second.target_item, second.request_time) == (1, 20, 500)
    assert second.item_ids.tolist() == [40, 30, 10]
    assert second.timestamps.tolist() == [400, 500, 500]


def test_validation_split_knows_nothing_of_the_last_event(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "u.data", SMALL))
    only = MovieLens100K.from_rows(rows[rows[:, 0] == 2] - [1, 0, 0, 0]).held_out("validation")
    assert len(only) == 1
    assert (only[0].target_item, only[0].request_time) == (10, 500)
    assert only[0].item_ids.tolist() == [40, 30]


def test_user_without_history_cannot_be_held_out(tmp_path: Path) -> None:
    dataset = MovieLens100K.from_rows(read_rows(write(tmp_path / "u.data", SMALL)))
    with pytest.raises(DatasetError, match="user 1 has 2 events, the validation split needs"):
        dataset.held_out("validation")


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("bad_line", "message"),
    [
        ("2\t10\t3", "has 3 tab-separated values, expected 4"),
        ("2 10 3 500", "has 1 tab-separated values, expected 4"),
        ("", "has 1 tab-separated values, expected 4"),
        ("x\t10\t3\t500", "user is 'x', expected a whole number in 1..943"),
        ("944\t10\t3\t500", "user is '944', expected a whole number in 1..943"),
        ("2\t0\t3\t500", "item is '0', expected a whole number in 1..1682"),
        ("2\t1683\t3\t500", "item is '1683', expected a whole number in 1..1682"),
        ("2\t10\t6\t500", "rating is '6', expected a whole number in 1..5"),
        ("2\t10\t3\t500.5", "timestamp is '500.5', expected a whole number in"),
        ("2\t10\t3\t-1", "timestamp is '-1', expected a whole number in"),
        ("2\t10\t3\tnan", "timestamp is 'nan', expected a whole number in"),
        ("2\t10\t3\t1e300", "timestamp is '1e300', expected a whole number in"),
    ],
)
@pytest.mark.parametrize("header", ["", HEADER])
def test_malformed_line_is_named(tmp_path: Path, header: str, bad_line: str, message: str) -> None:
    path = write(tmp_path / "u.data", f"{header}1\t7\t2\t900\n{bad_line}\n2\t30\t4\t500\n")
    line = 3 if header else 2
    with pytest.raises(DatasetError) as caught:
        read_rows(path)
    assert f"{path}:{line}: {message}" in str(caught.value)


def test_another_header_is_a_malformed_first_line(tmp_path: Path) -> None:
    path = write(tmp_path / "ml-100k.inter", "item_id\tuser_id\trating\ttimestamp\n" + SMALL)
    with pytest.raises(DatasetError, match=r"ml-100k\.inter:1: user is 'item_id'"):
        read_rows(path)


@pytest.mark.parametrize("text", ["", HEADER])
def test_file_without_rows_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DatasetError, match="holds no rows"):
        read_rows(write(tmp_path / "u.data", text))


def test_part_of_the_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds 6 rows of 2 users, MovieLens-100K has 100000"):
        load_ml100k(write(tmp_path / "u.data", SMALL))


def test_unreadable_sources_are_dataset_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    sources = {
        tmp_path / "absent.inter": "cannot be read",
        tmp_path / "binary": "cannot be read",
        tmp_path / "empty": "holds none of ml-100k.inter, u.data",
        write(tmp_path / "broken.whl", "no zip"): "cannot be read",
        write_wheel(tmp_path / "other.whl", SMALL, "other/file"): "cannot be read",
    }
    for source, message in sources.items():
        with pytest.raises(DatasetError, match=message):
            load_ml100k(source)


# ---------------------------------------------------------------- download


def test_wheel_in_the_cache_is_used_without_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_pip(folder: Path) -> None:
        raise AssertionError("pip was called")

    monkeypatch.setenv("HELM_CACHE", str(tmp_path))
    monkeypatch.setattr(ml100k, "_pip_download", no_pip)
    write_wheel(tmp_path / WHEEL_FILE, HEADER + whole_data_set())
    assert load_ml100k().num_events == NUM_RATINGS


def test_download_is_moved_into_place_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "not" / "yet"
    monkeypatch.setenv("HELM_CACHE", str(cache))
    monkeypatch.setattr(
        ml100k, "_pip_download", lambda folder: write_wheel(folder / WHEEL_FILE, "")
    )
    with caplog.at_level("INFO"):
        assert ml100k.download_wheel() == cache / WHEEL_FILE
    assert [path.name for path in cache.iterdir()] == [WHEEL_FILE]
    assert "downloading MovieLens-100K (wheel of recbole==1.2.1)" in caplog.text


def test_failed_download_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_run(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="ERROR: no network\n")

    monkeypatch.setenv("HELM_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", failing_run)
    with pytest.raises(DatasetError, match=r"of a copy instead\. ERROR: no network"):
        load_ml100k()
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the real data


@pytest.fixture(scope="module")
def real_data() -> MovieLens100K:
    try:
        path = ml100k.download_wheel()
    except DatasetError as error:
        pytest.skip(f"MovieLens-100K cannot be had here: {error}")
    return load_ml100k(path)  # a damaged or changed wheel is a failure, not a skip


def test_real_data_has_the_documented_shape(real_data: MovieLens100K) -> None:
    counts = np.diff(real_data.user_offsets)
    assert (counts.min(), counts.max(), len(counts)) == (20, 737, 943)
    assert len(np.unique(real_data.item_ids)) == real_data.num_items == 1682
    assert real_data.timestamps.min() == 874_724_710
    assert real_data.timestamps.max() == 893_286_638
    users = np.repeat(np.arange(real_data.num_users), counts)
    assert len(np.unique(np.stack([users, real_data.item_ids]), axis=1).T) == NUM_RATINGS


def test_real_data_can_be_held_out(real_data: MovieLens100K) -> None:
    validation, test = real_data.held_out("validation"), real_data.held_out("test")
    assert len(validation) == len(test) == 943
    for before, after in zip(validation, test, strict=True):
        assert after.item_ids[-1] == before.target_item
        assert after.request_time >= before.request_time
        assert after.target_item not in after.item_ids  # nobody rates a movie twice
