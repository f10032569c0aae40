"""One run over a batch: what an earlier run has answered is kept, the rest is answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from helm_engine.batch.journal import Journal, open_journal
from helm_engine.batch.json_lines import JsonLinesInput
from helm_engine.batch.lines import BatchLine, refuse_duplicates
from helm_engine.batch.read_ahead import answer_lines
from helm_engine.batch.resume import BatchCount, keep_answered
from helm_engine.config import EngineConfig
from helm_engine.recommender import Recommender
from model_executor.checkpoint import load_config, model_version

if TYPE_CHECKING:
    from helm_engine.batch.parquet_input import ParquetInput

Report = Callable[[str, int, int | None], None]
"""Told of progress: what is being done, how far it is, and how far it goes if that is known."""


def run_batch(config: EngineConfig, source: Path, target: Path, report: Report) -> BatchCount:
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
    with _open_input(source, config.limits.max_body_bytes) as batch:
        _require_parquet(target)
        with open_journal(journal_path) as journal:
            version = model_version(config.model_dir)
            lines: Iterator[BatchLine] = refuse_duplicates(
                # With another precision the same lines have other scores.
                batch.lines(f"{version}/{config.executor.dtype}")
            )

            def kept(line: BatchLine) -> None:
                report("reading answers that are there", line.end, batch.size)

            if _is_table(target) and target.exists():
                return _keep_table(target, journal, lines, kept)
            count, unanswered = keep_answered(journal, lines, kept)
            first = next(unanswered, None)
            if first is not None:
                report("loading the model", 0, None)
                recommender = Recommender.from_config(config)
                if recommender.engine.served.version != version:
                    raise ValueError(f"{config.model_dir}: was exchanged while it was read")
                lines = chain([first], unanswered)
                with closing(answer_lines(recommender, lines, _is_table(target))) as answers:
                    for line, output in answers:
                        journal.append(output.encoded)
                        count.add(output.succeeded)
                        report("answering", line.end, batch.size)
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


def _open_input(path: Path, max_body_bytes: int) -> JsonLinesInput | ParquetInput:
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
