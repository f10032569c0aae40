"""A recorded trace as the simulator runs it: the same arrays that are drawn of a workload."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from block_manager.block_hash import BLOCK_HASH_BYTES, BlockHash
from block_manager.refill import RefillConfig
from helm_engine.config import HostTierConfig, SchedulerConfig
from helm_engine.request_trace.file_format import TraceFile, TraceHeader, read_trace_file
from helm_engine.simulator.lineages import Lineages, ids_of
from helm_engine.simulator.scaling import check_scale, coarse_hashes, sampled_rows
from helm_engine.simulator.simulation import EngineModel, FloatArray, Int64Array
from helm_engine.simulator.trace import Trace, cuts
from helm_engine.simulator.workloads import Regime, Setting, Workload, builtin_or_file
from model_executor.capabilities import StepRules
from model_executor.cost_profile import CostProfile, load_cost_profile
from model_executor.step import NO_ROW

_ID_COPIES = BLOCK_HASH_BYTES // 8
"""Blocks are named by so many copies of a hashed id, which is shorter than a hash."""


class Stretch(NamedTuple):
    """A stretch of a recorded trace."""

    name: str
    seconds: float
    kind: int
    """Stretches of one kind are told by the same figures."""


@dataclass(frozen=True, slots=True)
class Recording:
    """Requests in the order in which they came; columns are int64 [n] but for what they say."""

    name: str
    header: TraceHeader
    num_lost: int
    """Requests that the server took and did not record."""
    arrivals: FloatArray
    """Seconds after the first one's, ascending, float64 [n]."""
    users: Int64Array
    """Hashed ids; 0 = none."""
    lineages: Lineages
    lineage_of: Int64Array
    lengths: Int64Array
    """Tokens of each context."""
    num_blocks: Int64Array
    """Reusable ones of each."""
    candidates: list[Int64Array]
    """Rows of each request, numbered by popularity."""
    rows: list[Int64Array]
    """Of the tokens of each lineage, numbered likewise, or NO_ROW."""
    deadlines_ms: FloatArray
    priorities: Int64Array
    statuses: Int64Array
    """Of the answers that the server gave."""
    latencies_ms: FloatArray
    """Of those answers."""

    def __len__(self) -> int:
        """Requests."""
        return len(self.arrivals)

    @property
    def seconds(self) -> float:
        """From the first request to a little after the last."""
        last = float(self.arrivals[-1])
        return last + max(last / len(self), 1e-3)

    def engine(
        self, profile: CostProfile, *, pool_bytes: int | None = None, slo_ms: float | None = None
    ) -> EngineModel:
        """The engine that took the requests, on a device of that profile.

        Args:
            profile: what work costs there.
            pool_bytes: of another pool.
            slo_ms: another service level.
        """
        header = self.header
        setting = Setting(
            name=self.name,
            data="recorded",
            profile=profile.device,
            requests_per_s=len(self) / self.seconds,
            slo_ms=slo_ms or header.slo_ms,
            num_users=max(1, len(np.unique(self.users))),
            num_items=header.num_rows,
            max_history=header.max_context_tokens,
            row_bytes=header.row_bytes,
            kv_bytes_per_token=header.kv_bytes_per_token,
            pool_bytes=pool_bytes or header.pool_bytes,
            block_tokens=header.block_tokens,
        )
        return EngineModel(
            setting,
            profile,
            scheduler=SchedulerConfig(
                max_num_batched_tokens=header.max_num_batched_tokens,
                max_num_seqs=header.max_num_seqs,
                max_num_waiting=header.max_num_waiting,
                max_pages_per_step=header.max_pages_per_step,
                patience_ms=header.patience_ms,
            ),
            refill=_refill(header),
            rules=StepRules(
                chunkable=header.chunkable,
                microbatch_unit=header.microbatch_unit,
                recomputes_last_row=header.recomputes_last_row,
                shortest_context=header.shortest_context,
            ),
        )

    def workload(
        self, setting: Setting, warm_up_s: float = 0.0, stretches: list[Stretch] | None = None
    ) -> Workload:
        """The trace told as regimes: measured, where those of other workloads are laws.

        Args:
            setting: from `engine`.
            warm_up_s: requests of so many first seconds are not counted.
            stretches: of the time behind the warm-up; None = one.
        """
        stretches = stretches or [Stretch("recorded", self.seconds - warm_up_s, 0)]
        ends = warm_up_s + np.cumsum([one.seconds for one in stretches])
        kinds = np.array([one.kind for one in stretches])
        stretch_of = np.searchsorted(ends[:-1], self.arrivals, side="right")
        regimes = []
        for one in stretches:
            mine = kinds[stretch_of] == one.kind
            seconds = sum(each.seconds for each in stretches if each.kind == one.kind)
            seconds += warm_up_s if kinds[0] == one.kind else 0.0
            regimes.append(self._regime(one, mine, seconds, setting))
        return Workload(
            name=self.name,
            description=f"{len(self)} requests recorded in {self.seconds:.0f} s",
            setting=setting,
            warm_up_s=warm_up_s,
            regimes=regimes,
        )

    def _regime(
        self, stretch: Stretch, mine: np.ndarray, seconds: float, setting: Setting
    ) -> Regime:
        """What the requests of a kind of stretch are like."""
        users, number = self.users[mine & (self.users != 0)], max(1, int(mine.sum()))
        visits = np.unique(users, return_counts=True)[1]
        returning = visits[visits > 1]
        candidates = [len(self.candidates[place]) for place in np.flatnonzero(mine)]
        return Regime(
            name=stretch.name,
            seconds=stretch.seconds,
            load=number / seconds / setting.requests_per_s,
            hot_user_share=float(returning.sum()) / number,
            hot_users=max(1, len(returning)),
            history_mean=max(1, round(float(self.lengths[mine].mean()))) if mine.any() else 1,
            new_events=0,
            candidates=round(float(np.mean(candidates))) if candidates else 0,
        )

    def trace(self, workload: Workload, scale: int = 1, which: Int64Array | None = None) -> Trace:
        """The requests, as an engine of that scale needs them.

        Args:
            workload: from `workload`.
            scale: see `scaling`.
            which: numbers of the requests that are wanted, ascending; None = all.
        """
        check_scale(scale)
        which = np.arange(len(self)) if which is None else which
        setting, people = workload.resolved_setting, self.lineage_of[which]
        arrivals, lengths = self.arrivals[which], self.lengths[which]
        tokens = np.array([len(one) for one in self.rows])
        starts = np.concatenate([[0], np.cumsum(tokens)])
        shown = [self.candidates[place] for place in which.tolist()]
        bounds = np.concatenate([[0], np.cumsum([len(one) for one in shown])]).astype(np.int64)
        events, candidates = _joined(self.rows), _joined(shown)
        if scale > 1:
            numbers = np.append(sampled_rows(setting, scale)[0], NO_ROW)  # The last: of NO_ROW.
            events, candidates = (numbers[one].astype(np.int64) for one in (events, candidates))
        most = int(max(tokens.max(initial=0), np.diff(bounds).max(initial=0)))
        ends = np.array(workload.ends)
        return Trace(
            workload=workload,
            setting=setting,
            seed=0,
            scale=scale,
            arrivals=arrivals,
            regimes=np.searchsorted(ends[:-1], arrivals, side="right").astype(np.int64),
            people=people,
            lengths=lengths,
            events=events,
            event_bounds=starts,
            candidates=candidates,
            candidate_bounds=bounds,
            block_hashes=self._block_hashes(scale),
            user_tags=[one.user for one in self.lineages.found],
            _no_features=np.full((most, 1), NO_ROW, dtype=np.int64),
            _cuts=cuts(people, starts[people], lengths, bounds, self.num_blocks[which]),
            deadlines_ms=self.deadlines_ms[which],
            priorities=self.priorities[which],
        )

    def _block_hashes(self, scale: int) -> list[list[BlockHash]]:
        lineages, block_tokens = self.lineages.found, self.header.block_tokens
        if scale == 1:
            return [
                [BlockHash(one * _ID_COPIES) for one in lineage.blocks.view("V8").tolist()]
                for lineage in lineages
            ]
        # Where nothing may be reused, nothing is.
        tokens = np.array([len(one.blocks) * block_tokens for one in lineages], dtype=np.int64)
        names = [number.to_bytes(16, "little") for number in range(len(lineages))]
        hashes = coarse_hashes(tokens, names, block_tokens, scale)
        return [
            found if len(one.blocks) else [] for one, found in zip(lineages, hashes, strict=True)
        ]


