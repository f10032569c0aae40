"""Cases of ids for the ranking dialects: request bodies through a whole engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from helm_engine.engine_loader import LoadedEngine
from helm_engine.protocol import parse_request
from model_executor.model_config import (
    ITEM_TABLE,
    SMALL_TABLE_ROWS,
    ModelConfig,
    parse_model_config,
)
from model_executor.models.nvidia import NvidiaHSTU
from model_executor.models.stu import StuHSTU
from tests.golden.case import TWIN, CaseError, GoldenCase
from tests.golden.engine import answer, load
from tests.golden.weights import layer_weights, model_weights

EMBEDDINGS = "_embedding_collection.embeddings."
ACTION_INPUTS = ("in.item_weights", "in.action_weight")


def _common(case: GoldenCase) -> dict[str, Any]:
    header = case.header
    head_dim = header.get("head_dim")
    return {
        "model_type": "hstu",
        "dialect": header["dialect"],
        "dtype": "float32",
        "embedding_dim": header["embedding_dim"],
        "num_layers": header["num_layers"],
        "num_heads": header["num_heads"],
        "dqk": header.get("dqk", head_dim),
        "dv": header.get("dv", head_dim),
        "layer_norm_eps": header["layer_norm_eps"],
    }


def _weights(case: GoldenCase) -> dict[str, Tensor]:
    header = case.header
    return model_weights(case.tensors, header["dialect"]) | layer_weights(
        case.tensors, header["dialect"], header["num_layers"], header["num_heads"], case.path
    )


class _Recorder:
    """Remembers what a model's method returned, micro-batch after micro-batch."""

    def __init__(self, model: Any, method: str) -> None:
        self._returned: list[Tensor] = []
        inner: Callable[..., Tensor] = getattr(model, method)

        def recorded(*args: Any) -> Tensor:
            self._returned.append(inner(*args))
            return self._returned[-1]

        setattr(model, method, recorded)

    def take(self) -> Tensor:
        """Everything since the last call."""
        returned = torch.cat(self._returned).float().cpu()
        self._returned.clear()
        return returned


def _run_users(
    engine: LoadedEngine, bodies: list[dict[str, Any]], recorders: list[_Recorder]
) -> tuple[Tensor, list[Tensor]]:
    """Scores [C, tasks] of all users' candidates in the order sent, and what was recorded.

    Every user comes twice, the second time to cached KV where the model allows any; the second
    answers are returned and must equal the first.
    """
    scores: list[Tensor] = []
    recorded: list[list[Tensor]] = [[] for _ in recorders]
    for number, body in enumerate(bodies):
        for visit in range(2):
            request_id = f"{number}-{visit}"
            prepared = engine.processor.process(parse_request(body), request_id, 0.0)
            answer(engine, prepared.request)
            place = torch.from_numpy(prepared.place_of_candidate)
            assert prepared.request.scores is not None
            got = torch.from_numpy(prepared.request.scores)[place]
            taken = [recorder.take()[place] for recorder in recorders]
            if visit and not torch.allclose(got, scores[-1], rtol=1e-5, atol=1e-6):
                raise CaseError(f"user {number} got other scores from cached KV")
            if visit:
                scores[-1] = got
            else:
                scores.append(got)
                for parts, part in zip(recorded, taken, strict=True):
                    parts.append(part)
    return torch.cat(scores), [torch.cat(parts) for parts in recorded]


def run_dlrm(case: GoldenCase, device: str) -> Iterator[tuple[str, Tensor]]:
    """DLRMv3, from ids to predictions."""
    config, features = _dlrm_config(case)
    tables = {name[len(EMBEDDINGS) : -len(".weight")]: name for name in case.tensors}
    table = {one: case.tensors[name] for one, name in tables.items() if name.startswith(EMBEDDINGS)}
    weights = _weights(case)
    pooled = {ITEM_TABLE: table[next(iter(features))]}
    for feature in config.item_features:
        weights[f"feature_tables.table_{feature.name}"] = table[feature.name]
    for feature in config.contextual_features:
        if feature.num_rows <= SMALL_TABLE_ROWS:
            weights[f"contextual_tables.table_{feature.name}"] = table[feature.name]
        else:
            pooled[f"contextual.{feature.name}"] = table[feature.name]
    engine = load(case, config, weights, pooled, device)
    model = engine.runner.model
    assert isinstance(model, StuHSTU)
    recorders = [_Recorder(model, name) for name in ("user_side", "item_side", "logits")]
    preds, (users, items, logits) = _run_users(engine, _dlrm_bodies(case, features), recorders)
    for name, tensor in (
        ("preds", preds.T),
        ("logits", logits.T),
        ("user_embeddings", users),
        ("item_embeddings", items),
    ):
        yield f"out.{name}", tensor
        yield f"out.{name}{TWIN}", tensor


