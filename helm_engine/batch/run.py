"""One run over a batch: what an earlier run has answered is kept, the rest is answered."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from helm_engine.batch.journal import Journal, open_journal
from helm_engine.batch.json_lines import JsonLinesInput
from helm_engine.batch.lines import BatchLine, refuse_duplicates
from helm_engine.batch.output_lines import OutputLine
from helm_engine.batch.read_ahead import answer_lines
from helm_engine.batch.resume import BatchCount, keep_answered
from helm_engine.config import EngineConfig
from helm_engine.recommender import Recommender
from model_executor.checkpoint import load_config, model_version

if TYPE_CHECKING:
    from helm_engine.batch.parquet_input import ParquetInput

Report = Callable[[str, int, int | None], None]
"""Told of progress: what is being done, how far it is, and how far it goes if that is known."""


@dataclass(frozen=True, slots=True)
class Unanswered:
    """What is left of a batch."""

    source: Path
    salt: str
    """Goes into the id of each line: the model's version and precision."""
    version: str
    """Of the model."""
    first: BatchLine
    rest: Iterator[BatchLine]
    """The lines after the first, read once."""
    whole: bool
    """Answers are whole, whatever `fields` of the requests say."""


Answer = Callable[[EngineConfig, Unanswered], Generator[tuple[int, OutputLine], None, None]]
"""Answers lines in their order; each comes with the line's `end`."""


def answer_here(
    config: EngineConfig, left: Unanswered
) -> Generator[tuple[int, OutputLine], None, None]:
    """Answers lines with one engine in this process.

    Raises what `load_engine` raises.

    Raises:
        ValueError: the model is not the one that the lines were read for.
    """
    recommender = load_recommender(config, left.version)
    lines = chain([left.first], left.rest)
    with closing(answer_lines(recommender, lines, left.whole)) as answers:
        for line, output in answers:
            yield line.end, output


def load_recommender(config: EngineConfig, version: str) -> Recommender:
    """Loads the model, of a certain version.

    Raises what `load_engine` raises.

    Raises:
        ValueError: it has another one.
    """
    recommender = Recommender.from_config(config)
    if recommender.engine.served.version != version:
        raise ValueError(f"{config.model_dir}: was exchanged while it was read")
    return recommender


def run_batch(
    config: EngineConfig,
    source: Path,
    target: Path,
    report: Report,
    answer: Answer = answer_here,
) -> BatchCount:
    """Answers every line of a file that is not answered yet; a bad line becomes an error line.

    Both files are checked before the model is loaded, and it is not loaded where nothing is left
    to do. Requests of one user near one another run one after the other, so that each meets the
    KV of the one before.

    Args:
        config: the engine's.
        source: JSON lines `{"custom_id", "method": "POST", "url": "/v1/recommend", "body"}`, blank
            ones skipped; or, where it is called `.parquet`, a table of them (see `ParquetInput`).
        target: JSON lines `{"id", "custom_id", "response": {"status_code", "request_id", "body"},
            "error"}`, in the order of the input; grows line by line. Where it is called
            `.parquet`, a table (see `parquet_output.SCHEMA`) that appears when all is done; until
            then the lines are beside it in `<target>.partial.jsonl`. `fields` of a request are
            for JSON lines: a table has all its columns.
        report: told of progress.
        answer: what answers the lines.

    Raises:
        HelmError: the engine's first step failed.
        OSError: a file cannot be read or written. What is complete stays, and the next run goes
            on behind it.
        ValueError: a file is not what it must be, is in use, the output answers something else,
            the extra `parquet` is needed and missing, or the model cannot be served.
    """
    journal_path = target
    if _is_table(target):
        journal_path = target.with_name(f"{target.name}.partial.jsonl")
    _check_distinct(source, {target, journal_path})
    load_config(config.model_dir)
    with open_input(source, config.limits.max_body_bytes) as batch:
        _require_parquet(target)
        with open_journal(journal_path) as journal:
            version = model_version(config.model_dir)
            # With another precision the same lines have other scores.
            salt = f"{version}/{config.executor.dtype}"
            lines: Iterator[BatchLine] = refuse_duplicates(batch.lines(salt))

            def kept(line: BatchLine) -> None:
                report("reading answers that are there", line.end, batch.size)

            if _is_table(target) and target.exists():
                return _keep_table(target, journal, lines, kept)
            count, unanswered = keep_answered(journal, lines, kept)
            first = next(unanswered, None)
            if first is not None:
                report("loading the model", 0, None)
                left = Unanswered(source, salt, version, first, unanswered, _is_table(target))
                with closing(answer(config, left)) as answers:
                    for end, output in answers:
                        journal.append(output.encoded)
                        count.add(output.succeeded)
                        report("answering", end, batch.size)
            journal.sync()
            if _is_table(target):
                _make_table(target, journal, report)
            return count


def _check_distinct(source: Path, written: set[Path]) -> None:
    for path in written:
        if path.exists() and source.exists() and path.samefile(source):
            raise ValueError(f"output: {path} is the input file")


def _is_table(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _require_parquet(path: Path) -> None:
    if not _is_table(path):
        return
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ValueError(
            f"{path}: Parquet needs pyarrow; pip install 'helm-engine[parquet]' brings it"
        ) from None


def open_input(path: Path, max_body_bytes: int) -> JsonLinesInput | ParquetInput:
    """Opens a batch.

    Raises:
        OSError: it cannot be read.
        ValueError: it is none, or the extra `parquet` is needed and missing.
    """
    if not _is_table(path):
        return JsonLinesInput(path, max_body_bytes)
    _require_parquet(path)
    from helm_engine.batch.parquet_input import ParquetInput

    return ParquetInput(path, max_body_bytes)


def _keep_table(
    target: Path,
    journal: Journal,
    lines: Iterator[BatchLine],
    report: Callable[[BatchLine], None],
) -> BatchCount:
    """A table that is there is complete, or not ours; then its journal may be of use to someone."""
    from helm_engine.batch.parquet_output import check_finished

    try:
        count = check_finished(target, lines, report)
    except (OSError, ValueError):
        if not journal.num_bytes:
            journal.remove()
        raise
    journal.remove()
    return count


def _make_table(target: Path, journal: Journal, report: Report) -> None:
    from helm_engine.batch.parquet_output import convert

    size = journal.num_bytes
    convert(journal, target, lambda done: report("writing the table", done, size))
    journal.remove()
