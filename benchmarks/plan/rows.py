"""Rows of a benchmark, each measured by its script in a process of its own (whose peak memory is the row's), kept as
lines of JSON; the newest of each row counts."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def main(
    doc: str | None,
    script: str,
    rows: Sequence[tuple],
    measure: Callable[[tuple, argparse.Namespace], dict[str, Any]],
    table: Callable[[Path], str],
    **flags: str,
) -> None:
    """The command line of a script: --rows TEXT, --out FILE, --table FILE, and --FLAG for each of `flags` (help)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="only those that hold this text")
    parser.add_argument("--out", type=Path, default=Path(script).with_suffix(".jsonl").name)
    parser.add_argument("--one", type=int, help="measure this row and print it")
    parser.add_argument("--table", type=Path, help="print the table of a file that --out wrote")
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
    elif args.one is not None:
        print(json.dumps(measure(rows[args.one], args)))
    else:
        asked = [f"--{flag}" for flag in flags if getattr(args, flag)]
        chosen = [i for i, row in enumerate(rows) if args.rows in " ".join(map(str, row))]
        sys.exit(sum(not _run(script, i, rows[i], args.out, asked) for i in chosen))


def newest(path: Path, rows: Sequence[tuple]) -> list[dict[str, Any]]:
    """The last record of each of `rows` that the file has, in their order."""
    found = {tuple(r["row"]): r for r in map(json.loads, path.read_text().splitlines())}
    return [found[row] for row in rows if row in found]


def _run(script: str, index: int, row: tuple, out: Path, flags: list[str]) -> bool:
    command = [sys.executable, script, "--one", str(index), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(row, "failed" if done.returncode else "done", flush=True)
    if done.returncode == 0:
        with out.open("a") as file:
            file.write(done.stdout.splitlines()[-1] + "\n")
    return done.returncode == 0
