"""`python -m tests.golden FILE...`: one line per output, exit status 1 above a tolerance."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.golden.case import read_case
from tests.golden.runner import run_case


def main() -> int:
    """Runs the cases named on the command line; 2 = a case could not be run."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    arguments = parser.parse_args()
    status = 0
    for path in arguments.files:
        try:
            checks = run_case(read_case(path), arguments.device)
        except (ValueError, RuntimeError) as error:
            print(f"{path.name}: refused: {error}")
            status = 2
            continue
        for check in checks:
            verdict = "ok" if check.passed else "differs" if check.optional else "FAILED"
            note = " (optional: its _table_cap twin counts)" if check.optional else ""
            print(
                f"{path.name}: {check.name}: largest error {check.largest_error:.2e}: "
                f"{verdict}{note}"
            )
            if not check.passed and not check.optional:
                status = max(status, 1)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
