"""Cases of float rows: layers alone, over scattered pages, in chunks and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from block_manager.pool_layout import plan_layout
from model_executor.attention.registry import attention_backend
from model_executor.capabilities import capabilities_of
from model_executor.model_config import ModelConfig, parse_model_config
from model_executor.models.registry import build_model
from model_executor.models.sequence_model import SequenceModel
from model_executor.page_arena import PageArena
from model_executor.paged_batch import build_paged_batch
from model_executor.step import CandidateScoring, Int64Array, ScheduledRequest
from tests.golden.case import GoldenCase
from tests.golden.engine import BLOCK_TOKENS, ELEMENT_BYTES, TOKENS_PER_STEP, fill, pool_for
from tests.golden.weights import layer_weights

_BY_DIALECT: dict[str, dict[str, Any]] = {
    "research": {"max_output_len": 0, "num_time_buckets": 128, "l2_norm_eps": 1e-6},
    "stu": {
        "table_dim": 1,
        "tasks": [{"name": "task"}],
        "num_action_bits": 1,
        "max_candidates": 1,
        "num_positions": 1,
        "num_time_buckets": 1,
        "preprocessor_hidden_dim": 1,
    },
    "nvidia": {
        "tasks": [{"name": "task"}],
        "num_position_buckets": 1,
        "scaling_seqlen": 1,
        "prediction_head": [1],
    },
}
"""What a config needs besides its layers."""


@dataclass(frozen=True)
class _User:
    """Rows of one user: where they begin in the case, context and candidates."""

    first: int
    context: int
    candidates: int
    open_rows: int
    times: Int64Array


class _Stack:
    """The layers of a case over pages of their own."""

    def __init__(self, case: GoldenCase, users: list[_User], device: str) -> None:
        self.device = torch.device(device)
        self.config = _config(case, max(max(user.context for user in users), 1))
        self.model = build_model(self.config)
        _fill_layers(self.model, case)
        self.model.to(self.device)
        self.model.rule = replace(self.model.rule, normaliser=case.header["normaliser_n"])
        pool = pool_for(self.config, 0, histories=len(users), emb=0.0)
        self.layout = plan_layout(
            pool,
            kv_bytes_per_token=self.config.kv_elements_per_token * ELEMENT_BYTES,
            row_bytes=self.config.row_dim * ELEMENT_BYTES,
            max_context_tokens=self.config.max_context_tokens,
            staging_rows=0,
        )
        self.arena = PageArena(self.layout, self.config, self.device, torch.float32)
        self.arena.poison()
        self.attention = attention_backend("auto", self.device)
        lengths = np.array([user.context for user in users])
        self.tables = _scattered_tables(lengths, self.layout.num_pages)

    def run(self, x: Tensor, y: Tensor, parts: list[tuple[int, _User, range, range]]) -> None:
        """Runs parts of users together: a user's number, context rows, candidates."""
        with_open = parts[0][1].open_rows
        self.model.rule = replace(self.model.rule, num_open_rows=with_open)
        requests, context, candidates = [], [], []
        for number, user, rows, scored in parts:
            task = None
            if len(scored):
                index = np.arange(len(scored))
                task = CandidateScoring(index, np.zeros((len(scored), 2), dtype=np.int64))
            times = user.times[: rows.stop + 1]
            requests.append(
                ScheduledRequest(
                    request_id=str(number),
                    start=rows.start,
                    row_index=np.arange(len(rows)),
                    block_table=self.tables[number][: -(-rows.stop // BLOCK_TOKENS)],
                    features=np.column_stack([times[:-1], times[1:]]),
                    task=task,
                )
            )
            context += [user.first + row for row in rows]
            candidates += [user.first + user.context + place for place in scored]
        batch = build_paged_batch(
            requests, BLOCK_TOKENS, self.device, self.config.candidates_in_sequence
        )
        picked = torch.tensor(context + candidates, device=self.device)
        with torch.inference_mode():
            y[picked] = self.model.encode(
                x[picked], batch, self.arena.kv, self.attention, all_rows=True
            )


def _config(case: GoldenCase, longest: int) -> ModelConfig:
    header = case.header
    dialect = header["dialect"]
    head_dim = header.get("head_dim")
    more: dict[str, Any] = dict(_BY_DIALECT[dialect])
    if dialect == "stu":
        more["group_norm"] = header.get("use_group_norm", False)
        more["attention_scale"] = header.get("alpha")
        more["max_attention_window"] = header.get("max_attn_len", 0)
    if dialect == "nvidia":
        more["target_group_size"] = header.get("target_group_size", 1)
    if dialect == "research":
        layer = layer_weights(case.tensors, dialect, 1, header["num_heads"], case.path)
        longest = (len(layer["layers.0.bias.position_weight"]) + 1) // 2
        more["num_time_buckets"] = len(layer["layers.0.bias.time_weight"]) - 1
    return parse_model_config(
        {
            "model_type": "hstu",
            "dialect": dialect,
            "dtype": "float32",
            "num_items": 1,
            "embedding_dim": header["embedding_dim"],
            "num_layers": header["num_layers"],
            "num_heads": header["num_heads"],
            "dqk": header.get("dqk", head_dim),
            "dv": header.get("dv", head_dim),
            "max_sequence_len": longest,
            "layer_norm_eps": header["layer_norm_eps"],
            **more,
        },
        str(case.path),
    )


def _fill_layers(model: SequenceModel, case: GoldenCase) -> None:
    """Sets the layers; what lies before and behind them is not run."""
    header = case.header
    layers = layer_weights(
        case.tensors, header["dialect"], header["num_layers"], header["num_heads"], case.path
    )
    unused = {name: torch.zeros_like(one) for name, one in model.state_dict().items()}
    unused = {name: one for name, one in unused.items() if not name.startswith("layers.")}
    fill(model, unused | layers, case.path)


def _scattered_tables(lengths: Int64Array, num_pages: int) -> list[Int64Array]:
    """Block tables over pages in no order."""
    counts = -(-lengths // BLOCK_TOKENS)
    pages = np.random.default_rng(0).permutation(np.arange(1, num_pages))[: counts.sum()]
    return np.split(pages, np.cumsum(counts)[:-1])


def _users(case: GoldenCase) -> list[_User]:
    tensors, header = case.tensors, case.header
    offsets = tensors["in.offsets"].tolist()
    number = len(offsets) - 1
    none = torch.zeros(number, dtype=torch.int64)
    targets = tensors.get("in.num_candidates", tensors.get("in.num_targets", none)).tolist()
    shared = torch.full((number,), header.get("contextual_seq_len", 0))
    open_rows = tensors.get("in.num_contextuals", shared).tolist()
    users = []
    for user in range(number):
        length = offsets[user + 1] - offsets[user]
        times = np.zeros(length + 1, dtype=np.int64)
        if "in.timestamps" in tensors:
            times = tensors["in.timestamps"][user, : length + 1].numpy()
        context = length - targets[user]
        users.append(_User(offsets[user], context, targets[user], open_rows[user], times))
    return users


def _steps(stack: _Stack, users: list[_User]) -> Iterator[list[tuple[int, _User, range, range]]]:
    """All users together, chunk by chunk and micro-batch by micro-batch.

    Users whose contexts are whole come in steps of their own number of contextual rows.
    """
    unit = stack.config.candidate_group_size
    whole = any(user.open_rows for user in users)
    longest = max(user.context for user in users)
    for start in range(0, max(longest, 1), longest if whole and longest else TOKENS_PER_STEP):
        parts = []
        for number, user in enumerate(users):
            rows = range(
                start, user.context if whole else min(start + TOKENS_PER_STEP, user.context)
            )
            last = rows.stop == user.context
            if len(rows) or (start == 0 and last):
                # The first candidates come with the context's last chunk.
                parts.append((number, user, rows, range(min(unit, user.candidates) if last else 0)))
        if not parts:
            return
        for open_rows in sorted({user.open_rows for _, user, _, _ in parts}):
            yield [part for part in parts if part[1].open_rows == open_rows]
    for first in range(unit, max(user.candidates for user in users), 2 * unit):
        parts = [
            (
                number,
                user,
                range(user.context, user.context),
                range(first, min(first + 2 * unit, user.candidates)),
            )
            for number, user in enumerate(users)
            if user.candidates > first
        ]
        yield parts


def run_rows(case: GoldenCase, device: str) -> Iterator[tuple[str, Tensor]]:
    """Rows enter after the embedding; all users run together, chunk by chunk."""
    users = _users(case)
    x = case.tensors["in.x"].to(device)
    yield "out.y", _run_users(case, users, x, device, case.header["normaliser_n"])
    if "out.last_user_alone" in case.outputs:
        n = case.header["normaliser_n_last_user_alone"]
        y = _run_users(case, users[-1:], x, device, n)
        yield "out.last_user_alone", y[users[-1].first :]


def _run_users(case: GoldenCase, users: list[_User], x: Tensor, device: str, n: int) -> Tensor:
    stack = _Stack(case, users, device)
    assert stack.config.num_layers == 1 or capabilities_of(stack.config).chunkable.value
    stack.model.rule = replace(stack.model.rule, normaliser=n)
    y = torch.full_like(x, torch.nan)
    for parts in _steps(stack, users):
        stack.run(x, y, parts)
    return y.cpu()


def run_cached_rows(case: GoldenCase, device: str) -> Iterator[tuple[str, Tensor]]:
    """History first, then all candidates over its pages, then micro-batches with their own n."""
    tensors, header = case.tensors, case.header
    lengths = tensors["in.history_lengths"].tolist()
    targets = tensors["in.num_targets"].tolist()
    history = torch.split(tensors["in.x_history"], lengths)
    candidates = torch.split(tensors["in.x_candidates"], targets)
    x = torch.cat([rows for pair in zip(history, candidates, strict=True) for rows in pair])
    firsts = np.cumsum([0, *(a + b for a, b in zip(lengths, targets, strict=True))])
    users = [
        _User(int(first), length, number, 0, np.zeros(length + 1, dtype=np.int64))
        for first, length, number in zip(firsts, lengths, targets, strict=False)
    ]
    x = x.to(device)
    y = torch.full_like(x, torch.nan)
    stack = _Stack(case, users, device)
    for parts in _steps(stack, users):
        stack.run(x, y, parts)
    yield "out.history", _gather(y, users, lambda user: range(user.context))
    split = _gather(y, users, lambda user: range(user.context, user.context + user.candidates))
    yield "out.candidates_full_pass", split
    everyone = [
        (number, user, range(user.context, user.context), range(user.candidates))
        for number, user in enumerate(users)
    ]
    stack.run(x, y, everyone)
    at_once = _gather(y, users, lambda user: range(user.context, user.context + user.candidates))
    yield "out.candidates", at_once
    yield "out.candidates", split
    size = header["microbatch_size"]
    stack.model.rule = replace(stack.model.rule, normaliser=header["normaliser_n_microbatch"])
    for batch in range(max(targets) // size):
        places = range(batch * size, (batch + 1) * size)
        parts = [(number, user, rows, places) for number, user, rows, _ in everyone]
        stack.run(x, y, parts)
        picked = _gather(y, users, lambda user, places=places: [user.context + p for p in places])
        yield f"out.microbatch{batch}", picked


def _gather(y: Tensor, users: list[_User], rows_of: Any) -> Tensor:
    return y[[user.first + row for user in users for row in rows_of(user)]].cpu()
