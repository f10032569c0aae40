"""What all models share: layers that run over the rows of a step and the pages behind them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from model_executor.attention.backend import AttentionBackend, PairBias
from model_executor.attention.rule import AttentionRule
from model_executor.layers.hstu_layer import Projections
from model_executor.model_config import ModelConfig
from model_executor.page_arena import PagedKV
from model_executor.paged_batch import PagedBatch


class Layer(Protocol):
    """A layer less its attention."""

    def project(self, x: Tensor, picked: Tensor | None = None) -> Projections:
        """Projects rows [T, D]; only the picked ones (int64 [Q]) are queries."""
        ...

    def close(self, x: Tensor, u: Tensor, attended: Tensor) -> Tensor:
        """What follows attention: query rows [Q, D], [Q, ...] and [Q, H, dv] to [Q, D]."""
        ...


class SequenceModel(nn.Module):
    """The dense weights of one model; its large tables live in the page pool."""

    needs_last_row: ClassVar[bool]
    """The history's last row is an output, so it is never taken from the cache."""

    def __init__(self, config: ModelConfig, rule: AttentionRule, layers: list[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.rule = rule
        self.layers = nn.ModuleList(layers)

    @abstractmethod
    def embed(self, rows: Tensor, batch: PagedBatch) -> Tensor:
        """Layer inputs of a step's tokens: float [T, D].

        Args:
            rows: their pool rows, float [T, row_dim]; anything where a token has none.
            batch: which tokens these are.
        """

    def pair_bias(self, batch: PagedBatch) -> Callable[[int], PairBias | None]:
        """What each layer adds to the scores of a step; by default nothing."""
        return lambda layer: None

    def encode(
        self,
        x: Tensor,
        batch: PagedBatch,
        kv: PagedKV,
        attention: AttentionBackend,
        all_rows: bool = False,
    ) -> Tensor:
        """Runs the layers over a step's rows and leaves the context rows' K and V in the pages.

        Args:
            x: layer inputs, float [T, D].
            batch: which rows these are and which pages hold their contexts.
            kv: K and V of the pool, written for the context rows and read for their contexts.
            attention: the backend.
            all_rows: return every row; otherwise the last layer computes what scoring reads.

        Returns:
            Rows after the last layer, float [T, D]; or, without `all_rows`, the last row of each
            sequence if the model needs it, then all candidates.
        """
        bias_of = self.pair_bias(batch)
        written = slice(0, batch.num_context_rows)
        picked: Tensor | None = None
        for index in range(len(self.layers)):
            layer: Layer = self.layers[index]  # type: ignore[assignment]
            if index == len(self.layers) - 1 and not all_rows:
                batch, picked = batch.narrow(self.needs_last_row)
            parts = layer.project(x, picked)
            kv.append(index, parts.k[written], parts.v[written], batch.page_ids, batch.page_offsets)
            attended = attention.attend(
                parts.q, parts.k, parts.v, kv, index, batch, self.rule, bias_of(index)
            )
            x = layer.close(x if picked is None else x[picked], parts.u, attended)
        return x


class RetrievalModel(SequenceModel):
    """Items are scored by their inner product with the history's last row."""

    needs_last_row: ClassVar[bool] = True

    @abstractmethod
    def normalise_user(self, rows: Tensor) -> Tensor:
        """Last rows as they are scored with: [..., D]."""

    @abstractmethod
    def normalise_item(self, rows: Tensor) -> Tensor:
        """Item rows as they are scored with: [..., D]."""


class RankingModel(SequenceModel):
    """Candidates are rows of the sequence, each with one score per task."""

    needs_last_row: ClassVar[bool] = False

    @abstractmethod
    def score(self, encoded: Tensor, rows: Tensor, batch: PagedBatch) -> Tensor:
        """Scores of a step's candidates, float32 [C, tasks].

        Args:
            encoded: candidate rows after the layers, float [C, D].
            rows: their pool rows, float [C, row_dim].
            batch: which tokens these are.
        """


def l2_normalise(rows: Tensor, eps: float) -> Tensor:
    """Rows divided by max(eps, L2 norm): [..., D]."""
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / norm.clamp_min(eps)
