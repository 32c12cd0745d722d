"""Is attention right on this GPU: values and every gradient, of what models combine, against float32.

    python benchmarks/attention/check.py                # everything, about five minutes, one table last
    python benchmarks/attention/check.py --only gemma   # the cases whose name holds a word

Each case draws fresh inputs in bfloat16 and prints relative errors of o, lse, dq, dk, dv and, where there are any,
dbias and dsinks. A case is wrong where an error is above 1e-2 or 1.5 times cuDNN's on the same inputs (where cuDNN can
do it), where a number is not finite, where one of three more runs differs in one bit, or where the kernels in the
program are not those that the case is about.
"""

import dataclasses
import functools
import os
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import runner


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes; what hides keys or changes logits; the backward kernels that are to run."""

    B: int
    T: int
    N: int
    K: int
    H: int
    Hv: int
    S: int | None = None
    causal: bool = True
    window: int | tuple[int | None, int | None] | None = None
    soft_cap: float | None = None
    bias: tuple[bool, bool, bool] | None = None  # which of batch, head, query it has values of their own for
    sinks: bool = False
    documents: int = 0
    restart: bool = False  # positions that restart in each document
    cudnn: bool = False
    kernels: tuple[str, ...] = ("dq", "dv_dk")


STORED, APART, FUSED = ("dv", "dq_stored", "dk_stored"), ("dq", "dk", "dv"), ("bwd",)
CASES = {
    "h256 gqa": Case(2, 1024, 16, 4, 256, 256, cudnn=True, kernels=STORED),
    "gemma global": Case(1, 1000, 16, 4, 256, 256, soft_cap=50.0, kernels=STORED),
    "gemma local": Case(1, 1500, 16, 4, 256, 256, window=512, soft_cap=50.0, kernels=STORED),
    "gemma 4096": Case(1, 8300, 8, 2, 256, 256, window=4096, soft_cap=50.0, kernels=STORED),
    "h256 window": Case(2, 1000, 16, 4, 256, 256, window=300, cudnn=True, kernels=STORED),
    "h256 bias": Case(2, 777, 16, 4, 256, 256, bias=(False, True, True), kernels=STORED),
    "h256 bias window cap": Case(1, 900, 16, 4, 256, 256, window=200, soft_cap=20.0, bias=(True, False, True),
                                 kernels=STORED),
    "h256 S != T, key bias": Case(2, 333, 8, 8, 256, 256, S=1100, causal=False, bias=(True, True, False),
                                  kernels=STORED),
    "h256 sinks": Case(2, 700, 16, 4, 256, 256, window=128, sinks=True, kernels=STORED),
    "h256 packed": Case(1, 1500, 16, 4, 256, 256, documents=7, soft_cap=50.0, kernels=APART),
    "mla": Case(2, 1000, 16, 16, 192, 128, kernels=STORED),
    "mla packed": Case(1, 1500, 16, 4, 192, 128, documents=7, restart=True, kernels=APART),
    "mla both sides": Case(1, 1300, 16, 4, 192, 128, causal=False, window=(200, 70), kernels=STORED),
    "h128 gqa": Case(2, 1024, 32, 8, 128, 128, cudnn=True),
    "h128 ragged": Case(2, 999, 32, 8, 128, 128),
    "h128 window": Case(2, 1536, 32, 8, 128, 128, window=300, cudnn=True),
    "h128 cap window": Case(1, 1500, 32, 8, 128, 128, window=300, soft_cap=30.0),
    "h128 packed": Case(2, 1700, 32, 8, 128, 128, documents=7),
    "h128 packed restart window": Case(2, 1500, 32, 8, 128, 128, documents=7, restart=True, window=128),
    "h128 bias sinks": Case(1, 1000, 32, 8, 128, 128, bias=(False, True, True), sinks=True),
    "h128 S != T": Case(2, 200, 16, 16, 128, 128, S=900, causal=False),
    "h64": Case(2, 1000, 16, 16, 64, 64, window=300, sinks=True, kernels=FUSED),
    "h64 full": Case(2, 1024, 8, 8, 64, 64, causal=False, cudnn=True, kernels=FUSED),
    "h64 gqa": Case(2, 1024, 32, 8, 64, 64, cudnn=True),
    "h64 window": Case(2, 1000, 32, 8, 64, 64, window=100, sinks=True),
    "h64 packed": Case(2, 1700, 32, 8, 64, 64, documents=9, restart=True),
    "h64 bias cap": Case(1, 1000, 16, 4, 64, 64, bias=(False, True, True), soft_cap=20.0),
    "h64 S != T": Case(2, 200, 16, 16, 64, 64, S=900, causal=False, kernels=FUSED),
    "h80": Case(2, 1000, 16, 4, 80, 80),
}  # fmt: skip


def draw(case: Case, seed: int):
    """q, k, v, bias, sinks (None where a case has none); cotangents of o and lse; ids, positions (or None)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    S = case.S or case.T
    keys = iter(jax.random.split(jax.random.key(seed), 7))
    new = lambda *shape: jax.random.normal(next(keys), shape, jnp.bfloat16)
    B, T, N, K = case.B, case.T, case.N, case.K
    q, k, v, do = new(B, T, N, case.H), new(B, S, K, case.H), new(B, S, K, case.Hv), new(B, T, N, case.Hv)
    if case.soft_cap:  # logits that the cap bends
        q *= 4
    dlse = jax.random.normal(next(keys), (B, T, N)) * (0.0 if case.cudnn else 1.0)
    bias = None if case.bias is None else new(*(n if own else 1 for n, own in zip((B, N, T), case.bias)), S)
    sinks = jax.random.normal(next(keys), (N,)) if case.sinks else None
    ids = positions = None
    if case.documents:
        rng = np.random.default_rng(seed)
        cuts = np.sort([rng.choice(np.arange(1, T), case.documents - 1, replace=False) for _ in range(B)])
        row = 1 + (np.arange(T)[None, :, None] >= cuts[:, None, :]).sum(axis=2)
        first = np.concatenate([np.zeros((B, 1), int), cuts], axis=1)[np.arange(B)[:, None], row - 1]
        ids = jnp.asarray(np.where(np.arange(T) < T - 20, row, 0), jnp.int32)  # the last ones are padding
        if case.restart:
            positions = jnp.asarray(np.arange(T) - first, jnp.int32)
    return (q, k, v, bias, sinks), (do, dlse), {"segment_ids": ids, "positions": positions}


