"""One gather, zeros for rows without a token."""

import jax
import jax.numpy as jnp


def spread_rows(x: jax.Array, token: jax.Array, place: jax.Array) -> jax.Array:
    del place
    return jnp.take(x, token, axis=0, mode="fill", fill_value=0)
