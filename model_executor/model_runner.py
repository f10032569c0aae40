"""Carries out steps on a device: loads rows, runs the layers over the pages, scores."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from block_manager.embedding_cache import NOWHERE, RowPlan
from block_manager.pool_layout import PoolLayout
from model_executor.attention.backend import AttentionBackend
from model_executor.host_store import HostStore
from model_executor.memory_ledger import DeviceMemory
from model_executor.models.heads import RetrievalHead
from model_executor.models.hstu import HSTU
from model_executor.page_arena import PageArena
from model_executor.paged_batch import build_paged_batch, to_device
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

Phase = Literal["load", "prefill", "score"]


class PhaseTimer:
    """Milliseconds per phase; on CUDA by events, so that timing adds no synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: dict[Phase, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        self._ms: dict[Phase, float] = {"load": 0.0, "prefill": 0.0, "score": 0.0}

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Times the body as one phase."""
        if self._cuda:
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._marks[name] = (begin, end)
        else:
            started = time.perf_counter()
            yield
            self._ms[name] = (time.perf_counter() - started) * 1e3

    def result(self) -> StepTimings:
        """The step's timings; on CUDA it waits for the last event."""
        for name, (begin, end) in self._marks.items():
            end.synchronize()
            self._ms[name] = begin.elapsed_time(end)
        return StepTimings(self._ms["load"], self._ms["prefill"], self._ms["score"])


class ModelRunner:
    """The executor that computes."""

    def __init__(
        self,
        model: HSTU,
        table: HostStore,
        layout: PoolLayout,
        attention: AttentionBackend,
        device: torch.device,
        max_retrieval_matrix_bytes: int,
    ) -> None:
        """Allocates the pool; with `max_retrieval_matrix_bytes` 0 there is no retrieval head."""
        self.model = model
        self.arena = PageArena(layout, model.config, device)
        self.retrieval_head = (
            RetrievalHead(model, table, device, max_retrieval_matrix_bytes)
            if max_retrieval_matrix_bytes
            else None
        )
        self._table = table
        self._layout = layout
        self._attention = attention
        self._device = device

    @property
    def memory(self) -> DeviceMemory:
        """The ledger of what stays on the device."""
        weights = sum(tensor.nbytes for tensor in self.model.parameters())
        weights += sum(tensor.nbytes for tensor in self.model.buffers())
        if self.retrieval_head is not None:
            weights += self.retrieval_head.matrix.nbytes
        staging = self._layout.staging_bytes
        return DeviceMemory(weights, pages=self.arena.nbytes - staging, staging=staging)

    @torch.inference_mode()
    def execute(self, step: SchedulerOutput) -> ModelOutput:
        """Carries out one step; see `Executor.execute`."""
        timer = PhaseTimer(self._device)
        with timer.phase("load"):
            self._poison(step)
            addresses = self._load_rows(step.rows)
        with timer.phase("prefill"):
            hidden = self._encode(step.requests, addresses)
            ends = np.cumsum([request.num_rows for request in step.requests]) - 1
            users = self.model.normalise(hidden[to_device(ends, self._device)])
        with timer.phase("score"):
            scores = self._score_candidates(step.requests, users, addresses)
            retrieved = self._retrieve(step.requests, users)
        return ModelOutput(scores, retrieved, timer.result())

    @torch.inference_mode()
    def encode(self, step: SchedulerOutput) -> Tensor:
        """Loads a step's rows and runs its layers, as `execute` does, and scores nothing.

        Returns:
            Every history row of the step after the last layer and the output norm, in the order
            scheduled: float [T, D].
        """
        self._poison(step)
        return self.model.normalise(self._encode(step.requests, self._load_rows(step.rows)))

    def _poison(self, step: SchedulerOutput) -> None:
        if step.dead_blocks:
            self.arena.poison_pages(torch.tensor(step.dead_blocks, device=self._device))
        if len(step.dead_slots):
            self.arena.poison_slots(to_device(step.dead_slots, self._device))

    def _load_rows(self, plan: RowPlan) -> Tensor:
        """Copies the missing rows to the device; returns the address of every row of the plan."""
        slots = to_device(plan.slots, self._device)
        staging = to_device(plan.staging, self._device)
        addresses = torch.where(
            slots != NOWHERE,
            self.arena.slot_addresses(slots),
            self.arena.staging_addresses(staging),
        )
        admitted = np.flatnonzero(~plan.resident & (plan.slots != NOWHERE))
        staged = np.flatnonzero(plan.staging != NOWHERE)
        if len(admitted):
            self.arena.write_slots(
                to_device(plan.slots[admitted], self._device),
                self._fetch(plan.row_ids[admitted]),
            )
        if len(staged):
            self.arena.write_staging(
                to_device(plan.staging[staged], self._device), self._fetch(plan.row_ids[staged])
            )
        return addresses

    def _fetch(self, row_ids: Int64Array) -> Tensor:
        """Rows of the host tier on the device, float [n, D]."""
        return torch.from_numpy(self._table.read_rows(row_ids)).to(self._device)

    def _encode(self, requests: tuple[ScheduledRequest, ...], addresses: Tensor) -> Tensor:
        """Runs the step's history rows: float [T, D]."""
        row_index = np.concatenate([request.row_index for request in requests])
        rows = self.arena.read_rows(addresses[to_device(row_index, self._device)])
        batch = build_paged_batch(requests, self._layout.block_tokens, self._device)
        x = self.model.embed(rows, batch.positions)
        return self.model.encode(x, batch, self.arena.kv, self._attention)

    def _score_candidates(
        self, requests: tuple[ScheduledRequest, ...], users: Tensor, addresses: Tensor
    ) -> dict[str, Float32Array]:
        """Dot products of each user's last row and its candidates' normalised pool rows."""
        tasks = [
            (place, request.request_id, request.task.row_index)
            for place, request in enumerate(requests)
            if isinstance(request.task, CandidateScoring)
        ]
        if not tasks:
            return {}
        lengths = [len(row_index) for _, _, row_index in tasks]
        rows = to_device(np.concatenate([row_index for _, _, row_index in tasks]), self._device)
        items = self.model.normalise(self.arena.read_rows(addresses[rows]))
        owners = np.repeat([place for place, _, _ in tasks], lengths)
        scores = (items * users[to_device(owners, self._device)]).sum(dim=-1).cpu().numpy()
        parts = np.split(scores, np.cumsum(lengths)[:-1])
        return {request_id: part for (_, request_id, _), part in zip(tasks, parts, strict=True)}

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
