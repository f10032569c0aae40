"""The lines between reading and writing: whose turn it is, and which may be written."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

from helm_engine.batch.lines import BatchLine
from helm_engine.batch.output_lines import OutputLine, output_of
from helm_engine.recommender import Recommender

MAX_LINES = 4096
"""Lines read and not yet written. The further ahead, the more lines of a user meet."""
MAX_BYTES = 64 << 20
"""Bytes of those lines, and of their answers, each; one line more may be there."""


@dataclass(slots=True, eq=False)
class _Place:
    """A line's place in the output."""

    line: BatchLine
    output: OutputLine | None = None


class ReadAhead:
    """Puts the lines of a user together and the answers back in order.

    Of a user one request at most is under way, so that the next one meets its KV. Users begin in
    the order of their first line; one that has begun goes on before another begins.
    """

    def __init__(
        self, lines: Iterator[BatchLine], max_lines: int = MAX_LINES, max_bytes: int = MAX_BYTES
    ) -> None:
        self._unread = lines
        self._max_lines = max_lines
        self._max_bytes = max_bytes
        self._unwritten: deque[_Place] = deque()
        self._line_bytes = 0
        self._output_bytes = 0
        self._of_user: dict[str | BatchLine, deque[_Place]] = {}
        """Lines of each user, the one under way first; a line without a user is its own."""
        self._begun: deque[str | BatchLine] = deque()
        """Users whose line has just ended and who have more."""
        self._new: deque[str | BatchLine] = deque()
        self._under_way: dict[BatchLine, tuple[str | BatchLine, _Place]] = {}

    def next_line(self) -> BatchLine | None:
        """The line to run next; None = there is none before another one has ended."""
        self._read()
        if self._output_bytes >= self._max_bytes:
            # Too much waits to be written: only the line that all wait for may run.
            return self._start_first()
        if self._begun:
            return self._start(self._begun.popleft())
        if self._new:
            return self._start(self._new.popleft())
        return None

    def _read(self) -> None:
        while len(self._unwritten) < self._max_lines and self._line_bytes < self._max_bytes:
            line = next(self._unread, None)
            if line is None:
                return
            place = _Place(line)
            self._unwritten.append(place)
            self._line_bytes += line.num_bytes
            user = line.user or line
            if user in self._of_user:
                self._of_user[user].append(place)
            else:
                self._of_user[user] = deque([place])
                self._new.append(user)

    def _start_first(self) -> BatchLine | None:
        first = self._unwritten[0].line
        user = first.user or first
        for waiting in (self._begun, self._new):
            if user in waiting:
                waiting.remove(user)
                return self._start(user)
        return None

    def _start(self, user: str | BatchLine) -> BatchLine:
        place = self._of_user[user][0]
        self._under_way[place.line] = (user, place)
        return place.line

    def end(self, line: BatchLine, output: OutputLine) -> None:
        """Takes the answer to a line that was under way."""
        user, place = self._under_way.pop(line)
        place.output = output
        self._output_bytes += len(output.encoded)
        waiting = self._of_user[user]
        waiting.popleft()
        if waiting:
            self._begun.append(user)
        else:
            del self._of_user[user]

    def take_next(self) -> Iterator[tuple[BatchLine, OutputLine]]:
        """Takes the lines whose turn it is to be written, with their answers."""
        while self._unwritten and (output := self._unwritten[0].output) is not None:
            line = self._unwritten.popleft().line
            self._line_bytes -= line.num_bytes
            self._output_bytes -= len(output.encoded)
            yield line, output


def answer_lines(
    recommender: Recommender, lines: Iterator[BatchLine], whole: bool = False
) -> Generator[tuple[BatchLine, OutputLine], None, None]:
    """Answers lines; each comes out with its answer, in order, as soon as all before it have.

    Args:
        recommender: the engine.
        lines: in the order in which they are to be answered.
        whole: answers are whole, whatever `fields` of the requests say.
    """
    ahead = ReadAhead(lines)

    def next_request() -> tuple[BatchLine, object] | None:
        line = ahead.next_line()
        if line is None:
            return None
        return line, line.body if line.error is None else line.error

    with closing(recommender.answer_as_ended(next_request)) as answers:
        for line, answer in answers:
            ahead.end(line, output_of(line, answer, whole))
            yield from ahead.take_next()
