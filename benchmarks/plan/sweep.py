"""The planner's choice beside every mesh there is: each is compiled ahead of time and its own collectives are priced.

python benchmarks/plan/sweep.py --model tiny --on cpu:4 --rows 8 --seq 256          # minutes
python benchmarks/plan/sweep.py --model smollm2-135m --on h200:1x4 --rows 16 --seq 2048
"""

import argparse
import os

os.environ["JAX_PLATFORMS"] = "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--on", default="cpu:4")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    args = parser.parse_args()
    if args.on.startswith("cpu:"):
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.on[4:]}"
    from jaxscale.models.presets import preset
    from jaxscale.plan.confirm import TOP, confirm
    from jaxscale.plan.search import search

    sizes = {"batch_size": args.rows, "seq_len": args.seq}
    found = search(preset(args.model), args.on, **sizes)
    every = confirm(found, top=len(found.fitting), **sizes)
    print(every.table())
    asked = {e.mesh for e in found.fitting[:TOP]}
    chosen = min((c for c in every.candidates if c.estimate.mesh in asked), key=lambda c: c.seconds)
    first = next(c for c in every.candidates if c.estimate.mesh == found.best.mesh)
    best = every.best.seconds
    print(
        f"{args.model} on {args.on}, {len(every.candidates)} meshes: by the estimate alone {found.best.mesh}, "
        f"{first.seconds / best - 1:+.1%}; the best of {TOP} compiled {chosen.estimate.mesh}, "
        f"{chosen.seconds / best - 1:+.1%}; of all {every.best.estimate.mesh}"
    )


if __name__ == "__main__":
    main()
