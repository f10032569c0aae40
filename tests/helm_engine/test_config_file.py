"""`--config` and `--dump-config`: what wins, what is refused, and that one reads the other."""

from __future__ import annotations

import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from helm_engine.entrypoints.cli import app
from helm_engine.entrypoints.engine_options import EngineOptions
from helm_engine.entrypoints.fleet_options import FleetOptions
from helm_engine.entrypoints.ray_options import RayOptions
from helm_engine.entrypoints.server_options import ServerOptions


def dumped(command: str, *arguments: str, **environment: str) -> str:
    """What `--dump-config` prints."""
    done = CliRunner().invoke(app, [command, "--dump-config", *arguments], env=environment)
    assert (done.exit_code, done.stderr) == (0, "")
    return done.stdout


def refused(file: Path, *arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments, "--config", str(file)])
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    return line.removeprefix("helm-engine: error: ")


@pytest.mark.parametrize("spelled", ["max-num-seqs", "max_num_seqs"])
@pytest.mark.parametrize("table", ["", "[serve]\n"])
def test_flag_before_environment_before_file_before_default(
    tmp_path: Path, spelled: str, table: str
) -> None:
    file = tmp_path / "engine.toml"
    file.write_text(f"{table}{spelled} = 3")
    settings: list[tuple[list[str], dict[str, str], str]] = [
        ([], {}, "64 # default"),
        (["--config", str(file)], {}, f"3 # file: {file}"),
        ([], {"HELM_CONFIG": str(file)}, f"3 # file: {file}"),
        (["--config", str(file)], {"HELM_MAX_NUM_SEQS": "4"}, "4 # environment: HELM_MAX_NUM_SEQS"),
        (["--config", str(file), "--max-num-seqs", "5"], {"HELM_MAX_NUM_SEQS": "4"}, "5 # flag"),
        (["--max-num-seqs", "5", "--config", str(file)], {}, "5 # flag"),
    ]
    for arguments, environment, expected in settings:
        lines = dumped("serve", "m", *arguments, **environment).splitlines()
        assert f"max-num-seqs = {expected}" in lines


