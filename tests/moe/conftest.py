"""Programs here run once: the CPU's code generator may be quick. Partitioning and its collectives stay as they are."""

import jax
import pytest


@pytest.fixture(autouse=True)
def quick_code():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
