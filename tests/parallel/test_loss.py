"""The loss over a vocabulary: values and gradients in half precision, and the dtypes that its matmuls meet."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.parallel.tensor import token_losses


def mean_loss(x, head, labels, chunk):
    return token_losses(x, head, labels, chunk=chunk)[0].mean()


@pytest.mark.parametrize("chunk", [64, 5])
def test_half_precision_against_float64(rng, chunk):
    x = jnp.asarray(rng.standard_normal((2, 8, 16)), jnp.bfloat16)
    head = jnp.asarray(rng.standard_normal((16, 40)), jnp.bfloat16)
    labels = jnp.asarray(rng.integers(40, size=(2, 8)), jnp.int32)
    loss, (dx, dhead) = jax.value_and_grad(mean_loss, (0, 1))(x, head, labels, chunk)

    rows, w = np.asarray(x, np.float64).reshape(16, 16), np.asarray(head, np.float64)
    logits = rows @ w
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    picked = np.asarray(labels).ravel()
    np.testing.assert_allclose(loss, -np.log(p[np.arange(16), picked]).mean(), rtol=1e-4)
    p[np.arange(16), picked] -= 1
    for got, want in ((dx, (p @ w.T / 16).reshape(2, 8, 16)), (dhead, rows.T @ p / 16)):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=1e-2 * np.abs(want).max())


def test_no_matmul_of_the_vocabulary_in_float32():
    shapes = [((2, 64, 16), jnp.bfloat16), ((16, 40), jnp.bfloat16), ((2, 64), jnp.int32)]
    program = str(
        jax.make_jaxpr(jax.grad(lambda *a: mean_loss(*a, 64), (0, 1)))(*(jax.ShapeDtypeStruct(*s) for s in shapes))
    )
    types = dict(re.findall(r"(\w+):(bf16|f32)\[", program))
    operands = re.findall(r"= dot_general\[.*?\] (\w+) (\w+)", program, flags=re.DOTALL)
    assert len(operands) == 4  # the logits, again in the backward pass, and both gradients
    assert {types[name] for pair in operands for name in pair} == {"bf16"}


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("chunk", [64, 5])
def test_gradients_of_losses_and_logsumexps(rng, chunk, cap):
    """Against what jax derives from the formula, with a cotangent of its own for each output."""
    x = jnp.asarray(rng.standard_normal((2, 8, 16)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((16, 40)), jnp.float32)
    labels = jnp.asarray(rng.integers(40, size=(2, 8)), jnp.int32)
    weights = [jnp.asarray(rng.standard_normal((2, 8)), jnp.float32) for _ in range(2)]

    def formula(x, head):
        logits = x @ head
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        lse = jax.nn.logsumexp(logits, axis=-1)
        return lse - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0], lse

    def total(losses, x, head):
        nll, lse = losses(x, head)
        return (nll * weights[0] + jnp.square(lse) * weights[1]).sum()

    ours = lambda x, head: token_losses(x, head, labels, chunk=chunk, logit_soft_cap=cap)
    with jax.default_matmul_precision("highest"):
        want = jax.value_and_grad(total, (1, 2))(formula, x, head)
        got = jax.value_and_grad(total, (1, 2))(ours, x, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max()), got, want)
