"""A server with keys: who may ask, who may reload, and users who are forgotten."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.e2e.running_server import RunningServer, running_server
from tests.toy_models import toy_config, write_toy_model

CLIENT, ADMIN, FROM_FILE = "client-key", "admin-key", "key-of-file"
BODY = {"user": "ada", "history": {"item_ids": list(range(1, 21)), "timestamps": [5] * 20}}
RELOAD = "/v1/admin/reload"
OPEN = ("/health", "/ping", "/version", "/load", "/metrics", "/docs", "/openapi.json")
WAIT_SECONDS = 60


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("models") / "toy", toy_config())


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[RunningServer]:
    """Blocks of 4 tokens, so that short histories leave KV behind."""
    key_file = model_dir.parent / "keys"
    key_file.write_text(f"# clients\n\n  {FROM_FILE}  \n#{FROM_FILE}-old\n", encoding="utf-8")
    flags = ("--api-key", CLIENT, "--api-key-file", str(key_file), "--admin-key", ADMIN)
    small = ("--pool-bytes", "300000", "--block-tokens", "4", "--log-level", "warning")
    with running_server(model_dir, *flags, *small) as running:
        yield running
        assert running.get("/health").status_code == 200
        assert running.stop() == 0


def call(
    server: RunningServer, method: str, path: str, key: str | None, body: Any = None
) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    url = server.address + path
    return httpx.request(method, url, json=body, headers=headers, timeout=WAIT_SECONDS)


def recommend(server: RunningServer, body: Any = BODY) -> dict[str, Any]:
    answer = call(server, "POST", "/v1/recommend", CLIENT, body)
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    return whole


def served_version(server: RunningServer) -> str:
    (model,) = call(server, "GET", "/v1/models", CLIENT).json()["data"]
    version: str = model["version"]
    return version


@pytest.mark.parametrize("path", OPEN)
def test_probes_and_descriptions_need_no_key(server: RunningServer, path: str) -> None:
    assert call(server, "GET", path, None).status_code == 200


@pytest.mark.parametrize("key", [None, "wrong", CLIENT + "x", f"#{FROM_FILE}-old", "# clients"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/recommend"),
        ("POST", "/recommend"),
        ("GET", "/v1/models"),
        ("GET", "/info"),
        ("POST", "/v1/users/ada:forget"),
        ("POST", RELOAD),
        ("GET", "/nothing"),
        ("POST", "/v1/recommend/"),
    ],
)
def test_without_a_right_key_there_is_no_answer(
    server: RunningServer, method: str, path: str, key: str | None
) -> None:
    refused = call(server, method, path, key, BODY)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.headers["x-request-id"]
    assert refused.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("key", [CLIENT, FROM_FILE, ADMIN])
def test_every_key_lets_a_client_ask(server: RunningServer, key: str) -> None:
    assert call(server, "POST", "/v1/recommend", key, BODY).status_code == 200


@pytest.mark.parametrize("header", ["Basic admin-key", "admin-key", "Bearer", "Bearerclient-key"])
def test_keys_of_another_scheme_are_unknown(server: RunningServer, header: str) -> None:
    url = server.address + "/v1/models"
    assert httpx.get(url, headers={"Authorization": header}).status_code == 401
    assert httpx.get(url, headers={"Authorization": f"bearer  {CLIENT}"}).status_code == 200


@pytest.mark.parametrize("key", [CLIENT, FROM_FILE])
def test_a_clients_key_does_not_reload(server: RunningServer, key: str) -> None:
    refused = call(server, "POST", RELOAD, key)
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")


@pytest.mark.parametrize(
    "user",
    [
        "ada", "a/b//c", "../../etc", "ünï 💡", "100%", "%2F", "?x=1#y", "me:forget", ":forget",
        "a\nb", "\t", ".", "+", "a" * 512, "é" * 512,
    ],
)  # fmt: skip
def test_a_forgotten_user_is_not_remembered(server: RunningServer, user: str) -> None:
    body = {**BODY, "user": user}
    recommend(server, body)
    assert recommend(server, body)["usage"]["cached_tokens"] == 16
    path = f"/v1/users/{quote(user, safe='')}:forget"
    forgotten = call(server, "POST", path, CLIENT)
    assert (forgotten.status_code, forgotten.json()["user"]) == (200, user)
    assert forgotten.json()["blocks_forgotten"] == 4
    assert recommend(server, body)["usage"]["cached_tokens"] == 0
    assert call(server, "POST", path, CLIENT).json()["blocks_forgotten"] == 4


@pytest.mark.parametrize("user", ["", quote("a" * 513), "%ff%fe"])
def test_what_is_no_user_cannot_be_forgotten(server: RunningServer, user: str) -> None:
    refused = call(server, "POST", f"/v1/users/{user}:forget", CLIENT)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "user")


def put_weights(model_dir: Path, seed: int) -> None:
    """Writes other weights beside the directory, then puts them in its place."""
    fresh = model_dir.with_name(f"fresh-{seed}")
    write_toy_model(fresh, toy_config(), seed)
    for file in fresh.iterdir():
        file.replace(model_dir / file.name)


def test_a_reload_serves_the_weights_that_are_there_now(
    server: RunningServer, model_dir: Path
) -> None:
    before, version = recommend(server), served_version(server)
    put_weights(model_dir, seed=1)
    # Nothing changes before somebody says so.
    assert [i["score"] for i in recommend(server)["data"]] == pytest.approx(
        [i["score"] for i in before["data"]], abs=1e-5
    )
    answer = call(server, "POST", RELOAD, ADMIN)
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"model": "toy", "version": served_version(server)}
    assert served_version(server) != version
    assert recommend(server)["data"] != before["data"]


def test_a_damaged_model_changes_nothing(server: RunningServer, model_dir: Path) -> None:
    version = served_version(server)
    damaged = model_dir.with_name("damaged")
    shutil.copytree(model_dir, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    for bad in (damaged, "\0missing"):
        refused = call(server, "POST", RELOAD, ADMIN, {"model_dir": str(bad)})
        assert refused.status_code == 409, refused.text
        assert refused.json()["error"]["param"] == "model_dir"
        assert served_version(server) == version
        assert len(recommend(server)["data"]) == 10


@pytest.mark.parametrize("body", [7, {"model_dir": ""}, {"model_dir": 3}, {"dir": "x"}])
def test_a_reload_that_says_something_odd_is_refused(server: RunningServer, body: Any) -> None:
    refused = call(server, "POST", RELOAD, ADMIN, body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] in ("body", "model_dir", "dir")


def test_a_second_reload_at_once_is_refused_and_requests_go_on(server: RunningServer) -> None:
    statuses: list[int] = []

    def reload() -> None:
        statuses.append(call(server, "POST", RELOAD, ADMIN).status_code)

    reloading = [threading.Thread(target=reload) for _ in range(2)]
    for thread in reloading:
        thread.start()
    while any(thread.is_alive() for thread in reloading):
        assert len(recommend(server)["data"]) == 10
    assert sorted(statuses) == [200, 409]


def test_sighup_reloads(server: RunningServer, model_dir: Path) -> None:
    version = served_version(server)
    put_weights(model_dir, seed=2)
    server.process.send_signal(signal.SIGHUP)
    until = time.monotonic() + WAIT_SECONDS
    while served_version(server) == version:
        assert time.monotonic() < until, "the new weights are not served"
    assert recommend(server)["usage"]["cached_tokens"] == 0
