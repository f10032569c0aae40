"""Drawn requests in a file, as a server would have recorded them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from helm_engine.request_trace.encoder import Taken, TraceEncoder
from helm_engine.request_trace.file_format import MAGIC, TraceEnd, TraceHeader, framed
from helm_engine.simulator.trace import RULES, Trace
from tests.simulator.small import PROFILE


def header(trace: Trace, **changes: Any) -> TraceHeader:
    """Of the engine that a simulation would give the requests."""
    setting = trace.setting
    return msgspec.structs.replace(
        TraceHeader(
            engine_version="0",
            pool_bytes=setting.pool_bytes,
            emb_fraction=0.5,
            block_tokens=setting.block_tokens,
            row_bytes=setting.row_bytes,
            kv_bytes_per_token=setting.kv_bytes_per_token,
            num_rows=setting.num_items,
            max_context_tokens=setting.max_history,
            max_num_batched_tokens=2048,
            max_num_seqs=64,
            max_num_waiting=1024,
            max_pages_per_step=None,
            patience_ms=1000.0,
            chunkable=RULES.chunkable,
            microbatch_unit=RULES.microbatch_unit,
            recomputes_last_row=RULES.recomputes_last_row,
            shortest_context=RULES.shortest_context,
            refill_bytes_per_second=0,
            link_bytes_per_second=None,
            slo_ms=setting.slo_ms,
            controller=None,
            profile=PROFILE,
        ),
        **changes,
    )


def payloads(trace: Trace, which: Sequence[int] | None = None) -> list[bytes]:
    """Of the requests' records."""
    encoder = TraceEncoder(trace.setting.block_tokens)
    found = []
    for number in range(len(trace)) if which is None else which:
        request = trace.request(number)
        found.append(encoder.encode(Taken(request, request.arrival, 200, 1.0)))
    return found


def write_recording(path: Path, trace: Trace, **changes: Any) -> Path:
    """Writes all requests; `changes` are of the header."""
    frames = [msgspec.msgpack.encode(header(trace, **changes)), *payloads(trace)]
    frames.append(msgspec.msgpack.encode(TraceEnd("stopped")))
    path.write_bytes(MAGIC + b"".join(map(framed, frames)))
    return path
