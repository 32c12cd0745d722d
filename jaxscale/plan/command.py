"""`jaxscale plan`: will this model fit on that pod, with which mesh, how fast, and what does the compiler say."""

import dataclasses
import math
from typing import Literal

from jaxscale.config import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Plan a training run for hardware that need not be here."""

    model: str = "llama3-8b"
    """the name of a published model"""
    on: str = "v5p:4x4x4"
    """KIND:CHIPS for TPU slices (v5p:8x8x8, v6e:16x16, tpu7x:4x4x4), KIND:HOSTSxDEVICES for GPUs (h200:128x8)"""
    seq: int = 4096
    """tokens of a row"""
    batch: str = "64"
    """rows of a step over all devices, or tokens: 4M-tokens"""
    mesh: str = ""
    """check this one, for example fsdp=32,tp=4; empty: search"""
    remat: Literal["any", "none", "dots", "full"] = "any"
    hardware: str = ""
    """a TOML file with measured rates; empty: the table's"""
    compile: bool = False
    """ask the real compiler about the best three meshes, or about --mesh (a minute each on a laptop)"""
    quick: bool = False
    """with --compile: XLA's lowest optimisation level, faster to compile for v6e and tpu7x; memory within 5 %"""
    report: str = "report.html"
    """the page with pictures that is written; empty: none"""


def plan_command(options: PlanOptions) -> int:
    """Prints the plan; returns the exit status. Every mistake is a ValueError with one line."""
    import jax

    from jaxscale.models.presets import preset
    from jaxscale.plan.hardware import find_pod
    from jaxscale.plan.search import search
    from sharding_rules.hardware import find_hardware

    if options.compile:  # nothing runs here: the compilers for TPU and GPU are asked by name
        jax.config.update("jax_platforms", "cpu")
    model = preset(options.model)
    if options.seq < 1:
        raise ValueError(f"--seq {options.seq} is no number of tokens; use 1 to {model.max_seq_len}")
    if options.seq > model.max_seq_len:
        raise ValueError(f"--seq {options.seq} is longer than {model.name} takes: {model.max_seq_len}")
    pod = find_pod(options.on, find_hardware(options.hardware) if options.hardware else None)
    batch_size = rows_of(options.batch, options.seq)
    found = search(
        model,
        pod,
        batch_size=batch_size,
        seq_len=options.seq,
        mesh=MeshConfig.parse(options.mesh) if options.mesh else None,
        remats=("none", "dots", "full") if options.remat == "any" else (options.remat,),
    )
    print(found, flush=True)
    compiled = None
    try:
        if options.compile:
            from jaxscale.plan.confirm import confirm

            confirmed = confirm(found, batch_size=batch_size, seq_len=options.seq, quick=options.quick)
            found, compiled = confirmed.plan, confirmed.best.compiled
            print(f"\n{confirmed}")
    finally:  # without a compiler the estimate's page still comes
        if options.report:
            from jaxscale.plan.report import write_report

            print(f"\nwritten: {write_report(found, options.report, compiled)}")
    return 0


def rows_of(batch: str, seq_len: int) -> int:
    """`512` rows, or `4M-tokens` -> rows of seq_len tokens. K is 2**10 and M is 2**20, as batches are counted.

    Raises:
      ValueError: neither form, or fewer tokens than one row holds.
    """
    text, tokens, rest = batch.lower().replace("_", "").partition("-tokens")
    scale = {"k": 2**10, "m": 2**20}.get(text[-1:], 1)
    number = text[:-1] if scale > 1 else text
    if rest or not number.isdecimal() or not int(number) or (scale > 1 and not tokens):  # 4M rows: tokens are meant
        raise ValueError(f"--batch {batch!r} is neither rows (512) nor tokens (4M-tokens, 512K-tokens)")
    count = int(number) * scale
    if not tokens:
        return count
    if count < seq_len:
        raise ValueError(f"--batch {batch!r} is less than one row of {seq_len} tokens; use at least {seq_len}-tokens")
    if count % seq_len:
        below, above = count // seq_len * seq_len, math.ceil(count / seq_len) * seq_len
        raise ValueError(f"--batch {batch!r} is not whole rows of {seq_len} tokens; use {below} or {above} tokens")
    return count // seq_len
