"""What the tests of `run-batch` share: lines, the command, and its answers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e.running_server import command

HISTORY = {"item_ids": [3, 1, 4], "timestamps": [10, 20, 30]}
_LIMITED = (
    "import os, resource, sys; n = int(sys.argv[1]);"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)); os.execv(sys.argv[2], sys.argv[2:])"
)


def line(custom_id: str, body: Any, **changes: Any) -> str:
    """One OpenAI batch line."""
    fields = {"custom_id": custom_id, "method": "POST", "url": "/v1/recommend", "body": body}
    return json.dumps({**fields, **changes})


def scattered_bodies(
    num_lines: int, num_users: int, max_events: int, num_items: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Requests of users who come again and again with more events, in no order."""
    rng = random.Random(seed)
    events = {user: rng.choices(range(1, num_items + 1), k=max_events) for user in range(num_users)}
    lengths = dict.fromkeys(range(num_users), 1)
    bodies = []
    for _ in range(num_lines):
        user = rng.randrange(num_users)
        lengths[user] = min(max_events, lengths[user] + rng.randint(0, max_events // 4))
        history = {
            "item_ids": events[user][: lengths[user]],
            "timestamps": [60 * place for place in range(lengths[user])],
        }
        bodies.append({"user": f"u{user}", "history": history, "top_k": rng.randint(1, 20)})
    return bodies


def arguments(source: Path, target: Path, model_dir: Path, *flags: str) -> list[str]:
    """The command line."""
    return command(
        "run-batch", "-i", str(source), "-o", str(target), "--model", str(model_dir), *flags
    )


def run(
    source: Path, target: Path, model_dir: Path, *flags: str, max_file_bytes: int | None = None
) -> subprocess.CompletedProcess[str]:
    """The command, to its end; a limit on files stands for a disk that gets full."""
    started = arguments(source, target, model_dir, *flags)
    if max_file_bytes is not None:
        started = [sys.executable, "-c", _LIMITED, str(max_file_bytes), *started]
    return subprocess.run(started, capture_output=True, text=True, timeout=120)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a refused run printed before it loaded a model."""
    assert done.returncode == 2, done.stderr
    (message,) = done.stderr.strip().splitlines()
    assert message.startswith("helm-engine: error: ")
    return message


def read_answers(target: Path) -> list[dict[str, Any]]:
    """The output lines."""
    return [json.loads(text) for text in target.read_text().splitlines()]


def assert_same_answers(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """The same lines in the same order, with the same items, scores within 1e-5, and errors."""
    assert [one["custom_id"] for one in found] == [one["custom_id"] for one in wanted]
    assert [one["id"] for one in found] == [one["id"] for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one["response"]["status_code"] == other["response"]["status_code"]
        body, wanted_body = one["response"]["body"], other["response"]["body"]
        if one["response"]["status_code"] != 200:
            assert body == wanted_body
            continue
        scores = {item["item_id"]: item["score"] for item in body["data"]}
        wanted_scores = {item["item_id"]: item["score"] for item in wanted_body["data"]}
        assert scores.keys() == wanted_scores.keys()
        assert all(abs(scores[item] - wanted_scores[item]) <= 1e-5 for item in scores)
