"""The slow references reproduce what the original code computed, from ids to outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_executor.converters.convert import convert_checkpoint
from tests.model_executor.golden_checkpoints import (
    CONFIGS,
    golden,
    nvidia_tables,
    stu_parts,
    weights,
    write_config,
    write_nvidia,
    write_research,
    write_stu,
)
from tests.reference import Reference, load_reference
from tests.reference.formulas import Array

STU_FIELDS = {
    "dlrm_streaming_rows": (
        {
            "item_ids": "item_id",
            "actions": "item_weights",
            "timestamps": "action_timestamp",
            "item_category_id": "item_category_id",
        },
        {
            "item_ids": "item_candidate_id",
            "item_category_id": "item_candidate_category_id",
            "times": "item_query_time",
        },
    ),
    "dlrm_times_multitask": (
        {"item_ids": "video_id", "actions": "action_weight", "timestamps": "action_timestamp"},
        {"item_ids": "item_video_id", "times": "item_query_time"},
    ),
}
"""Inputs that are a history's and those that are its candidates', by our names."""


def reference_of_case(dialect: str, case: str, source: Path, directory: Path) -> Reference:
    """The reference over a case's weights, converted as an official checkpoint is."""
    convert_checkpoint(dialect, source, directory / "model", write_config(directory, case))
    return load_reference(directory / "model")


def split(case: str, name: str, lengths: list[int]) -> list[list[int]]:
    """An input of all users, user by user."""
    return [part.tolist() for part in golden(case)[f"in.{name}"].split(lengths)]


def check(case: str, name: str, got: Array) -> None:
    """Holds an output against the original's."""
    want = golden(case)[f"out.{name}"].double().numpy()
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)


def test_research_scores_are_those_of_the_original(tmp_path: Path) -> None:
    case = "research_encoder"
    reference = reference_of_case("research", case, write_research(tmp_path), tmp_path)
    tensors = golden(case)
    answers = []
    for user, length in enumerate(tensors["in.lengths"].tolist()):
        times = tensors["in.timestamps"][user].tolist()
        body = {
            "history": {
                "item_ids": tensors["in.ids"][user, :length].tolist(),
                "timestamps": times[:length],
            },
            "candidates": {"item_ids": tensors["in.candidate_ids"].tolist()},
            "request_time": times[length],
        }
        answers.append(reference.answer(body)[:, 0])
    check(case, "scores", np.stack(answers))


def stu_bodies(case: str) -> Iterator[dict[str, Any]]:
    tensors, (of_event, of_candidate) = golden(case), STU_FIELDS[case]
    lengths = tensors["in.uih_lengths"].tolist()
    targets = tensors["in.num_candidates"].tolist()
    history = {ours: split(case, theirs, lengths) for ours, theirs in of_event.items()}
    candidates = {ours: split(case, theirs, targets) for ours, theirs in of_candidate.items()}
    asked_at = candidates.pop("times")
    for user in range(len(lengths)):
        yield {
            "history": {name: values[user] for name, values in history.items()},
            "candidates": {name: values[user] for name, values in candidates.items()},
            "context": {
                feature["name"]: int(tensors[f"in.{feature['name']}"][user])
                for feature in CONFIGS[case]["contextual"]
            },
            "request_time": asked_at[user][0],
        }


@pytest.mark.parametrize(
    ("case", "name"),
    [("dlrm_streaming_rows", "preds"), ("dlrm_times_multitask", "preds_table_cap")],
)
def test_stu_predictions_are_those_of_the_original(case: str, name: str, tmp_path: Path) -> None:
    source = write_stu(tmp_path, *stu_parts(case))
    reference = reference_of_case("stu", case, source, tmp_path)
    got = np.concatenate([reference.answer(body) for body in stu_bodies(case)])
    check(case, name, got.T)


def test_nvidia_logits_are_those_of_the_original(tmp_path: Path) -> None:
    case = "nvidia_ranking"
    source = write_nvidia(tmp_path, weights(case), nvidia_tables())
    reference = reference_of_case("nvidia", case, source, tmp_path)
    tensors = golden(case)
    lengths, targets = tensors["in.history_lengths"], tensors["in.num_candidates"]
    items = split(case, "ids.item", (lengths + targets).tolist())
    actions = split(case, "ids.action", lengths.tolist())
    answers = [
        reference.answer(
            {
                "history": {"item_ids": items[user][:length], "actions": actions[user]},
                "candidates": {"item_ids": items[user][length:]},
                "context": {
                    name: int(tensors[f"in.ids.{name}"][user]) for name in ("user0", "user1")
                },
            }
        )
        for user, length in enumerate(lengths.tolist())
    ]
    check(case, "logits", np.concatenate(answers))
