"""The README's Python runs as it stands, top to bottom."""

import re
import shlex
from pathlib import Path

import jax

from jaxscale import cli, distributed
from jaxscale import run as running
from jaxscale.plan.check import check_config

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


def test_commands_that_train_fit_their_devices(monkeypatch):
    """Of the README and the guides, each up to where its corpus would be read."""
    runs = []
    monkeypatch.setattr(distributed, "initialize", lambda: None)
    monkeypatch.setattr(running, "run", runs.append)
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    commands = re.findall(r"^jaxscale (train tiny.*)$", "\n".join(p.read_text() for p in pages), re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        args = shlex.split(command, comments=True)
        count = int(args.pop(args.index("--simulate") + 1)) if "--simulate" in args else 1
        assert cli.main([a for a in args if a != "--simulate"]) == 0, command
        check_config(runs[-1], count)
    assert len(runs) == len(commands)
