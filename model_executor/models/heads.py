"""Scoring heads: whole-catalogue retrieval by inner product."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model_executor.exceptions import ModelDirectoryError
from model_executor.host_store import HostStore
from model_executor.models.sequence_model import RetrievalModel
from model_executor.step import Float32Array, Int64Array, Retrieval

_BUILD_CHUNK_ROWS = 65_536
SCORES_PER_PASS = 1 << 24
"""Scores of one product at most (64 MiB of fp32): users are taken in groups."""


class RetrievalHead:
    """Scores users against every item.

    Its normalised item matrix is the one copy of a table outside the pool: a weight, counted as
    such, and read only here. Histories and explicit candidates always come from the pool.
    """

    def __init__(
        self, model: RetrievalModel, table: HostStore, device: torch.device, max_bytes: int
    ) -> None:
        """Builds the matrix chunk by chunk from the host tier.

        Raises:
            ModelDirectoryError: the matrix would take more than `max_bytes`, or a row of the
                table holds a value that is not finite.
        """
        config = model.config
        dtype = next(model.parameters()).dtype
        needed = config.num_items * config.embedding_dim * dtype.itemsize
        if needed > max_bytes:
            raise ModelDirectoryError(
                f"max_retrieval_matrix_bytes: retrieval over {config.num_items} items needs "
                f"{needed} bytes, the limit is {max_bytes}; raise it, or set it to 0 to serve "
                "candidate scoring alone"
            )
        shape = (config.num_items, config.embedding_dim)
        self.matrix = torch.empty(shape, dtype=dtype, device=device)
        for first in range(0, config.num_items, _BUILD_CHUNK_ROWS):
            last = min(first + _BUILD_CHUNK_ROWS, config.num_items)
            # Item ids start at 1: row 0 of the table is padding.
            rows = table.read_rows(np.arange(first + 1, last + 1))
            broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            if len(broken):
                raise ModelDirectoryError(
                    f"item table: row {first + 1 + broken[0]} holds values that are not finite"
                )
            self.matrix[first:last] = model.normalise_item(torch.from_numpy(rows).to(device, dtype))

    def retrieve(
        self, users: Tensor, tasks: list[Retrieval]
    ) -> list[tuple[Int64Array, Float32Array]]:
        """Best items of each user, best first.

        Args:
            users: normalised last rows, float [B, D].
            tasks: what each user wants, B of them.

        Returns:
            For each user item ids, int64 [k], and scores, float32 [k]; k is smaller than asked
            for when the catalogue less the excluded items is.
        """
        group = max(1, SCORES_PER_PASS // len(self.matrix))
        results = []
        for first in range(0, len(tasks), group):
            scores = (users[first : first + group] @ self.matrix.T).float()
            for row, task in zip(scores, tasks[first : first + group], strict=True):
                results.append(self._best(row, task))
        return results

    def _best(self, scores: Tensor, task: Retrieval) -> tuple[Int64Array, Float32Array]:
        excluded = torch.from_numpy(task.excluded_ids - 1).to(scores.device)
        scores.index_fill_(0, excluded, -torch.inf)
        k = min(task.top_k, len(scores) - len(task.excluded_ids))
        if k <= 0:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        # All items that tie with the k-th, since topk picks among them as it pleases.
        # `~(a < b)` keeps NaN, so that NaN scores are reported and not dropped.
        indices = torch.nonzero(~(scores < scores.topk(k).values[-1])).squeeze(1)
        item_ids = indices.cpu().numpy() + 1
        best = scores[indices].cpu().numpy()
        order = np.lexsort((item_ids, -best))[:k]
        return item_ids[order], best[order]
