"""Scoring heads: whole-catalogue retrieval by inner product."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model_executor.exceptions import ModelDirectoryError
from model_executor.host_store import HostStore
from model_executor.models.sequence_model import RetrievalModel
from model_executor.paged_batch import begin_to_host, to_device
from model_executor.step import Float32Array, Int64Array, Retrieval

_BUILD_CHUNK_ROWS = 65_536
SCORES_PER_PASS = 1 << 24
"""Scores of one product at most (64 MiB of fp32): users are taken in groups."""
_TIES = 32
"""Items beyond those asked for, to see whether the last ones tie with others."""


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

    def search(self, users: Tensor, tasks: list[Retrieval]) -> Search:
        """Scores users against all items, and begins to copy their best ones to the host.

        Args:
            users: normalised last rows, float [B, D].
            tasks: what each user wants, B of them.
        """
        group = max(1, SCORES_PER_PASS // len(self.matrix))
        found = [
            self._best_of(users[first : first + group], tasks[first : first + group])
            for first in range(0, len(tasks), group)
        ]
        return Search(self, users, tasks, found)

    def scores(self, users: Tensor, tasks: list[Retrieval]) -> Tensor:
        """Scores of all items, minus infinity where an item is excluded: float32 [B, items]."""
        scores = (users @ self.matrix.T).float()
        excluded = np.concatenate(
            [place * len(self.matrix) + task.excluded_ids - 1 for place, task in enumerate(tasks)]
        )
        scores.view(-1).index_fill_(0, to_device(excluded, scores.device), -torch.inf)
        return scores

    def _best_of(self, users: Tensor, tasks: list[Retrieval]) -> tuple[Tensor, Tensor]:
        most = min(len(self.matrix), max(task.top_k for task in tasks) + _TIES)
        best, places = self.scores(users, tasks).topk(most)
        return begin_to_host(best), begin_to_host(places)


class Search:
    """Best items on their way to the host."""

    def __init__(
        self,
        head: RetrievalHead,
        users: Tensor,
        tasks: list[Retrieval],
        found: list[tuple[Tensor, Tensor]],
    ) -> None:
        """Takes who asks for what, and scores and places, [users, best] each, of each group."""
        self._head = head
        self._users = users
        self._tasks = tasks
        self._found = found

    def results(self) -> list[tuple[Int64Array, Float32Array]]:
        """Best items of each user, best first, then by id; for when the device is done.

        Returns:
            For each user item ids, int64 [k], and scores, float32 [k]; k is smaller than asked
            for when the catalogue less the excluded items is.
        """
        results: list[tuple[Int64Array, Float32Array]] = []
        for best, places in self._found:
            for row, where in zip(best.numpy(), places.numpy(), strict=True):
                results.append(self._result(len(results), row, where))
        return results

    def _result(
        self, user: int, best: Float32Array, places: Int64Array
    ) -> tuple[Int64Array, Float32Array]:
        task, num_items = self._tasks[user], len(self._head.matrix)
        k = min(task.top_k, num_items - len(task.excluded_ids))
        if k <= 0:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        # All items that tie with the k-th are needed, since topk picks among them as it pleases.
        # Where the last one found may tie too, more of them may lie beyond.
        if len(best) < num_items and not best[-1] < best[k - 1]:
            scores = self._head.scores(self._users[user : user + 1], [task])[0].cpu()
            best, places = scores.numpy(), np.arange(num_items)
            kth = scores.topk(k).values[-1].item()
        else:
            kth = best[k - 1]
        # `~(a < b)` keeps NaN, so that NaN scores are reported and not dropped.
        kept = ~(best < kth)
        item_ids, best = places[kept] + 1, best[kept]
        order = np.lexsort((item_ids, -best))[:k]
        return item_ids[order], best[order]
