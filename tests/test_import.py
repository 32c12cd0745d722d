"""`import jaxscale` costs at most 0.3 s beyond `import jax`, and brings no heavy package with it."""

import subprocess
import sys

HEAVY = ("orbax", "grain", "tokenizers", "optax", "flax", "scipy", "matplotlib", "gguf", "tyro", "rich", "tensorstore")


def test_import_is_cheap():
    code = "import time, jax; start = time.process_time(); import jaxscale; print(time.process_time() - start)"
    times = [float(subprocess.check_output([sys.executable, "-c", code], text=True)) for _ in range(2)]
    assert min(times) < 0.3


def test_import_brings_no_heavy_package():
    code = f"""
import sys, jax
before = set(sys.modules)
import jaxscale
print([m for m in {HEAVY} if m in sys.modules and m not in before])
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_every_public_name_loads():
    import jaxscale

    for name in jaxscale.__all__:
        assert getattr(jaxscale, name) is not None
    assert set(jaxscale.__all__) <= set(dir(jaxscale))
