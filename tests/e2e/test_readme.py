"""What the README shows is what the engine does."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

import pytest

from tests.e2e.running_server import BUNDLED_MODEL, REPOSITORY, running_server

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
RESULTS = REPOSITORY / "benchmarks" / "results"


def _shown_request() -> dict[str, Any]:
    (curl,) = re.findall(r"^curl .*$", README, flags=re.MULTILINE)
    arguments = shlex.split(curl)
    request: dict[str, Any] = json.loads(arguments[arguments.index("-d") + 1])
    return request


def _shown_answers() -> list[dict[str, Any]]:
    return [json.loads(text) for text in re.findall(r"```json\n(.*?)```", README, flags=re.DOTALL)]


def test_the_request_shown_gets_the_answer_shown() -> None:
    shown, shown_error = _shown_answers()
    with running_server(BUNDLED_MODEL) as server:
        printed = server.welcome.splitlines()[-1].replace(server.address, "http://127.0.0.1:8000")
        assert printed in README
        answer = server.post(_shown_request()).json()
        history = {"item_ids": [1, 5000], "timestamps": [1, 2]}
        error = server.post({"history": history}).json()
        assert server.stop() == 0
    assert [item["item_id"] for item in answer["data"]] == [
        item["item_id"] for item in shown["data"]
    ]
    assert [item["score"] for item in answer["data"]] == pytest.approx(
        [item["score"] for item in shown["data"]], abs=1e-4
    )
    timings = answer["usage"].pop("timings_ms")
    assert timings.keys() == shown["usage"].pop("timings_ms").keys()
    assert answer["usage"] == shown["usage"]
    assert answer.keys() == shown.keys()
    assert error == shown_error


def test_figures_come_from_the_result_files() -> None:
    replay = json.loads((RESULTS / "replay_ml100k.json").read_text())
    reused = replay["latency_where_kv_was_reused"]
    figures = [
        f"{replay[side][name]:.4f}".lstrip("0")
        for side in ("served", "offline")
        for name in ("hr10", "ndcg10")
    ]
    figures += [
        f"took {reused['mean_ms_over_without_reuse']:.2f} of the time",
        f"{replay['usage_test_only']['cached_token_share']:.0%}".replace("%", " %"),
        f"{replay['usage_test_only']['row_hit_share']:.0%}".replace("%", " %"),
        f"{replay['offline']['max_score_diff']:.1e}",
    ]
    on_gpu = json.loads((RESULTS / "replay_ml100k_cuda.json").read_text())
    assert on_gpu["served"] == pytest.approx(replay["served"], abs=1e-9)
    figures.append(
        f"{on_gpu['latency']['p50_ms']:.1f} ms at the median against "
        f"{replay['latency']['p50_ms']:.1f} ms"
    )
    gpu = json.loads((RESULTS / "gpu_check.json").read_text())
    figures += [
        f"| {cell['history']} | {cell['cached_tokens']} | {cell['ms_recompute']:.1f} | "
        f"{cell['ms_cached']:.1f} | {cell['ratio']:.2f} "
        for cell in gpu["end_to_end"]
    ]
    text = " ".join(README.split())
    assert [figure for figure in figures if figure not in text] == []


def test_the_model_card_shows_the_figures_of_the_training_run() -> None:
    card = (BUNDLED_MODEL / "README.md").read_text(encoding="utf-8")
    result = json.loads((RESULTS / "train_hstu_ml100k.json").read_text())
    for split in ("test", "validation"):
        for convention in ("removed", "kept"):
            for figure in result[split][convention].values():
                assert f"{figure:.4f}".lstrip("0") in card


def test_no_placeholder_is_left_in_a_document() -> None:
    documents = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    assert [path.name for path in documents if "@@" in path.read_text(encoding="utf-8")] == []