def gradients(f):
    import jax

    def run(arrays, cotangents):
        out, vjp = jax.vjp(f, *arrays)
        return out, vjp(cotangents)

    return run


def cudnn_errors(case: Case, arrays, cotangents, exact):
    """Of o, dq, dk, dv."""
    import jax

    window = (case.window - 1, 0) if isinstance(case.window, int) else None
    attend = functools.partial(
        jax.nn.dot_product_attention, is_causal=case.causal, local_window_size=window, implementation="cudnn"
    )
    o, grads = jax.jit(gradients(attend))(arrays[:3], cotangents[0])
    return runner.errors((o, grads), (exact[0][0], exact[1][:3]))


def do(job) -> dict:
    import jax
    import jax.numpy as jnp

    from pallas_kernels import attention

    case = CASES[job[1]]
    seed = int.from_bytes(os.urandom(3), "little")
    arrays, cotangents, hidden = draw(case, seed)
    attend = functools.partial(attention, causal=case.causal, window=case.window, soft_cap=case.soft_cap, **hidden)

    def of(implementation):
        f = functools.partial(attend, return_lse=True, implementation=implementation)
        return gradients(lambda q, k, v, bias, sinks: f(q, k, v, bias=bias, sinks=sinks))

    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(of("reference"))(wide(arrays), wide(cotangents))
    run = jax.jit(of("mosaic_gpu")).lower(arrays, cotangents).compile()
    got = run(arrays, cotangents)
    names = ["o", "lse", "dq", "dk", "dv"] + ["dbias"] * (case.bias is not None) + ["dsinks"] * case.sinks

    finite = lambda tree: jax.tree.map(lambda x: jnp.where(jnp.isneginf(x), 0.0, x), tree)  # lse of rows without keys
    ours = dict(zip(names, runner.errors(finite(got), finite(exact)), strict=True))
    bounds = dict.fromkeys(names, 1e-2)
    peer = {}
    if case.cudnn:
        peer = dict(zip(("o", "dq", "dk", "dv"), cudnn_errors(case, arrays, cotangents, exact)))
        bounds |= {x: min(1e-2, 1.5 * e) for x, e in peer.items()}
    wrong = [f"{x} {ours[x]:.4f} > {bounds[x]:.4f}" for x in names if not ours[x] <= bounds[x]]
    if not all(runner.same(got, run(arrays, cotangents)) for _ in range(3)):
        wrong.append("two runs differ")
    ran = set(re.findall(r"00attention_(\w+?)_mosaic_gpu", run.as_text() or "")) - {"fwd"}
    if ran != set(case.kernels):
        wrong.append(f"ran {sorted(ran)}, not {sorted(case.kernels)}")
    return {"error": "; ".join(wrong), "ours": ours, "cudnn": peer, "seed": seed}


def main(argv: list[str] | None = None) -> int:
    args = runner.parser(__doc__, 600).parse_args(argv)
    if args.child:
        return runner.serve(do)
    results = runner.run([("check", name) for name in CASES], do, args, 90, __file__)
    print("\nrelative errors, cuDNN's on the same inputs in brackets")
    for job, r in results.items():
        ours, peer = r.get("ours", {}), r.get("cudnn", {})
        shown = (f"{x} {e:.5f}" + (f" ({peer[x]:.5f})" if x in peer else "") for x, e in ours.items())
        print(f"{job[1]:28}{r['error'] and 'WRONG ' + r['error'] + '  '}{'  '.join(shown)}")
    return runner.status(results)


if __name__ == "__main__":
    sys.exit(main())
