"""Eight simulated CPU devices, strict numerics. Flags must be set before jax initialises its backend."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs here run a few times, so compiling them is what takes long: half of it or more goes to LLVM's optimizations,
# half of the rest to XLA's newer emitter of CPU fusions (through MLIR). Processes that tests start inherit both.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    ]
).strip()

import tempfile
import zlib

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Many tests run the same program again (resumed runs, other inputs): compile it once a session.
_cache = tempfile.TemporaryDirectory(prefix="jaxscale-tests-")
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

# Draws of hypothesis: CI repeats those of the last run of the same test; a slow machine is no finding.
hypothesis.settings.register_profile(
    "tests",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize="TEST_SEED" in os.environ,
    database=None,
)
hypothesis.settings.load_profile("tests")


@pytest.fixture
def optimized():
    """For real models: running them takes longer than compiling them."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Fresh random numbers in each run; the seed is printed when the test fails. Where TEST_SEED is set (.ci/run sets
    the commit), each test draws from it and its own name instead, so what failed for a commit fails again."""
    return _generator(request.node.nodeid)


@pytest.fixture(scope="module")
def module_rng(request) -> np.random.Generator:
    """`rng` for what the tests of a file share."""
    return _generator(request.node.nodeid)


def _generator(name: str) -> np.random.Generator:
    given = os.environ.get("TEST_SEED")
    seed = zlib.crc32(f"{given} {name}".encode()) if given else int.from_bytes(os.urandom(4), "little")
    print(f"rng seed {seed}")
    return np.random.default_rng(seed)
