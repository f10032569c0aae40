"""CUDA graphs of steps whose shapes repeat: captured once per bucket, replayed over its inputs.

A graph holds addresses. Those of weights, pages and inputs never change: a page changes hands by
metadata only, which comes in through the block tables of the inputs, so that no move of the
boundary invalidates a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model_executor.attention.padded import PaddedAttention
from model_executor.models.sequence_model import SequenceModel
from model_executor.padded_step import PaddedInputs, StepBucket, encode_padded
from model_executor.page_arena import PagedKV
from model_executor.paged_batch import to_device
from model_executor.step import ScheduledRequest

Replay = Callable[[], Tensor]
"""Does the captured work again; its result is overwritten by the next replay of any graph."""

NEW_ROWS = 32
"""What a returning user brings: rows behind the last full block, and some new events. More are
computed eagerly."""
SEQUENCES = (1, 4)
CANDIDATES = (64, 512)
CONTEXT_SHARES = (16, 4, 1)
"""Buckets reach to these parts of the longest context."""


class GraphCapture(Protocol):
    """Records work on a device."""

    def capture(self, work: Callable[[], Tensor]) -> Replay:
        """Does work and records it; all that it reads stays where it is."""
        ...

    @property
    def nbytes(self) -> int:
        """What the graphs keep on the device, their inputs apart."""
        ...


class CudaGraphCapture:
    """Graphs of one device; they share their memory, for one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self.nbytes = 0

    def capture(self, work: Callable[[], Tensor]) -> Replay:
        """See `GraphCapture.capture`."""
        with torch.cuda.device(self._device):
            # Libraries set themselves up on first use, which must not be recorded.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    work()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            # Else memory that lies idle now would be taken for the graph's.
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                result = work()
            torch.cuda.synchronize()
            self.nbytes += max(0, torch.cuda.memory_reserved() - before)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class _Graph(NamedTuple):
    inputs: PaddedInputs
    replay: Replay


class StepGraphs:
    """The captured graphs of one model over one pool."""

    def __init__(
        self,
        model: SequenceModel,
        kv: PagedKV,
        attention: PaddedAttention,
        capture: GraphCapture,
        buckets: Sequence[StepBucket],
    ) -> None:
        """Captures every bucket; the pages are written to, and must hold nothing yet.

        Raises:
            RuntimeError: the device has no room for them.
        """
        self._in_sequence = model.config.candidates_in_sequence
        self._needs_last_row = model.needs_last_row
        self._capture = capture
        self._graphs: dict[StepBucket, _Graph] = {}
        block_tokens = kv.k.shape[2]
        like = next(model.parameters())
        # Largest first: the smaller ones then find their memory in what the pool has already.
        for bucket in sorted(buckets, key=_work, reverse=True):
            inputs = PaddedInputs(
                bucket, model.config.embedding_dim, block_tokens, like, self._in_sequence
            )
            replay = capture.capture(partial(encode_padded, model, inputs, kv, attention))
            self._graphs[bucket] = _Graph(inputs, replay)
        self._by_work = sorted(self._graphs, key=_work)

    @property
    def nbytes(self) -> int:
        """Bytes that they keep on the device."""
        inputs = sum(graph.inputs.nbytes for graph in self._graphs.values())
        return self._capture.nbytes + inputs

    def find(self, requests: Sequence[ScheduledRequest]) -> StepBucket | None:
        """The smallest bucket that a step fits; None = it is to be computed eagerly."""
        fitting = (one for one in self._by_work if one.fits(requests, self._in_sequence))
        return next(fitting, None)

    def encode(self, bucket: StepBucket, x: Tensor, requests: Sequence[ScheduledRequest]) -> Tensor:
        """What `SequenceModel.encode` returns for a step that fits the bucket."""
        graph = self._graphs[bucket]
        picked = graph.inputs.fill(x, requests)
        encoded = graph.replay()
        if not self._needs_last_row:
            picked = picked[len(picked) - sum(one.num_candidates for one in requests) :]
        return encoded.index_select(0, to_device(picked, encoded.device))


def _work(bucket: StepBucket) -> int:
    return bucket.num_tokens * (bucket.blocks + bucket.candidates)


def usual_buckets(
    model: SequenceModel, attention: PaddedAttention, block_tokens: int, max_tokens: int
) -> list[StepBucket]:
    """Shapes worth a graph: returning users, whose histories are cached but for a few events.

    None for a model with pair bias, which depends on the host's features of a step.

    Args:
        model: the model.
        attention: what is to be captured.
        block_tokens: rows of a block.
        max_tokens: of a step.
    """
    if type(model).pair_bias is not SequenceModel.pair_bias:
        return []
    config = model.config
    longest = -(-config.max_context_tokens // block_tokens)
    blocks = sorted({max(1, -(-longest // share)) for share in CONTEXT_SHARES})
    found: Iterator[StepBucket]
    if config.candidates_in_sequence:
        numbers = product(SEQUENCES, (0, NEW_ROWS), CANDIDATES, blocks)
        found = (StepBucket(*one) for one in numbers)
    else:
        found = (StepBucket(*one) for one in product(SEQUENCES, (1, NEW_ROWS), (0,), blocks))
    return [
        one
        for one in found
        if one.num_tokens <= max_tokens and attention.takes(one, block_tokens, config.num_heads)
    ]
