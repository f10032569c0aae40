"""The lines of a batch answered by several engines, over Ray Data.

One task reads the input and cuts it into blocks; engines answer whole blocks, so that lines of one
user near one another meet the KV of the one before. Answers come back in the order of the lines.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import dropwhile, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray.data
from ray.data import ActorPoolStrategy
from ray.data.block import Block, BlockAccessor, BlockMetadata
from ray.data.context import DataContext
from ray.data.datasource import Datasource, ReadTask
from ray.exceptions import RayError

from helm_engine.batch.lines import BatchLine, refuse_duplicates
from helm_engine.batch.output_lines import OutputLine
from helm_engine.batch.read_ahead import answer_lines
from helm_engine.batch.run import Unanswered, load_recommender, open_input
from helm_engine.config import EngineConfig
from helm_engine.exceptions import EngineUnavailableError
from helm_engine.ray_session import ray_session

BLOCK_BYTES = 256 << 10
"""Of lines that one engine answers at a time: enough for steps to be full, and little enough that
engines end together."""
_READ_LINES = 64
"""Lines that the reader hands over at a time; a block ends between two such hands."""

_Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class RayAnswers:
    """Answers lines with engines of a Ray; see `run.Answer`."""

    num_engines: int
    num_cpus: int
    """Cores of each."""
    address: str | None
    """Of a Ray that is there already; None = one of our own."""

    def __call__(
        self, config: EngineConfig, left: Unanswered
    ) -> Generator[tuple[int, OutputLine], None, None]:
        """Answers lines in their order; the input must be a file, which is read again.

        Raises:
            ValueError: the input is a pipe.
            EngineUnavailableError: an engine could not be started, or the reader failed; the
                message says why.
            ConnectionError: there is no Ray at the address.
        """
        if not left.source.is_file():
            raise ValueError(f"input: {left.source}: --ray needs a file, for it is read twice")
        with ray_session(self.address, self.num_engines * self.num_cpus + 1):
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            context = DataContext.get_current()
            context.execution_options.preserve_order = True
            context.target_max_block_size = BLOCK_BYTES
            context.enable_progress_bars = False
            lines = ray.data.read_datasource(
                _LinesDatasource(left, config.limits.max_body_bytes),
                override_num_blocks=1,
                # With as much as an engine has, Ray would make one task of reading and answering.
                num_cpus=0.5,
            )
            answers = lines.map_batches(
                _BatchEngine,
                fn_constructor_args=(config, left.version, left.whole),
                batch_size=None,
                compute=ActorPoolStrategy(size=self.num_engines),
                num_cpus=self.num_cpus,
                num_gpus=1 if config.executor.device == "cuda" else 0,
            )
            try:
                for columns in answers.iter_batches(batch_size=None):
                    yield from _outputs(columns)
            except RayError as error:
                # All of the traces of other processes, and at their end what happened.
                said = str(error).strip().splitlines()[-1].strip()
                raise EngineUnavailableError(f"Ray: {said}") from error


class _LinesDatasource(Datasource):
    """The lines of a file from one on, read by one task on the node of this process."""

    def __init__(self, left: Unanswered, max_body_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._size = left.source.stat().st_size
        self._read = partial(read_blocks, left.source, left.salt, left.first.number, max_body_bytes)

    def estimate_inmemory_data_size(self) -> int:
        return self._size

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        return [ReadTask(self._read, BlockMetadata(None, self._size, None, None))]

    @property
    def supports_distributed_reads(self) -> bool:
        return False


def read_blocks(source: Path, salt: str, first: int, max_body_bytes: int) -> Iterator[Block]:
    """Blocks of lines from the first one that is wanted on."""
    with open_input(source, max_body_bytes) as batch:
        lines = dropwhile(lambda line: line.number < first, refuse_duplicates(batch.lines(salt)))
        while some := list(islice(lines, _READ_LINES)):
            yield BlockAccessor.batch_to_block({"line": _objects(some)})


class _BatchEngine:
    """An engine in a process of its own."""

    def __init__(self, config: EngineConfig, version: str, whole: bool) -> None:
        self._recommender = load_recommender(config, version)
        self._whole = whole

    def __call__(self, columns: _Columns) -> _Columns:
        lines: Iterator[BatchLine] = iter(columns["line"])
        with closing(answer_lines(self._recommender, lines, self._whole)) as answers:
            answered = list(answers)
        return {
            "end": np.array([line.end for line, _ in answered], dtype=np.int64),
            "encoded": _objects([output.encoded for _, output in answered]),
            "succeeded": np.array([output.succeeded for _, output in answered], dtype=np.bool_),
        }


def _outputs(columns: _Columns) -> Iterator[tuple[int, OutputLine]]:
    for end, encoded, succeeded in zip(
        columns["end"], columns["encoded"], columns["succeeded"], strict=True
    ):
        yield int(end), OutputLine(encoded, bool(succeeded))


def _objects(values: list[Any]) -> npt.NDArray[Any]:
    """Values as they are, whatever they could be made into."""
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column
