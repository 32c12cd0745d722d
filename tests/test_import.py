"""Imports: `import jaxscale` costs at most 0.3 s beyond `import jax`, and brings no heavy package with it."""

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


def test_help_and_mistyped_commands_do_not_wait_for_jax():
    code = """
import sys
from jaxscale import cli
assert cli.main(["--help"]) == 0 and cli.main(["trian"]) == 2 and cli.main(["train", "tiny", "--steps", "0"]) == 2
print("jax" in sys.modules)
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1] == "False"


def test_functions_of_the_rules_keep_their_names_from_the_modules_that_hold_them():
    code = """
import sharding_rules.search, sharding_rules.infer
from sharding_rules import infer, search
assert callable(infer) and search is sharding_rules.search and callable(sharding_rules.search)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_first_trace_imports_does_not_make_the_second_call_trace_again():
    code = """
import jax
from jaxscale.models import decoder, presets
from jaxscale.params import abstract_params
cfg, traced = presets.tiny(), []
def forward(params, tokens):
    traced.append(1)
    return decoder.forward(params, tokens, cfg)
forward = jax.jit(forward)
for _ in range(2):
    forward.trace(abstract_params(decoder.param_specs(cfg)), jax.ShapeDtypeStruct((1, 64), "int32"))
print(len(traced))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["1"]
