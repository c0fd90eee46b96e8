"""Run the fault campaign: `PYTHONPATH=test python -m faults --out faults_output`."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from faults.campaign import MODULES, groups, run_group, write_report


def main() -> int:
    """Run the cases and write a report; 1 if an outcome is not allowed."""
    # A shell that starts this in the background makes it, and the commands it stops, ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("--group", choices=sorted(MODULES), action="append", help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="cases of each group")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the report")
    args = parser.parse_args()
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        for group in args.group or groups():
            place = Path(folder) / group
            verdicts += run_group(group, place, seed=args.seed, count=args.sample, only=args.only)
    write_report(verdicts, args.out, seed=args.seed)
    wrong = sum(not verdict.is_allowed for verdict in verdicts)
    print(f"{len(verdicts)} faults, {wrong} outcomes not allowed; report in {args.out}/faults.md")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
