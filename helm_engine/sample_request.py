"""A request that a model accepts, for the warm-up and for an operator to paste."""

from __future__ import annotations

from typing import Any

from model_executor.model_config import ModelConfig


def sample_request(
    model: ModelConfig, item_ids: list[int], timestamps: list[int], candidates: list[int] | None
) -> dict[str, Any]:
    """A request body with nothing that the model does not read.

    Args:
        model: the model's config.
        item_ids: the history, each within the model's items.
        timestamps: seconds of its events.
        candidates: items to score; None = retrieve.
    """
    body: dict[str, Any] = {"history": {"item_ids": item_ids} | _features(model, len(item_ids))}
    if model.uses_timestamps:
        body["history"]["timestamps"] = timestamps
    if model.num_actions:
        body["history"]["actions"] = [0] * len(item_ids)
    if candidates is not None:
        body["candidates"] = {"item_ids": candidates} | _features(model, len(candidates))
    if model.contextual_features:
        body["context"] = {feature.name: 0 for feature in model.contextual_features}
    return body


def _features(model: ModelConfig, number: int) -> dict[str, list[int]]:
    return {feature.name: [0] * number for feature in model.item_features}
