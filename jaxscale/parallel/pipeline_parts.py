"""What a pipeline's schedules are made of: rows dealt to micro-batches, chunks of layers where they are computed, the
ring of stages."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxscale.sharding import partitions

PP = "pp"


def chunks(x, stage, size: int, v: int):
    """This stage's layers [L / p, ...] as [v, L / (p v), ...]: where there are several chunks, those c with c mod p =
    stage instead of the v consecutive ones that rest here, one from and to each device at a time."""
    x = x.reshape(v, x.shape[0] // v, *x.shape[1:])
    if v == 1:
        return x
    out = x
    for sends, receives, perm in exchanges(size, v):
        moved = lax.ppermute(index(x, index(jnp.asarray(sends), stage)), PP, perm)
        out = lax.dynamic_update_index_in_dim(out, moved, index(jnp.asarray(receives), stage), 0)
    return out


@functools.cache
def exchanges(size: int, v: int) -> list[tuple[list[int], list[int], list[tuple[int, int]]]]:
    """Rounds in which every stage sends one of its chunks and receives one: (which it sends, as which it is received,
    from where to where). Each stage has v to send and v to receive, so v rounds do (König)."""
    left = {(c // v, c % size): [] for c in range(size * v)}
    for c in range(size * v):
        left[c // v, c % size].append(c)
    rounds = []
    for _ in range(v):
        to = _matching(size, {(s, d) for (s, d), chunks in left.items() if chunks})
        chunk = {s: left[s, d].pop() for d, s in to.items()}
        received = [chunk[to[d]] // size for d in range(size)]
        rounds.append(([chunk[s] % v for s in range(size)], received, [(s, d) for d, s in to.items()]))
    return rounds


def _matching(size: int, edges: set[tuple[int, int]]) -> dict[int, int]:
    """receiver -> sender, each once."""
    to: dict[int, int] = {}

    def place(s: int, seen: set[int]) -> bool:
        for d in range(size):
            if (s, d) in edges and d not in seen:
                seen.add(d)
                if d not in to or place(to[d], seen):
                    to[d] = s
                    return True
        return False

    for s in range(size):
        assert place(s, set())
    return to


def deal(x, K: int):
    """[B, ...] -> [p, K, b, ...]: of each device's rows K parts, one for each group of micro-batches. Nothing moves."""
    first, *rest = partitions(x)
    others = tuple(a for a in ((first,) if isinstance(first, str) else first) if a != PP)
    split = lambda x: x.reshape(1, K, x.shape[0] // K, *x.shape[1:])
    return jax.shard_map(split, out_specs=P(PP, None, others or None, *rest))(x)


def collect(x, layout):
    """The inverse of `deal`."""
    return jax.shard_map(lambda x: x.reshape(-1, *x.shape[3:]), out_specs=P(*layout))(x)


def whole(x, dim: int):
    """`x` with its dim `dim` on every stage."""
    return jax.reshard(x, P(*(None if d == dim else e for d, e in enumerate(partitions(x)))))


def shift(size: int, by: int):
    return lambda tree: jax.tree.map(lambda x: lax.ppermute(x, PP, [(s, (s + by) % size) for s in range(size)]), tree)


def index(x, i):
    return lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def choose(take, x, y):
    return jax.tree.map(functools.partial(jnp.where, take), x, y)


def zeros(like, *lead: int):
    """[*lead, *like.shape], laid out as `like`."""
    spec = P(*[None] * len(lead), *like.sharding.spec.partitions) if like.sharding is not None else P()
    return jnp.zeros((*lead, *like.shape), like.dtype, out_sharding=spec)
