"""Carries out steps on a device: loads rows, runs the layers over the pages, scores."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from block_manager.pool_layout import PoolLayout
from block_manager.row_plan import RowPlan
from model_executor.attention.backend import AttentionBackend
from model_executor.background_refill import BackgroundRefill
from model_executor.device_memory import DeviceMemory
from model_executor.host_store import HOST_NUMBER_BYTES, HostStore
from model_executor.models.heads import RetrievalHead
from model_executor.models.sequence_model import RankingModel, RetrievalModel, SequenceModel
from model_executor.page_arena import PageArena
from model_executor.paged_batch import PagedBatch, build_paged_batch, to_device
from model_executor.row_loader import RowLoader
from model_executor.scaled_rows import ScaledRows
from model_executor.step import (
    NO_ROW,
    CandidateScoring,
    Float32Array,
    Int64Array,
    ModelOutput,
    Retrieval,
    ScheduledRequest,
    SchedulerOutput,
    StepTimings,
)


class PhaseTimer:
    """Milliseconds per phase; on CUDA by events, so that timing adds no synchronisation."""

    def __init__(self, on_cuda: bool) -> None:
        """Starts the first phase."""
        self._cuda = on_cuda
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        """Ends a phase and starts the next one."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def result(self) -> StepTimings:
        """Ends the third phase; the step's timings. On CUDA it waits for the last event."""
        self.mark()
        if self._cuda:
            self._events[-1].synchronize()
            return StepTimings(*(begin.elapsed_time(end) for begin, end in pairwise(self._events)))
        start, loaded, prefilled, scored = self._times
        return StepTimings(
            (loaded - start) * 1e3, (prefilled - loaded) * 1e3, (scored - prefilled) * 1e3
        )