def _dlrm_config(case: GoldenCase) -> tuple[ModelConfig, dict[str, str]]:
    """The model, and for items and item features, in their order, the candidates' input name."""
    header, tensors = case.header, case.tensors

    def rows(table: str) -> int:
        return len(tensors[f"{EMBEDDINGS}{table}.weight"])

    tables = [name[len(EMBEDDINGS) : -7] for name in tensors if name.startswith(EMBEDDINGS)]
    features = {}
    for candidate in header["item_features"]:
        plain = {candidate.removeprefix("item_"), candidate.replace("candidate_", "", 1)}
        (history,) = [table for table in tables if table in plain]
        features[history] = candidate
    first, *others = features
    order = header.get("contextual_feature_order", list(header["contextual_features"]))
    minimum = header["contextual_min_uih_length"]
    prefix = "_hstu_transducer._positional_encoder._"
    raw = {
        **_common(case),
        "num_items": rows(first),
        "max_sequence_len": max(header["history_lengths"]),
        "truncation": "oldest",
        "table_dim": header["table_dim"],
        "features": [{"name": name, "num_rows": rows(name)} for name in others],
        "contextual": [
            {"name": name, "num_rows": rows(name), "min_sequence_len": minimum.get(name, 0)}
            for name in order
        ],
        "tasks": [{"name": name} for name in header["tasks"]],
        "num_action_bits": len(header["action_weights"]),
        "action_dim": tensors[
            "_hstu_transducer._input_preprocessor._action_encoder._action_embedding_table"
        ].shape[1],
        "max_candidates": max(header["num_candidates"]),
        "num_positions": len(tensors[f"{prefix}position_embeddings_weight"]),
        "num_time_buckets": len(tensors[f"{prefix}timestamp_embeddings_weight"]) - 1,
        "preprocessor_hidden_dim": header["preprocessor_hidden_dim"],
        "item_hidden_dim": len(tensors["_item_embedding_mlp.0.bias"]),
        "head_hidden_dim": len(tensors["_multitask_module._prediction_module.0.bias"]),
        "mlp_norm_eps": header["mlp_norm_eps"],
    }
    return parse_model_config(raw, str(case.path)), features


def _dlrm_bodies(case: GoldenCase, features: dict[str, str]) -> list[dict[str, Any]]:
    tensors, header = case.tensors, case.header
    lengths = tensors["in.uih_lengths"].tolist()
    targets = tensors["in.num_candidates"].tolist()

    def jagged(name: str, sizes: list[int]) -> list[list[int]]:
        return [part.tolist() for part in tensors[name].split(sizes)]

    (actions,) = [name for name in ACTION_INPUTS if name in tensors]
    item, *others = features
    history = {
        "item_ids": jagged(f"in.{item}", lengths),
        "actions": jagged(actions, lengths),
        "timestamps": jagged("in.action_timestamp", lengths),
        **{name: jagged(f"in.{name}", lengths) for name in others},
    }
    candidates = {
        "item_ids": jagged(f"in.{features[item]}", targets),
        **{name: jagged(f"in.{features[name]}", targets) for name in others},
    }
    asked_at = jagged("in.item_query_time", targets)
    order = header.get("contextual_feature_order", list(header["contextual_features"]))
    return [
        {
            "user": f"user-{user}",
            "history": {name: values[user] for name, values in history.items()},
            "candidates": {name: values[user] for name, values in candidates.items()},
            "context": {name: int(tensors[f"in.{name}"][user]) for name in order},
            "request_time": asked_at[user][0],
        }
        for user in range(len(lengths))
    ]


def run_nvidia_ranking(case: GoldenCase, device: str) -> Iterator[tuple[str, Tensor]]:
    """NVIDIA's ranking model, from ids to logits."""
    header, tensors = case.header, case.tensors
    contextual = header["contextual_features"]
    tasks = header["prediction_head_arch"][-1]
    has_actions = "in.ids.action" in tensors
    raw = {
        **_common(case),
        "num_items": len(tensors["in.table.item"]),
        "max_sequence_len": max(header["history_items"]),
        "contextual": [
            {"name": name, "num_rows": len(tensors[f"in.table.{name}"])} for name in contextual
        ],
        "tasks": [{"name": f"task{number}"} for number in range(tasks)],
        "num_position_buckets": header["num_position_buckets"],
        "scaling_seqlen": header["normaliser_n"],
        "target_group_size": header.get("target_group_size", 1),
        "prediction_head": header["prediction_head_arch"],
        "action": (
            {"name": "action", "num_rows": len(tensors["in.table.action"])} if has_actions else None
        ),
    }
    config = parse_model_config(raw, str(case.path))
    weights = _weights(case)
    pooled = {ITEM_TABLE: tensors["in.table.item"]}
    if has_actions:
        weights["small_tables.table_action"] = tensors["in.table.action"]
    for feature in config.contextual_features:
        if feature.num_rows <= SMALL_TABLE_ROWS:
            name = f"small_tables.table_contextual_{feature.name}"
            weights[name] = tensors[f"in.table.{feature.name}"]
        else:
            pooled[f"contextual.{feature.name}"] = tensors[f"in.table.{feature.name}"]
    engine = load(case, config, weights, pooled, device)
    assert isinstance(engine.runner.model, NvidiaHSTU)
    recorder = _Recorder(engine.runner.model, "normalise_candidate")
    bodies = _nvidia_bodies(case, contextual, has_actions)
    logits, (rows,) = _run_users(engine, bodies, [recorder])
    yield "out.logits", logits
    yield "out.candidate_embeddings", rows


def _nvidia_bodies(
    case: GoldenCase, contextual: list[str], has_actions: bool
) -> list[dict[str, Any]]:
    tensors = case.tensors
    lengths = tensors["in.history_lengths"].tolist()
    targets = tensors["in.num_candidates"].tolist()
    sizes = [a + b for a, b in zip(lengths, targets, strict=True)]
    items = [part.tolist() for part in tensors["in.ids.item"].split(sizes)]
    actions: list[list[int]] = [[0] * length for length in lengths]
    if has_actions:
        actions = [part.tolist() for part in tensors["in.ids.action"].split(lengths)]
    return [
        {
            "user": f"user-{user}",
            "history": {"item_ids": items[user][:length], "actions": actions[user]},
            "candidates": {"item_ids": items[user][length:]},
            "context": {name: int(tensors[f"in.ids.{name}"][user]) for name in contextual},
        }
        for user, length in enumerate(lengths)
    ]
