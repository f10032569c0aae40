"""A link of stated round trip and bandwidth in front of a server of this machine; its own process.

A chunk of bytes comes out half a round trip after its turn: `bytes / bandwidth` after the chunk
before it in the same direction, whichever connection that was of. The stated figures are lower
bounds: a busy machine adds to them. Cut, the link carries nothing and says nothing, as a pulled
cable does; restored, it goes on with what it held.

    python benchmarks/slow_link.py PORT --round-trip-ms 2 --bytes-per-second 1e8
"""

from __future__ import annotations

import argparse
import asyncio
import selectors
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

_CHUNK_BYTES = 16 << 10
"""What takes its turn at once: small, so that connections share the link fairly."""
_CHUNKS_IN_FLIGHT = 4096
"""Of one connection and direction, likewise."""
_MOST_AHEAD_S = 0.02
"""The link takes in what it can carry in this time; the rest waits in the sender's socket."""
_STOP_SECONDS = 10


class _Direction:
    """One way of the link; all connections share its bandwidth."""

    def __init__(self, delay_s: float, bytes_per_s: float, whole: asyncio.Event) -> None:
        self._delay_s = delay_s
        self._bytes_per_s = bytes_per_s
        self._whole = whole
        self._free_at = 0.0

    async def carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        """Carries a connection's bytes until its end, which it carries too."""
        flying: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_CHUNKS_IN_FLIGHT)
        delivery = asyncio.create_task(self._deliver(flying, target))
        loop = asyncio.get_running_loop()
        try:
            while chunk := await source.read(_CHUNK_BYTES):
                await self._whole.wait()
                self._free_at = max(self._free_at, loop.time()) + len(chunk) / self._bytes_per_s
                await flying.put((self._free_at + self._delay_s, chunk))
                ahead = self._free_at - loop.time()
                if ahead > _MOST_AHEAD_S:
                    await asyncio.sleep(ahead - _MOST_AHEAD_S)
            await flying.put((loop.time() + self._delay_s, b""))
            await delivery
        finally:
            delivery.cancel()

    async def _deliver(
        self, flying: asyncio.Queue[tuple[float, bytes]], target: asyncio.StreamWriter
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, chunk = await flying.get()
            # `asyncio` may wake a timer early by the resolution of its clock.
            while (early := due - loop.time()) > 0:
                await asyncio.sleep(early)
            await self._whole.wait()
            if not chunk:
                target.write_eof()
                return
            target.write(chunk)
            await target.drain()


async def run(target_port: int, round_trip_s: float, bytes_per_s: float) -> None:
    """Serves until standard input ends; `cut` and `restore` are its lines, each is answered."""
    whole = asyncio.Event()
    whole.set()
    there, back = (_Direction(round_trip_s / 2, bytes_per_s, whole) for _ in range(2))
    connections: set[asyncio.Task[None]] = set()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            target_reader, target_writer = await asyncio.open_connection("127.0.0.1", target_port)
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(there.carry(reader, target_writer))
                    both.create_task(back.carry(target_reader, writer))
            finally:
                target_writer.close()
        except* (OSError, asyncio.CancelledError):
            pass  # Either end went away, or the link is to end: whoever is left is told below.
        finally:
            writer.close()
            connections.discard(task)

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        (whole.clear if line.strip() == "cut" else whole.set)()
        print(line.strip(), flush=True)
    server.close()
    for task in connections:
        task.cancel()
    await asyncio.gather(*connections, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class SlowLink:
    """A link that runs."""

    port: int
    """Where the server behind it is reached through it."""
    _process: subprocess.Popen[str]

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def cut(self) -> None:
        """Nothing passes from now on."""
        self._say("cut")

    def restore(self) -> None:
        """What was held and what comes passes again."""
        self._say("restore")

    def _say(self, command: str) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        if self._process.stdout.readline().strip() != command:
            raise RuntimeError("the link has ended")


@contextmanager
def slow_link(
    target_port: int, round_trip_ms: float = 0.0, bytes_per_second: float = float("inf")
) -> Iterator[SlowLink]:
    """A link to a port of this machine.

    Args:
        target_port: of the server behind it.
        round_trip_ms: a byte there and one back take so long at least.
        bytes_per_second: each way, for all connections together.

    Raises:
        RuntimeError: it did not start.
    """
    flags = ["--round-trip-ms", str(round_trip_ms), "--bytes-per-second", str(bytes_per_second)]
    process = subprocess.Popen(
        [sys.executable, __file__, str(target_port), *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        if not port:
            raise RuntimeError("the link did not start")
        yield SlowLink(int(port), process)
    finally:
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("port", type=int, help="of the server behind the link")
    parser.add_argument("--round-trip-ms", type=float, default=0.0)
    parser.add_argument("--bytes-per-second", type=float, default=float("inf"), help="each way")
    arguments = parser.parse_args()
    if not (arguments.round_trip_ms >= 0.0 and arguments.bytes_per_second > 0.0):
        parser.error("the round trip must be at least 0, the bandwidth above 0")
    # `select` keeps time to the microsecond; what asyncio takes by default, to the millisecond.
    with asyncio.Runner(
        loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())
    ) as runner:
        runner.run(run(arguments.port, arguments.round_trip_ms / 1e3, arguments.bytes_per_second))


if __name__ == "__main__":
    main()
