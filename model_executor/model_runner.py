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
from model_executor.attention.padded import TorchPaddedAttention
from model_executor.background_refill import BackgroundRefill
from model_executor.device_link import device_link
from model_executor.device_memory import DeviceMemory
from model_executor.host_store import HOST_NUMBER_BYTES, HostStore
from model_executor.models.heads import RetrievalHead, Search
from model_executor.models.sequence_model import RankingModel, RetrievalModel, SequenceModel
from model_executor.page_arena import PageArena
from model_executor.paged_batch import PagedBatch, begin_to_host, build_paged_batch, to_device
from model_executor.row_loader import RowLoader
from model_executor.scaled_rows import ScaledRows
from model_executor.step import (
    CandidateScoring,
    Float32Array,
    Int64Array,
    ModelOutput,
    Retrieval,
    ScheduledRequest,
    SchedulerOutput,
    StepTimings,
)
from model_executor.step_graphs import GraphCapture, StepGraphs, usual_buckets


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
        self.loader = RowLoader(
            table,
            HOST_NUMBER_BYTES * model.config.row_dim,
            device_link(device, model.config.row_dim),
        )
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
        self.graphs: StepGraphs | None = None
        """Captured steps; they hold addresses of the pool, and go with it."""

    def capture_graphs(self, capture: GraphCapture, max_tokens: int) -> None:
        """Captures steps of the usual shapes; the pool must hold nothing yet.

        Args:
            capture: of the device.
            max_tokens: of a step.

        Raises:
            RuntimeError: the device has no room for them.
        """
        attention, tokens = TorchPaddedAttention(), self._layout.block_tokens
        buckets = usual_buckets(self.model, attention, tokens, max_tokens)
        if buckets:
            self.graphs = StepGraphs(self.model, self.arena.kv, attention, capture, buckets)

    def replace_pool(self, layout: PoolLayout) -> None:
        """Takes a pool in place of the one before, of which nothing is kept.

        Raises:
            ValueError: the device has no room for it.
        """
        del self.arena, self._refill, self.graphs
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
        return DeviceMemory(
            weights,
            pages=self.arena.nbytes - staging,
            staging=staging + self.loader.device_bytes,
            graphs=0 if self.graphs is None else self.graphs.nbytes,
        )

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
        encoded = self._encode(step.requests, x, batch)
        timer.mark()
        search: Search | None = None
        if isinstance(self.model, RankingModel):
            scores = self.model.score(encoded, candidate_rows, batch)
        else:
            assert isinstance(self.model, RetrievalModel)
            users = self.model.normalise_user(encoded)
            scores = self._inner_products(self.model, step.requests, users, addresses)
            search = self._search(step.requests, users)
        on_host = begin_to_host(scores)
        # The one wait of a step; what is read from here on has come.
        timings = timer.result()
        parts = _by_request(step.requests, on_host)
        retrieved = _retrieved(step.requests, search)
        return self._ended(step, ModelOutput(parts, retrieved, timings))

    def _encode(
        self, requests: tuple[ScheduledRequest, ...], x: Tensor, batch: PagedBatch
    ) -> Tensor:
        """Runs the layers: by a graph where the step's shape has one."""
        bucket = None if self.graphs is None else self.graphs.find(requests)
        if self.graphs is None or bucket is None:
            return self.model.encode(x, batch, self.arena.kv, self._attention)
        return self.graphs.encode(bucket, x, requests)

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
            self.arena.poison_pages(to_device(np.array(step.dead_blocks), self._device))
        if len(step.dead_slots):
            self.arena.rows.poison(to_device(step.dead_slots, self._device))
        self._refill.write_landed()

    def _load_rows(self, plan: RowPlan) -> Int64Array:
        """Copies the missing rows to the device; returns the address of every row of the plan."""
        addresses = self.arena.addresses(plan.slots, plan.staging)
        admitted, staged = plan.admitted, plan.staged
        if len(admitted) or len(staged):
            # One read, and one round trip, for both.
            missing = np.concatenate([admitted, staged])
            slots, places = plan.slots[admitted], plan.staging[staged]

            def land(first: int, rows: Tensor) -> None:
                """A chunk of them; those with a slot come before those in staging."""
                end = first + len(rows)
                self.arena.access.land(
                    addresses[missing[first:end]],
                    slots[first:end],
                    places[max(0, first - len(slots)) : max(0, end - len(slots))],
                    rows,
                )

            self.loader.load(plan.row_ids[missing], land)
        return addresses

    def _batch(self, requests: tuple[ScheduledRequest, ...]) -> PagedBatch:
        in_sequence = isinstance(self.model, RankingModel)
        return build_paged_batch(requests, self._layout.block_tokens, self._device, in_sequence)

    def _token_rows(self, requests: tuple[ScheduledRequest, ...], addresses: Int64Array) -> Tensor:
        """Pool rows of the step's tokens, zeros where a token has none: float [T, row_dim]."""
        index = [request.row_index for request in requests]
        if isinstance(self.model, RankingModel):
            index += [task.row_index for _, task in _scorings(requests)]
        return self.arena.access.gather(addresses, np.concatenate(index))

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
        items = model.normalise_item(self.arena.access.gather(addresses, rows))
        owners = np.repeat(
            [place for place, _ in found], [len(task.row_index) for _, task in found]
        )
        products = items * users[to_device(owners, self._device)]
        return products.float().sum(dim=-1, keepdim=True)

    def _search(self, requests: tuple[ScheduledRequest, ...], users: Tensor) -> Search | None:
        tasks = [one.task for one in requests if isinstance(one.task, Retrieval)]
        if not tasks:
            return None
        if self.retrieval_head is None:
            raise RuntimeError("a retrieval was scheduled on an engine without a retrieval head")
        places = np.array(
            [place for place, one in enumerate(requests) if isinstance(one.task, Retrieval)]
        )
        return self.retrieval_head.search(users[to_device(places, self._device)], tasks)


def _scorings(
    requests: tuple[ScheduledRequest, ...],
) -> list[tuple[int, CandidateScoring]]:
    """The requests that score candidates, by their place in the step."""
    return [
        (place, request.task)
        for place, request in enumerate(requests)
        if isinstance(request.task, CandidateScoring)
    ]


def _by_request(requests: tuple[ScheduledRequest, ...], on_host: Tensor) -> dict[str, Float32Array]:
    """Splits a step's scores [C, tasks], on the host, among its requests."""
    scores, parts, first = on_host.numpy(), {}, 0
    for request in requests:
        if isinstance(request.task, CandidateScoring):
            end = first + request.num_candidates
            parts[request.request_id] = scores[first:end]
            first = end
    return parts


def _retrieved(
    requests: tuple[ScheduledRequest, ...], search: Search | None
) -> dict[str, tuple[Int64Array, Float32Array]]:
    """What a search found, by request."""
    if search is None:
        return {}
    asked = [one.request_id for one in requests if isinstance(one.task, Retrieval)]
    return dict(zip(asked, search.results(), strict=True))