def test_a_flag_can_take_back_what_a_file_turned_on(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text("poison-freed-memory = true")
    arguments = ["m", "--config", str(file)]
    assert tomllib.loads(dumped("serve", *arguments))["poison-freed-memory"] is True
    off = dumped("serve", *arguments, "--no-poison-freed-memory")
    assert tomllib.loads(off)["poison-freed-memory"] is False


def test_one_file_serves_two_commands(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text(
        'model = "m"\npool-bytes = 1048576\nmax-num-seqs = 3\n'
        "[serve]\nport = 9000\nmax-num-seqs = 4\n"
        '[run-batch]\ninput = "in.jsonl"\noutput = "out.jsonl"\n'
    )
    served = tomllib.loads(dumped("serve", "--config", str(file)))
    batch = tomllib.loads(dumped("run-batch", "--config", str(file)))
    assert (served["model"], served["port"], served["max-num-seqs"]) == ("m", 9000, 4)
    assert (batch["model"], batch["input"], batch["max-num-seqs"]) == ("m", "in.jsonl", 3)
    assert served["pool-bytes"] == batch["pool-bytes"] == "1048576"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prot = 8000", "prot: unknown key; did you mean port?"),
        ("quux = 1", "quux: unknown key"),
        ("help = true", "help: unknown key"),
        ("dump-config = true", "dump-config: unknown key"),
        ('config = "other.toml"', "config: unknown key"),
        ("[srve]\nport = 1", "[srve]: unknown table; did you mean serve?"),
        ("[convert]\nsource = 1", "[convert]: unknown table"),
        ("[run-batch]\ninptu = 'x'", "[run-batch]: inptu: unknown key; did you mean input?"),
        ("[serve]\nprot = 1", "[serve]: prot: unknown key; did you mean port?"),
        ('input = "x"', "input: is no setting of serve; put it under [run-batch]"),
        ("block-tokens = 8\nblock_tokens = 8", "block_tokens: is said twice"),
        ('port = "8000"', "port: Input should be a valid integer"),
        ("port = true", "port: Input should be a valid integer"),
        ("port = 8000.0", "port: Input should be a valid integer"),
        ("port = 2020-01-01", "port: a date or time"),
        ("port = 65536", "port: Input should be less than or equal to 65535"),
        ("[port]\nnumber = 1", "port: Input should be a valid integer"),
        ("emb-fraction = '0.5'", "emb-fraction: Input should be a valid number"),
        ("emb_fraction = 1.5", "emb-fraction: must be within"),
        ("pool-bytes = true", "pool-bytes: Input should be a valid string"),
        ("pool-bytes = 'many'", "pool-bytes: 'many' is not a size"),
        ("poison-freed-memory = 'yes'", "poison-freed-memory: Input should be a valid boolean"),
        ("log-level = 'loud'", "log-level: Input should be 'debug', 'info' or 'warning'"),
        ("model = ['m']", "model: Input should be a valid string"),
        ("port = 1\nport = ", "is not TOML: "),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "engine.toml"
    file.write_text(text)
    assert refused(file, "serve", "m").startswith(f"{file}: {expected}")


def test_bad_toml_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text("port = 1\nhost = localhost\n")
    assert "at line 2" in refused(file, "serve", "m")
    file.write_bytes(b"port = 1\n\n# \xff\n")
    assert "at line 3" in refused(file, "serve", "m")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/gone.toml: cannot be read" in refused(tmp_path / "gone.toml", "serve", "m")
    assert f"{tmp_path}: cannot be read" in refused(tmp_path, "serve", "m")


def test_a_dump_checks_values_and_touches_no_file(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve", "m", "--block-tokens", "0", "--dump-config"])
    assert (done.exit_code, done.stdout) == (2, "")
    target = tmp_path / "out.jsonl"
    files = ["--input", str(tmp_path / "gone.jsonl"), "--output", str(target)]
    assert "output = " in dumped("run-batch", "--model", "no/such/model", *files)
    assert not target.exists()


# What a command line can carry: no NUL, and no halves of surrogate pairs.
_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
_COUNT = st.integers(1, 2**40)
_SIZE = st.one_of(st.integers(1, 2**40).map(str), st.sampled_from(["64MiB", "8GiB", "1.5GB"]))
_PATH = _TEXT.map(lambda text: str(Path(text)))
_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "served_model_name": _TEXT,
    "device": _TEXT,
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "row_dtype": st.sampled_from(["auto", "int8", "fp8"]),
    "kv_cache_dtype": st.sampled_from(["auto", "fp8"]),
    "attention_backend": _TEXT,
    "enforce_eager": st.booleans(),
    "max_retrieval_matrix_bytes": _SIZE,
    "host_tier_timeout": st.floats(0.001, 1e6),
    "refill_bytes_per_second": _SIZE,
    "host_link_bytes_per_second": _SIZE,
    "pool_bytes": _SIZE,
    "gpu_memory_utilization": st.floats(0.01, 1.0),
    "emb_fraction": st.floats(0.0, 1.0),
    "block_tokens": st.integers(1, 1024),
    "cost_profile": _PATH,
    "controller": st.sampled_from(["static:0.3", "threshold", "hill_climb"]),
    "control_period": st.floats(0.25, 5.0),
    "slo_ms": st.floats(0.1, 1e6),
    "decision_log": _PATH,
    "poison_freed_memory": st.booleans(),
    "max_num_batched_tokens": _COUNT,
    "max_num_seqs": _COUNT,
    "max_num_waiting": _COUNT,
    "max_pages_per_step": _COUNT,
    "max_body_bytes": _SIZE,
    "max_history_events": _COUNT,
    "max_candidates": _COUNT,
    "max_requests": _COUNT,
    "max_top_k": _COUNT,
    "log_level": st.sampled_from(["debug", "info", "warning"]),
    "host": _TEXT,
    "port": st.integers(0, 65535),
    "shutdown_timeout": st.floats(0.0, 1e6),
    "hang_timeout": st.floats(1.0, 1e6),
    "start_timeout": st.floats(1.0, 1e6),
    "body_timeout": st.floats(0.1, 1e6),
    "otlp_traces_endpoint": _TEXT,
    "record_trace": _PATH,
    "record_trace_max_bytes": _SIZE,
    "api_key_file": _PATH,
    "admin_key_file": _PATH,
    "kv_events_endpoint": _TEXT,
    "kv_events_replay_endpoint": _TEXT,
    "kv_events_buffer": _COUNT,
    "kv_events_redact": st.booleans(),
    "row_digest_positions": st.integers(1, 1 << 32),
    "row_digest_interval": st.floats(0.0, 1e6),
    "engine_name": st.text("abc-", min_size=1),
    "num_engines": st.integers(0, 64),
    "num_fronts": st.integers(1, 64),
    "engine": st.lists(_TEXT, max_size=3),
    "user_key_file": _PATH,
    "routing_policy": _TEXT,
    "hedge_ms": st.floats(0.1, 1e6),
    "suspect_timeout": st.floats(0.1, 1e6),
    "ray": st.booleans(),
    "ray_address": _TEXT,
    "ray_cpus": _COUNT,
}
_WITHOUT_DEFAULT = {
    "served-model-name", "cost-profile", "otlp-traces-endpoint", "api-key-file", "admin-key-file",
    "max-pages-per-step", "host-link-bytes-per-second", "controller", "decision-log",
    "record-trace", "user-key-file", "hedge-ms", "kv-events-endpoint",
    "kv-events-replay-endpoint", "engine-name", "pool-bytes", "gpu-memory-utilization",
    "ray-address", "ray-cpus",
}  # fmt: skip


def test_the_property_below_knows_every_option() -> None:
    groups = (EngineOptions, ServerOptions, FleetOptions, RayOptions)
    options = {name for group in groups for name in group.__dataclass_fields__}
    assert _VALUES.keys() == options - {"api_key", "admin_key", "host_tier"}, "but for secrets"


def test_a_dump_holds_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELM_ADMIN_KEY", "hidden-a")
    tier = "redis://:hidden-c@rows"
    text = dumped("serve", "m", "--api-key", "hidden-b", "--host-tier", tier)
    assert "hidden" not in text
    assert "host-tier" in text
    assert "api-key" in text
    assert "admin-key" in text


def _flags(values: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            flags += [f"--{flag}={one}" for one in value]
        else:
            flags.append(f"--{flag}={value}")
    return flags


@given(model=_TEXT, values=st.fixed_dictionaries({}, optional=_VALUES))
def test_a_dump_reads_back_to_the_same_configuration(model: str, values: dict[str, Any]) -> None:
    if "kv_events_endpoint" not in values:
        values.pop("kv_events_replay_endpoint", None)  # It is refused alone.
    if "gpu_memory_utilization" in values:
        values |= {"device": "cuda"}  # Refused on a CPU, and beside a size.
        values.pop("pool_bytes", None)
    text = dumped("serve", *_flags(values), "--", model)
    said = tomllib.loads(text)
    assert said["model"] == str(Path(model))
    for name, value in values.items():
        assert said[name.replace("_", "-")] == value
    assert said.keys() | _WITHOUT_DEFAULT == {
        "model", *(name.replace("_", "-") for name in _VALUES)
    }  # fmt: skip
    with TemporaryDirectory() as directory:
        file = Path(directory) / "engine.toml"
        file.write_text(text, encoding="utf-8")
        again = dumped("serve", "--config", str(file))
    assert tomllib.loads(again) == said
    assert f"port = {said['port']} # file: " in again
