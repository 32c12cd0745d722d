"""A row of docs/pipeline.md's table, made as the table is."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "plan" / "stages.py"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="compiles for GPUs: jax[cuda13]")
def test_a_row_of_the_table_is_what_the_estimate_says(tmp_path):
    one = subprocess.run([sys.executable, SCRIPT, "--quick", "--one", "0"], capture_output=True, text=True, check=True)
    (line,) = (line for line in one.stdout.splitlines() if line.startswith("{"))
    assert json.loads(line)["row"][2] == "pp=2,fsdp=8"
    (tmp_path / "row.jsonl").write_text(line)
    command = [sys.executable, SCRIPT, "--table", tmp_path / "row.jsonl"]
    *_, row = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    *_, memory, _, payload, _ = row.split("|")
    assert abs(float(memory.strip(" %"))) < 5 and abs(float(payload.strip(" %"))) < 1, row
