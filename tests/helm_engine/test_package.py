"""The package as it is installed: names, light imports, and a clear word about foreign ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.e2e.running_server import REPOSITORY, command


def test_a_foreign_package_that_shadows_a_room_is_named(tmp_path: Path) -> None:
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / "__init__.py").write_text("")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; import helm_engine",
        ],
        capture_output=True,
        text=True,
        cwd=REPOSITORY.parent,
    )
    assert done.returncode != 0
    assert "'router'" in done.stderr
    assert str(tmp_path) in done.stderr


def test_the_command_explains_itself_without_loading_torch() -> None:
    program = (
        "import sys; from typer.testing import CliRunner;"
        "from helm_engine.entrypoints.cli import app;"
        "from helm_engine.entrypoints.engine_options import EngineOptions;"
        "result = CliRunner().invoke(app, ['serve', '--help']);"
        "assert result.exit_code == 0, result.output;"
        "flags = ['--' + name.replace('_', '-') for name in EngineOptions.__dataclass_fields__];"
        "assert not [flag for flag in flags if flag not in result.output], result.output;"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_tells_its_version() -> None:
    done = subprocess.run(command("--version"), capture_output=True, text=True)
    assert done.stdout == "helm-engine 0.1.0\n"


def test_a_bad_flag_is_refused_with_status_2() -> None:
    for flags in (["--pool-bytes", "many"], ["--emb-fraction", "1.5"], ["--device", "tpu"]):
        done = subprocess.run(
            command("serve", "examples/models/hstu-ml-100k", "--port", "0", *flags),
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
        )
        assert done.returncode == 2
        (message,) = done.stderr.strip().splitlines()
        assert flags[0].strip("-").replace("-", "_") in message
