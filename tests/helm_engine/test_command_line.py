"""The command line: help that teaches, and every error in one line with status 2."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner, Result

from helm_engine.entrypoints.cli import app
from helm_engine.entrypoints.command import HelmCommand, HelmGroup
from helm_engine.entrypoints.engine_options import (
    ENGINE_CONTEXT,
    EngineOptions,
    takes_engine_options,
)
from helm_engine.entrypoints.value_source import secret_option
from helm_engine.entrypoints.waiting import SlowNotice
from tests.e2e.running_server import REPOSITORY, command

MODEL = "examples/models/hstu-ml-100k"


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(app, arguments, env=environment)


def refused(*arguments: str, **environment: str) -> str:
    """What follows `helm-engine: error: ` on the one line of a command that must fail."""
    done = run(*arguments, **environment)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("helm-engine: error: ")
    return line.removeprefix("helm-engine: error: ")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["serv"], "'serve'"),
        (["--vers"], "--version"),
        (["serve"], "MODEL_DIR"),
        (["serve", MODEL, "extra"], "extra"),
        (["serve", MODEL, "--prot", "8000"], "--port"),
        (["serve", MODEL, "--port"], "--port"),
        (["serve", MODEL, "--port", "http"], "--port"),
        (["serve", MODEL, "--port", "65536"], "--port"),
        (["serve", MODEL, "--log-level", "loud"], "--log-level"),
        (["serve", MODEL, "--emb-fraction", "1.5"], "emb_fraction"),
        (["serve", MODEL, "--gpu-memory-utilization", "0.5"], "gpu_memory_utilization: is for"),
        (
            ["serve", MODEL, "--gpu-memory-utilization", "0.5", "--pool-bytes", "1GiB"],
            "gpu_memory_utilization: in place of pool_bytes",
        ),
        (["serve", MODEL, "--pool-bytes", "many"], "pool_bytes"),
        (["serve", MODEL, "--host-tier", "disk"], "host_tier"),
        (["serve", MODEL, "--host-tier", "redis://:pass@h:port"], "host_tier"),
        (["serve", MODEL, "--host-tier-timeout", "0"], "--host-tier-timeout"),
        (["run-batch", "--model", MODEL, "-i", "in.jsonl"], "--output"),
        (["publish-rows", MODEL], "URL"),
        (["publish-rows", MODEL, "mmap"], "URL"),
        (["publish-rows", MODEL, "rows:6379"], "URL"),
        (["publish-rows", "no/such/model", "redis://127.0.0.1:1"], "no/such/model"),
        (["publish-rows", MODEL, "redis://127.0.0.1:1"], "127.0.0.1:1/0"),
        (["convert"], "SRC"),
        (["convert", "a", "b"], "--dialect"),
        (["convert", "a", "b", "--dialect", "bert"], "--dialect"),
    ],
)
def test_errors_are_one_line_with_status_2(arguments: list[str], named: str) -> None:
    assert named in refused(*arguments)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HELM_PORT", "tcp://10.0.0.1:80"),
        ("HELM_LOG_LEVEL", "loud"),
        ("HELM_EMB_FRACTION", "1.5"),
        ("HELM_POOL_BYTES", "many"),
        ("HELM_POISON_FREED_MEMORY", "perhaps"),
        ("HELM_CONFIG", "no/such.toml"),
    ],
)
def test_a_bad_value_from_the_environment_names_the_variable(variable: str, value: str) -> None:
    message = refused("serve", MODEL, **{"HELM_PORT": "0", variable: value})
    assert message.startswith(f"{variable}: ")
    assert "Value error" not in message


def test_a_value_that_the_engine_refuses_names_its_variable_too() -> None:
    done = subprocess.run(
        command("serve", MODEL, "--port", "0", "--log-level", "warning"),
        env={**os.environ, "HELM_DEVICE": "tpu"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "helm-engine: error: HELM_DEVICE: 'tpu' is none of cpu, cuda, cuda:N and auto\n"
    )


def test_the_flag_is_blamed_where_it_overrides_the_environment() -> None:
    message = refused("serve", MODEL, "--port", "http", HELM_PORT="8000")
    assert message.startswith("--port: ")


def test_no_arguments_show_the_help() -> None:
    done = run()
    assert done.exit_code == 0
    assert done.stdout == run("--help").stdout


def _commands() -> list[Any]:
    root = typer.main.get_command(app)
    assert isinstance(root, HelmGroup)
    return list(root.commands.values())


def test_every_command_explains_itself_with_examples() -> None:
    for each in _commands():
        help_text = run(each.name, "--help").stdout
        assert "Examples:\n" in help_text
        assert f"  helm-engine {each.name} " in help_text
        for param in each.params:
            assert param.help, f"{each.name}: {param.name} has no help"


@pytest.mark.parametrize("name", ["serve", "run-batch"])
def test_the_help_of_an_engines_command_names_variables_and_defaults(name: str) -> None:
    help_text = " ".join(run(name, "--help").stdout.split())
    assert "HELM_MODEL;" in help_text
    for option, field in EngineOptions.__dataclass_fields__.items():
        assert f"--{option.replace('_', '-')}" in help_text
        assert f"[env var: HELM_{option.upper()}" in help_text
        if field.default is not None and not isinstance(field.default, bool):
            assert f"HELM_{option.upper()}; default: {field.default}" in help_text
    assert "HELM_DUMP_CONFIG" not in help_text


def test_flags_are_listed_in_their_sections() -> None:
    lines = run("serve", "--help").stdout.splitlines()
    pool, scheduling = lines.index("Page pool:"), lines.index("Scheduling:")
    assert any("--pool-bytes" in line for line in lines[pool:scheduling])
    assert not any("--max-num-seqs" in line for line in lines[pool:scheduling])


def test_commands_are_separate_typer_commands() -> None:
    assert all(isinstance(each, HelmCommand) for each in _commands())


def _app_with_a_secret() -> typer.Typer:
    app = typer.Typer(cls=HelmGroup, rich_markup_mode=None)

    @app.callback()
    def root() -> None:
        pass

    @app.command(cls=HelmCommand, context_settings=ENGINE_CONTEXT)
    @takes_engine_options
    def work(
        options: EngineOptions,
        notice: SlowNotice,
        model: Annotated[Path, typer.Argument()],
        api_key: Annotated[str | None, secret_option("Key that clients must send.")] = None,
    ) -> None:
        print(f"works with {api_key}")

    return app


def test_a_secret_is_used_and_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text('api-key = "from-the-file"')
    app = _app_with_a_secret()
    for arguments, environment, origin in [
        (["--api-key", "from-the-flag"], {}, "flag"),
        ([], {"HELM_API_KEY": "from-the-environment"}, "environment: HELM_API_KEY"),
        (["--config", str(file)], {}, f"file: {file}"),
    ]:
        base = ["work", "m", *arguments]
        assert "works with from-the-" in CliRunner().invoke(app, base, env=environment).stdout
        for further in ("--dump-config", "--help"):
            shown = CliRunner().invoke(app, [*base, further], env=environment).stdout
            assert "from-the-" not in shown
            if further == "--dump-config":
                assert f"# api-key: a secret, left out ({origin})\n" in shown