def read_recording(path: Path) -> tuple[Recording, list[str]]:
    """Reads a recorded trace.

    Returns:
        It, and what its user should know of it, a sentence each.

    Raises:
        ValueError: it cannot be read, is damaged, or has no request; names file and place.
    """
    file = read_trace_file(path)
    if not file.records:
        raise ValueError(f"{path}: has no request")
    remarks = []
    if file.torn_at is not None:
        remarks.append(
            f"{path}: byte {file.torn_at}: ends within a record; the {len(file.records)} requests "
            "before it are used"
        )
    if file.lost:
        remarks.append(f"{path}: {file.lost} requests could not be recorded and are missing")
    if file.end in ("size", "another engine"):
        why = "the file was full" if file.end == "size" else "another model was served"
        remarks.append(f"{path}: what came later was not recorded, for {why}")
    return _recording(file), remarks


def device_of(recording: Recording, profile: str | None) -> CostProfile:
    """A cost profile by name or file; None = that of the server, if it had one.

    Raises:
        ValueError: it cannot be read, or the server had none.
    """
    if profile is not None:
        return load_cost_profile(builtin_or_file("profiles", profile, "profile"))
    if recording.header.profile is None:
        raise ValueError(
            "profile: the server that recorded the trace had no --cost-profile; --profile says "
            "what work costs"
        )
    return recording.header.profile


