"""Traces every pair of features for hardware that is not here, and writes the table of docs/planner.md.

python benchmarks/plan/composition.py                          # about 40 minutes on one core; needs no accelerator
python benchmarks/plan/composition.py --only tp,precision=fp8  # pairs of these; of the others what the page says
python benchmarks/plan/composition.py --kernels                # the table of attention's kernels alone: seconds
"""

import argparse
import itertools
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from jaxscale.plan.check import Feature, Verdict, apart

DOCS = Path(__file__).parents[2] / "docs" / "planner.md"
BEGIN, END = "<!-- pairs: benchmarks/plan/composition.py -->", "<!-- end of pairs -->"
KERNELS = "<!-- kernels: benchmarks/plan/composition.py --kernels -->", "<!-- end of kernels -->"
HARDWARE = ("h200", "v5p")
# Hardware enters by the attention kernel alone: pairs that it sees are traced for each, others for the first.
KERNEL = ("cp", "layout", "rows", "layers", "soft caps", "dtype", "head_dim", "tp")
HEAD_DIMS, DTYPES = (64, 80, 128, 256, 512), ("bfloat16", "float16", "float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--only", default="", help="features, comma-separated, whose pairs are traced anew")
    parser.add_argument("--kernels", action="store_true", help="only the table of attention's kernels")
    args = parser.parse_args()
    write(args.docs, KERNELS, "\n".join(kernels()))
    if not args.kernels:
        only = args.only.split(",") if args.only else []
        write(args.docs, (BEGIN, END), sections(only, refused(args.docs.read_text())))


def write(path: Path, marks: tuple[str, str], text: str) -> None:
    """Puts `text` between two lines of a file."""
    before, _, rest = path.read_text().partition(marks[0])
    path.write_text(f"{before}{marks[0]}\n{text}\n{marks[1]}{rest.partition(marks[1])[2]}")


def refused(text: str) -> dict[frozenset[str], str]:
    """Pair -> why, from the page."""
    table = text.partition(BEGIN)[2].partition(END)[0].partition("| feature |")[2]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", table, re.MULTILINE)
    return {frozenset((a, b)): why for a, others, why in rows for b in others.split(", ") if a != "---"}


def sections(only: Collection[str] = (), page: Mapping[frozenset[str], str] | None = None) -> str:
    """Markdown: what runs alone, what does not run together and why.

    Args:
      only: trace the pairs of these features, all by default; `page` says which of the others are refused.
    """
    from jaxscale.plan.check import FEATURES, verdict

    if unknown := set(only) - set(FEATURES):
        raise SystemExit(f"no feature {', '.join(sorted(unknown))}; there are {', '.join(FEATURES)}")
    alone = {name: verdict([name], HARDWARE[0]) for name in FEATURES}
    built = [name for name, found in alone.items() if found.runs]
    together = {}
    for a, b in itertools.combinations(built, 2):
        first, second = FEATURES[a], FEATURES[b]
        if only and not {a, b} & set(only) and first.kind != second.kind and not apart(first, second):
            why = (page or {}).get(frozenset((a, b)), "")
            together[a, b] = {HARDWARE[0]: Verdict("refused" if why else "runs", why)}
            continue
        together[a, b] = {hw: verdict([a, b], hw) for hw in hardware_of(first, second)}
        print(a, "+", b, *dict.fromkeys(f"{v.state} {v.why}" for v in together[a, b].values()), flush=True)
    return markdown(alone, together)


def hardware_of(a: Feature, b: Feature) -> tuple[str, ...]:
    """What a pair is traced for."""
    return HARDWARE if a.kind in KERNEL and b.kind in KERNEL else HARDWARE[:1]


def markdown(alone: dict[str, Verdict], together: dict[tuple[str, str], dict[str, Verdict]]) -> str:
    built = [name for name, found in alone.items() if found.runs]
    lines = [f"Features: {', '.join(built)}.", "", "| not there | says |", "|---|---|"]
    lines += [f"| {name} | {found.why} |" for name, found in alone.items() if not found.runs]
    counts: dict[str, int] = dict.fromkeys(("runs", "refused", "alternatives", "apart"), 0)
    reasons: dict[tuple[str, str], list[str]] = {}  # (feature, why) -> with
    for (a, b), found in together.items():
        counts[next((v.state for v in found.values() if not v.runs), "runs")] += 1
        for why in dict.fromkeys(v.why for v in found.values() if v.state == "refused"):
            where = [hw for hw, v in found.items() if v.why == why]
            why = why if len(where) == len(found) else f"{', '.join(where)}: {why}"
            reasons.setdefault((a, why), []).append(b)
    lines += ["", f"Of {len(together)} pairs {counts['runs']} run, {counts['refused']} are refused, "]
    lines[-1] += f"{counts['alternatives']} are choices of one kind, {counts['apart']} never meet in one program."
    lines += ["", "| feature | does not run with | says |", "|---|---|---|"]
    lines += [f"| {a} | {', '.join(others)} | {short(why)} |" for (a, why), others in reasons.items()]
    return "\n".join(lines)


def short(why: str) -> str:
    return (why if len(why) <= 160 else why[:157] + "...").replace("|", "/")


def kernels() -> list[str]:
    """The kernel that attention runs on each hardware, and why not the ones before it."""
    from jaxscale.plan.check import DEVICES, attention_backend

    lines = ["| attention | " + " | ".join(f"{t}, {d}" for t in DTYPES for d in HEAD_DIMS) + " |"]
    lines += ["|---" * (len(DTYPES) * len(HEAD_DIMS) + 1) + "|"]
    for kind in DEVICES:
        chosen = [attention_backend(kind, dim, dtype)[0] for dtype in DTYPES for dim in HEAD_DIMS]
        lines += [f"| {kind} | " + " | ".join(chosen) + " |"]
    return lines


if __name__ == "__main__":
    main()
