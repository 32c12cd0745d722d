"""The README's Python runs as it stands, top to bottom."""

import re
from pathlib import Path

import jax

ROOT = Path(__file__).parents[1]


def test_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"):
        exec("\n".join(blocks), names)
    assert int(names["state"].step) == 3
    said = capsys.readouterr().out
    assert "float32[16@fsdp,64,256@tp]" in said  # the type of the logits
    assert "layers/mlp/w_down" in said  # explain


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
