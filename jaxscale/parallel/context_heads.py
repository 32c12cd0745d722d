"""Ulysses (arXiv 2309.14509): the heads of neighbours for the tokens of all of them."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.parallel.context_blocks import Call, Cotangent
from jaxscale.parallel.context_rows import dealt, in_order


class Heads:
    """Splits heads over the `group` devices of a group instead of tokens, and back.

    Query heads that do not divide are padded, in each group of a kv head or by whole groups, whatever is less. A kv
    head that several devices need is sent to each of them; its gradients are added up at home.
    """

    def __init__(self, call: Call, N: int, K: int):
        self.call, self.K, self.G = call, K, N // K
        self.u = u = call.group
        wider = -(-self.G // (u // math.gcd(u, K))) * (u // math.gcd(u, K))  # queries of a kv head
        more = -(-K // (u // math.gcd(u, self.G))) * (u // math.gcd(u, self.G))  # kv heads
        self.padded = (K, wider) if K * wider <= more * self.G else (more, self.G)
        self.copies = math.lcm(self.padded[0], u) // self.padded[0]
        first = [list(range(i, i + u)) for i in range(0, call.size, u)]
        self.groups = None if u == call.size else first

    def split_q(self, x: jax.Array) -> jax.Array:
        """[B, T, N, ...] -> [B, group * T, padded N // group, ...]."""
        if self.u == 1:
            return x
        B, T, _, *rest = x.shape
        x = x.reshape(B, T, self.K, self.G, *rest)
        K, G = self.padded
        x = jnp.pad(x, [(0, 0), (0, 0), (0, K - self.K), (0, G - self.G), *[(0, 0)] * len(rest)])
        return self._exchange(x.reshape(B, T, K * G, *rest))

    def join_q(self, x: jax.Array) -> jax.Array:
        """The inverse of split_q."""
        if self.u == 1:
            return x
        x = self._return(x)
        B, T, _, *rest = x.shape
        x = x.reshape(B, T, *self.padded, *rest)[:, :, : self.K, : self.G]
        return x.reshape(B, T, self.K * self.G, *rest)

    def split_kv(self, x: jax.Array) -> jax.Array:
        """[B, T, K, H] -> [B, group * T, the kv heads of this device's query heads, H]."""
        if self.u == 1:
            return x
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.padded[0] - self.K), (0, 0)))
        return self._exchange(jnp.repeat(x, self.copies, axis=2))

    def join_kv(self, x: jax.Array, dtype) -> jax.Array:
        """The transpose of split_kv, from and, where parts are added, in float32."""
        if self.u == 1:
            return x
        x = self._return(x if self.copies > 1 else x.astype(dtype))
        B, T, _, H = x.shape
        return x.reshape(B, T, self.padded[0], self.copies, H).sum(axis=3)[:, :, : self.K]

    def split_cotangent(self, cotangent: Cotangent) -> Cotangent:
        if self.u == 1:
            return cotangent
        rows = self.split_q(jnp.stack([cotangent.lse, cotangent.delta], axis=-1))
        return Cotangent(self.split_q(cotangent.dout), rows[..., 0], rows[..., 1])

    def _exchange(self, x: jax.Array) -> jax.Array:
        x = lax.all_to_all(x, self.call.axis_name, 2, 1, tiled=True, axis_index_groups=self.groups)
        return in_order(x, self.call.layout, self.u)

    def _return(self, x: jax.Array) -> jax.Array:
        x = dealt(x, self.call.layout, self.u)
        return lax.all_to_all(x, self.call.axis_name, 1, 2, tiled=True, axis_index_groups=self.groups)


def largest_group(K: int, size: int) -> int:
    """The largest part of cp that divides the kv heads too, so that none is sent twice."""
    return math.gcd(K, size)