def _recording(file: TraceFile) -> Recording:
    header, records = file.header, file.records
    lineages = Lineages(header.block_tokens, header.max_context_tokens)
    candidates = []
    for number, record in enumerate(records):
        try:
            lineages.add(record)
            candidates.append(ids_of(record.candidates, "candidates", 0))
        except ValueError as error:
            raise ValueError(f"{file.path}: request {number}: {error}") from error
    order = np.argsort([one.at for one in records], kind="stable")
    shown = [candidates[place] for place in order.tolist()]
    rows, shown = _numbered([one.rows for one in lineages.found], shown, file)
    arrivals = np.array([one.at for one in records])[order]
    return Recording(
        name=file.path.stem,
        header=header,
        num_lost=file.lost,
        arrivals=arrivals - arrivals[0],
        users=np.array([one.user for one in records], dtype=np.int64)[order],
        lineages=lineages,
        lineage_of=np.array([one.lineage for one in lineages.places])[order],
        lengths=np.array([one.num_tokens for one in records])[order],
        num_blocks=np.array([one.num_blocks for one in lineages.places])[order],
        candidates=shown,
        rows=rows,
        deadlines_ms=np.array(
            [np.inf if one.deadline_ms is None else one.deadline_ms for one in records]
        )[order],
        priorities=np.array([one.priority for one in records])[order],
        statuses=np.array([one.status for one in records])[order],
        latencies_ms=np.array([one.latency_ms for one in records])[order],
    )


def _numbered(
    rows: list[Int64Array], candidates: list[Int64Array], file: TraceFile
) -> tuple[list[Int64Array], list[Int64Array]]:
    """Hashed rows by number, the most popular first, so that a sample has its share of each rank.

    Raises:
        ValueError: they are more than the tables have.
    """
    together = _joined([*rows, *candidates])
    ids, place, counts = np.unique(together, return_inverse=True, return_counts=True)
    absent = int(len(ids) and ids[0] == NO_ROW)
    distinct, most = len(ids) - absent, file.header.num_rows
    if distinct > most:
        raise ValueError(f"{file.path}: has {distinct} different rows, the tables have {most}")
    number = np.full(len(ids), NO_ROW, dtype=np.int64)
    number[np.argsort(-counts[absent:], kind="stable") + absent] = np.arange(distinct)
    ends = np.cumsum([len(one) for one in [*rows, *candidates]])
    parts = np.split(number[place], ends[:-1])
    return parts[: len(rows)], parts[len(rows) :]


def _joined(parts: list[Int64Array]) -> Int64Array:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def _refill(header: TraceHeader) -> RefillConfig:
    return HostTierConfig(
        refill_bytes_per_second=header.refill_bytes_per_second,
        link_bytes_per_second=header.link_bytes_per_second,
    ).refill
