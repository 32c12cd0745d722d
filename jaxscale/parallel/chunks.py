"""In how many parts a device's tokens go to the experts: measured on the machine itself, as FSMoE does.

More parts let one travel while another is computed, and make each transfer and each matmul smaller. What wins depends
on the links, the sizes and the compiler's flags, so it is timed rather than modelled (arXiv 2501.10714).
"""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int

from jaxscale.parallel.expert import apply_experts


def fastest_chunks(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T K"],
    weights: Float[Array, "B T K"],
    p: dict[str, Array],
    *,
    counts: Iterable[int] = (1, 2, 4, 8),
    rounds: int = 5,
    **options: Any,
) -> tuple[int, dict[int, float]]:
    """The number of chunks with which `apply_experts` of these arrays runs fastest, forward and backward.

    Call it under the mesh of the training run, with activations and routing as they are there (`decoder.router_trace`
    gives the latter), and put the number into `MoEConfig.dispatch_chunks`. Each count is compiled, run, then timed.

    Args:
      options: of `apply_experts`.

    Returns:
      The count, the same on every process, and the seconds of each: medians, of the slowest process.

    Raises:
      ValueError: no counts, or one below 1.
    """
    counts = sorted(set(counts))
    if not counts or counts[0] < 1:
        raise ValueError(f"counts={counts} must be numbers of parts, from 1 on")

    def make(count: int) -> Callable[[], Any]:
        def loss(x, weights, p):
            y = apply_experts(x, experts, weights, p, chunks=count, **options)
            return jnp.sum(jnp.square(y.astype(jnp.float32)))

        run = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        return lambda: run(x, weights, p)

    return _fastest({count: make(count) for count in counts}, rounds)


def _fastest(runs: dict[int, Callable[[], Any]], rounds: int) -> tuple[int, dict[int, float]]:
    seconds = np.asarray([_median_seconds(run, rounds) for run in runs.values()])
    if jax.process_count() > 1:  # a step ends with its slowest process; and all must come to the same number
        seconds = np.asarray(multihost_utils.process_allgather(seconds)).max(axis=0)
    times = dict(zip(runs, seconds.tolist(), strict=True))
    return min(times, key=lambda count: times[count]), times


def _median_seconds(run: Callable[[], Any], rounds: int) -> float:
    jax.block_until_ready(run())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)
