"""Runs vLLM 0.32.0's own tests on three block pools and compares what passes: `make compat`.

The tests come from vLLM's source distribution and are unpacked beside it. Each run is a process of
its own with `pool_plugin`. Exit status 0: every test that passes on a pass-through of vLLM's pool
passes on ours, alone and beside a live EMB tenant, and the differential test holds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.report import machine, versions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNS = ("pass-through", "ours", "ours-with-emb")
DIFFERENTIAL_SEED = 1

TEST_FILES = (
    "tests/v1/core/test_prefix_caching.py",
    "tests/v1/core/test_kv_cache_utils.py",
    "tests/v1/core/test_single_type_kv_cache_manager.py",
    "tests/v1/core/test_scheduler.py",
    "tests/v1/core/test_kv_cache_metrics.py",
    "tests/v1/core/prefix_cache",
)
# Needs a real model's weights.
NOT_RUN = "tests/v1/core/prefix_cache/test_hybrid_prefix_cache_hit_rate.py"

# vLLM's own cleans up after engines with weights, which takes longer than these tests.
CONFTEST = """
import logging

import pytest


@pytest.fixture
def caplog_vllm(caplog):
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.INFO):
        yield caplog
"""
MARKERS = (
    "slow_test",
    "skip_global_cleanup",
    "core_model",
    "hybrid_model",
    "cpu_model",
    "cpu_test",
    "split",
    "distributed",
    "optional",
)
# The tests name models and read nothing of them but sizes, so sizes are all there is of them here.
MODEL_CONFIGS: dict[str, dict[str, Any]] = {
    "facebook/opt-125m": {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": 768,
        "word_embed_proj_dim": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "torch_dtype": "float16",
    },
    "Qwen/Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "torch_dtype": "bfloat16",
    },
    "Qwen/Qwen1.5-7B": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "torch_dtype": "bfloat16",
    },
}


def unpack(sdist: Path, place: Path) -> None:
    """Puts vLLM's tests and what they need around them into a fresh folder."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    with tarfile.open(sdist) as archive:
        members = []
        for member in archive.getmembers():
            inside = member.name.partition("/")[2]
            if inside.startswith("tests/"):
                members.append(member.replace(name=inside))
        archive.extractall(place, members=members, filter="data")
    (place / "tests" / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    markers = "".join(f"\n    {marker}" for marker in MARKERS)
    (place / "pytest.ini").write_text(f"[pytest]\nmarkers ={markers}\n", encoding="utf-8")
    for name, config in MODEL_CONFIGS.items():
        (place / name).mkdir(parents=True)
        (place / name / "config.json").write_text(json.dumps(config), encoding="utf-8")


def run_tests(run: str, place: Path) -> dict[str, str]:
    """Runs the tests on one pool; returns how each ended.

    Raises:
        SystemExit: the tests did not run to their end, or no pool of that kind was made.
    """
    report = place / f"{run}.json"
    environment = os.environ | {
        # vLLM's folder of tests has the same name as ours, and comes first.
        "PYTHONPATH": os.pathsep.join(map(str, (place, ROOT, HERE))),
        "COMPAT_POOL": run,
        "COMPAT_REPORT": str(report),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "pool_plugin"]
    command = [sys.executable, "-m", "pytest", *options, f"--ignore={NOT_RUN}", *TEST_FILES]
    log = place / f"{run}.log"
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(
            command, cwd=place, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    if done.returncode not in (0, 1):
        sys.exit(f"compat {run}: pytest ended with {done.returncode}, see {log}")
    result = json.loads(report.read_text(encoding="utf-8"))
    if not result["pools_made"]:
        sys.exit(f"compat {run}: the tests made no pool of ours")
    outcomes: dict[str, str] = result["outcomes"]
    return outcomes


def passed(outcomes: dict[str, str]) -> set[str]:
    """The tests that passed."""
    return {test for test, outcome in outcomes.items() if outcome == "passed"}


def per_file(tests: set[str]) -> dict[str, int]:
    """How many tests there are of each file."""
    counts = Counter(test.partition("::")[0] for test in tests)
    return dict(sorted(counts.items()))


def differential(operations: int, place: Path) -> dict[str, int] | None:
    """Random operations on both pools; how often each was done, or None where they differed."""
    counts = place / "differential.json"
    command = [sys.executable, str(HERE / "differential.py"), "--json", str(counts)]
    command += ["--seed", str(DIFFERENTIAL_SEED)]
    done = subprocess.run([*command, "--operations", str(operations)])
    if done.returncode:
        return None
    found: dict[str, int] = json.loads(counts.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Runs everything, prints a line for each run, writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sdist", type=Path, required=True, help="vLLM's source distribution")
    parser.add_argument("--operations", type=int, default=100_000, help="of the differential test")
    parser.add_argument("--json", type=Path, required=True, help="where the outcome goes")
    args = parser.parse_args()
    place = args.sdist.resolve().parent / "vllm-tests"
    unpack(args.sdist, place)
    outcomes = {}
    for run in RUNS:
        outcomes[run] = run_tests(run, place)
        print(f"compat {run}: {len(passed(outcomes[run]))} passed", flush=True)
    wanted = passed(outcomes["pass-through"])
    broken = {run: sorted(wanted - passed(outcomes[run])) for run in RUNS[1:]}
    for run, tests in broken.items():
        for test in tests:
            print(f"compat {run}: fails {test}")
    silent = [path for path in TEST_FILES if not any(test.startswith(path) for test in wanted)]
    for path in silent:
        print(f"compat pass-through: nothing passes in {path}")
    operations = differential(args.operations, place)
    result = {
        "command": "make compat",
        "machine": machine(),
        "versions": versions(),
        "seeds": [DIFFERENTIAL_SEED],
        "passed": {run: len(passed(outcomes[run])) for run in RUNS},
        "not_passed": {run: len(outcomes[run]) - len(passed(outcomes[run])) for run in RUNS},
        "passed_per_file": {run: per_file(passed(outcomes[run])) for run in RUNS},
        "passed_on_pass_through_only": broken,
        "differential_operations": operations and sum(operations.values()),
        "differential_operations_by_name": operations,
    }
    args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if any(broken.values()) or silent or operations is None:
        sys.exit(1)


if __name__ == "__main__":
    main()