class ModelRunner:
    """The executor that computes."""

    def __init__(
        self,
        model: SequenceModel,
        table: HostStore,
        layout: PoolLayout,
        attention: AttentionBackend,
        device: torch.device,
        max_retrieval_matrix_bytes: int,
        row_codec: ScaledRows | None = None,
        fp8_kv: bool = False,
    ) -> None:
        """Allocates the pool in the weights' dtype, but for what is stored in eight bits.

        There is no retrieval head with `max_retrieval_matrix_bytes` 0, nor for a model that ranks.
        """
        self.model = model
        self._dtype = next(model.parameters()).dtype
        self._device = device
        self._row_codec = row_codec
        self._fp8_kv = fp8_kv
        self.retrieval_head = (
            RetrievalHead(model, table, device, max_retrieval_matrix_bytes)
            if max_retrieval_matrix_bytes and isinstance(model, RetrievalModel)
            else None
        )
        self.loader = RowLoader(table, HOST_NUMBER_BYTES * model.config.row_dim)
        self._attention = attention
        self._on_cuda = device.type == "cuda"
        # Nothing here asks for gradients, so nothing is recorded: to enter torch's inference mode
        # for each step would take longer than it spares.
        model.requires_grad_(False)
        self._take_pool(layout)

    def _take_pool(self, layout: PoolLayout) -> None:
        self._layout = layout
        self.arena = PageArena(
            layout, self.model.config, self._device, self._dtype, self._row_codec, self._fp8_kv
        )
        self._refill = BackgroundRefill(self.loader, self.arena.rows, self._device, self._dtype)

    def replace_pool(self, layout: PoolLayout) -> None:
        """Takes a pool in place of the one before, of which nothing is kept.

        Raises:
            ValueError: the device has no room for it.
        """
        del self.arena, self._refill
        if self._on_cuda:
            torch.cuda.empty_cache()
        self._take_pool(layout)

    def close(self) -> None:
        """Ends the thread that reads refills, after what it reads; no step may follow."""
        self.loader.close()

    @property
    def memory(self) -> DeviceMemory:
        """The ledger of what stays on the device."""
        weights = sum(tensor.nbytes for tensor in self.model.parameters())
        weights += sum(tensor.nbytes for tensor in self.model.buffers())
        if self.retrieval_head is not None:
            weights += self.retrieval_head.matrix.nbytes
        staging = self._layout.staging_bytes
        return DeviceMemory(weights, pages=self.arena.nbytes - staging, staging=staging)

    def execute(self, step: SchedulerOutput) -> ModelOutput:
        """Carries out one step; see `Executor.execute`.

        Candidates of a ranking model run through the layers with the histories, in `prefill`.
        """
        timer = PhaseTimer(self._on_cuda)
        self._prepare_memory(step)
        addresses = self._load_rows(step.rows)
        timer.mark()
        if not step.requests:
            timer.mark()
            return self._ended(step, ModelOutput({}, {}, timer.result()))
        batch = self._batch(step.requests)
        rows = self._token_rows(step.requests, addresses)
        # Cut here, while torch's own code is still in the processor's cache.
        num_candidate_rows = len(rows) - batch.num_context_rows
        _, candidate_rows = torch.split_with_sizes(
            rows, (batch.num_context_rows, num_candidate_rows)
        )
        x = self.model.embed(rows, batch)
        encoded = self.model.encode(x, batch, self.arena.kv, self._attention)
        timer.mark()
        retrieved: dict[str, tuple[Int64Array, Float32Array]] = {}
        if isinstance(self.model, RankingModel):
            scores = self.model.score(encoded, candidate_rows, batch)
        else:
            assert isinstance(self.model, RetrievalModel)
            users = self.model.normalise_user(encoded)
            scores = self._inner_products(self.model, step.requests, users, addresses)
            retrieved = self._retrieve(step.requests, users)
        parts = _by_request(step.requests, scores)
        return self._ended(step, ModelOutput(parts, retrieved, timer.result()))

    def _ended(self, step: SchedulerOutput, output: ModelOutput) -> ModelOutput:
        """Nothing of the step can fail any more: its refill begins, the one before is reported."""
        self._refill.write_landed()
        refilled, failed = self._refill.take_ended()
        if step.refill is not None:
            self._refill.begin(step.refill)
        if refilled is None and failed is None:
            return output
        return replace(output, refilled=refilled, refill_failed=failed)

    def encode(self, step: SchedulerOutput) -> Tensor:
        """Loads a step's rows and runs its layers, as `execute` does, and scores nothing.

        Returns:
            Every row of the step after the last layer, context rows of all requests first, then
            all candidates that are rows: float [T, D].
        """
        self._prepare_memory(step)
        addresses = self._load_rows(step.rows)
        batch = self._batch(step.requests)
        x = self.model.embed(self._token_rows(step.requests, addresses), batch)
        return self.model.encode(x, batch, self.arena.kv, self._attention, all_rows=True)

    def _prepare_memory(self, step: SchedulerOutput) -> None:
        """Moves rows whose page leaves, poisons what died, writes what a refill brought."""
        if len(step.moves):
            self.arena.rows.move(
                to_device(step.moves.sources, self._device),
                to_device(step.moves.destinations, self._device),
            )
        if step.dead_blocks:
            self.arena.poison_pages(torch.tensor(step.dead_blocks, device=self._device))
        if len(step.dead_slots):
            self.arena.rows.poison(to_device(step.dead_slots, self._device))
        self._refill.write_landed()

    def _load_rows(self, plan: RowPlan) -> Int64Array:
        """Copies the missing rows to the device; returns the address of every row of the plan."""
        admitted, staged = plan.admitted, plan.staged
        if len(admitted) or len(staged):
            # One read, and one round trip, for both.
            rows = self._fetch(plan.row_ids[np.concatenate([admitted, staged])])
            slots, places = plan.slots[admitted], plan.staging[staged]
            self.arena.rows.write(to_device(slots, self._device), rows[: len(slots)])
            self.arena.write_staging(to_device(places, self._device), rows[len(slots) :])
        return self.arena.addresses(plan.slots, plan.staging)

    def _fetch(self, row_ids: Int64Array) -> Tensor:
        """Rows of the host tier on the device, float [n, row_dim]."""
        return torch.from_numpy(self.loader.load(row_ids)).to(self._device, self._dtype)

    def _batch(self, requests: tuple[ScheduledRequest, ...]) -> PagedBatch:
        in_sequence = isinstance(self.model, RankingModel)
        return build_paged_batch(requests, self._layout.block_tokens, self._device, in_sequence)

    def _token_rows(self, requests: tuple[ScheduledRequest, ...], addresses: Int64Array) -> Tensor:
        """Pool rows of the step's tokens, zeros where a token has none: float [T, row_dim]."""
        index = [request.row_index for request in requests]
        if isinstance(self.model, RankingModel):
            index += [task.row_index for _, task in _scorings(requests)]
        row_index = np.concatenate(index)
        has_row = row_index != NO_ROW
        if has_row.all():
            return self.arena.read_rows(to_device(addresses[row_index], self._device))
        rows = torch.zeros(
            len(row_index), self.model.config.row_dim, dtype=self._dtype, device=self._device
        )
        places = to_device(addresses[row_index[has_row]], self._device)
        rows[to_device(has_row, self._device)] = self.arena.read_rows(places)
        return rows

    def _inner_products(
        self,
        model: RetrievalModel,
        requests: tuple[ScheduledRequest, ...],
        users: Tensor,
        addresses: Int64Array,
    ) -> Tensor:
        """Products of each user's last row and its candidates' pool rows: float32 [C, 1]."""
        found = _scorings(requests)
        if not found:
            return torch.empty(0, 1)
        rows = np.concatenate([task.row_index for _, task in found])
        places = to_device(addresses[rows], self._device)
        items = model.normalise_item(self.arena.read_rows(places))
        owners = np.repeat(
            [place for place, _ in found], [len(task.row_index) for _, task in found]
        )
        products = items * users[to_device(owners, self._device)]
        return products.float().sum(dim=-1, keepdim=True)

    def _retrieve(
        self, requests: tuple[ScheduledRequest, ...], users: Tensor
    ) -> dict[str, tuple[Int64Array, Float32Array]]:
        found = [
            (place, request.request_id, request.task)
            for place, request in enumerate(requests)
            if isinstance(request.task, Retrieval)
        ]
        if not found:
            return {}
        if self.retrieval_head is None:
            raise RuntimeError("a retrieval was scheduled on an engine without a retrieval head")
        places = np.array([place for place, _, _ in found])
        askers = users[to_device(places, self._device)]
        results = self.retrieval_head.retrieve(askers, [task for _, _, task in found])
        return {request_id: best for (_, request_id, _), best in zip(found, results, strict=True)}


def _scorings(
    requests: tuple[ScheduledRequest, ...],
) -> list[tuple[int, CandidateScoring]]:
    """The requests that score candidates, by their place in the step."""
    return [
        (place, request.task)
        for place, request in enumerate(requests)
        if isinstance(request.task, CandidateScoring)
    ]


def _by_request(requests: tuple[ScheduledRequest, ...], scores: Tensor) -> dict[str, Float32Array]:
    """Splits a step's scores [C, tasks] among its requests."""
    on_host, parts, first = scores.cpu().numpy(), {}, 0
    for request in requests:
        if isinstance(request.task, CandidateScoring):
            end = first + request.num_candidates
            parts[request.request_id] = on_host[first:end]
            first = end
    return parts
