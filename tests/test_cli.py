"""The command line: a user's mistake is one line without a stack trace, a preempted run ends with 75 and resumes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxscale import cli


def call(capsys, *args):
    status = cli.main(list(args))
    out = capsys.readouterr()
    return status, out.out, out.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "no command 'trian' (did you mean 'train'?)"),
        (["train", "tinny"], "no run 'tinny' (did you mean 'tiny'?)"),
        (["train", "smolm2-135m"], "no run 'smolm2-135m' (did you mean 'smollm2-135m'?)"),
        (["train", "nowhere.gguf"], "nowhere.gguf is no model; give a name (smollm2-135m), a .gguf file"),
        (["train", "nowhere.py:run"], "nowhere.py is not a file"),
        (
            ["train", "tiny", "--model.num-layerz", "3"],
            "no option '--model.num-layerz' (did you mean '--model.num-layers'?)",
        ),
        (
            ["train", "tiny", "--model.moe.num-experts", "8"],
            "no option '--model.moe.num-experts': model.moe is None in this run; name one that has it",
        ),
        (["train", "tiny_moe", "--model.moe.num-experts", "1"], "top_k=2 must lie between 1 and the 1 experts"),
        (
            ["train", "tiny", "--model.num-kv-heads", "3"],
            "num_heads=4 is not divisible by num_kv_heads=3; use num_kv_heads",
        ),
        (["train", "tiny", "--model.dtype", "float13"], "float13"),
        (["train", "tiny", "--data.seq-len", "4096"], "seq_len=4096 is longer than the model's max_seq_len=512"),
        (["train", "tiny", "--simulate", "many"], "--simulate many: expected a number of devices"),
        (["train", "tiny", "--mesh.fsdp", "3"], "needs 3 devices but 8 are there"),
        (["train", "tiny", "--mesh.fsdp", "-1", "--mesh.tp", "5"], "a multiple of 5 devices but 8 are there"),
        (["train", "tiny", "--mesh", "fsdp=2,tp=3"], "needs 6 devices but 8 are there"),
        (["train", "tiny", "--mesh=fsdp=-1,tp=5"], "a multiple of 5 devices but 8 are there"),
        (["train", "tiny", "--mesh", "fsdp=2", "--mesh.tp", "3"], "needs 6 devices but 8 are there"),
        (["train", "tiny", "--mesh", "fdsp=2"], "'fdsp=2' is not axis=size"),
        (["train", "tiny", "--mesh", "fsdp=²"], "'fsdp=²' is not axis=size"),
        (["train", "tiny", "--mesh", "fsdp=4,tp=2,fsdp=8"], "fsdp is given twice, 4 and 8"),
        (["train", "tiny", "--accum-steps", "0"], "accum_steps=0 must be at least 1"),
        (["train", "tiny", "--loss-chunk", "-1"], "loss_chunk=-1 must be at least 1"),
        (["train", "tiny", "--eval-every", "0"], "eval_every=0 must be at least 1"),
        (["train", "tiny", "--log-every", "0"], "log_every=0 must be at least 1"),
        (["train", "tiny", "--seed", str(10**20)], "must be at least 0 and less than 2**63"),
        (["train", "tiny", "--optimizer.learning-rate", "nan"], "learning_rate=nan must be positive and finite"),
        (["train", "tiny", "--optimizer.warmup-steps", "-1"], "error: optimizer: warmup_steps=-1 must be at least 0"),
        (["train", "tiny", "--z-loss", "nan"], "error: z_loss=nan must be at least 0 and finite, such as 0.0"),
        (["train", "tiny", "--precision-skip", "("], "precision_skip='(' is no regular expression"),
        (["train", "tiny", "--model.norm-eps", "-1"], "norm_eps=-1.0 must be positive and finite, such as 1e-05"),
        (["train", "tiny", "--model.max-seq-len", "0"], "error: model: max_seq_len=0 must be at least 1, such as 4096"),
        (["train", "tiny", "--data.batch-size", "7"], "fsdp*ep*accum_steps=8; use 8 rows"),
        (["train", "tiny", "--mesh", "ep=8"], "has no experts to split over ep; set ep=1 and use dp or fsdp"),
        (["train", "tiny", "--mesh", "cp=8", "--data.seq-len", "100"], "use 96 or 104, or a cp that divides"),
        (["train", "tiny", "--simulate", "²"], "--simulate ²: expected a number of devices"),
        (["plan", "--model", "nix"], "no model is called 'nix'; the models are tiny, "),
        (["--simulate=many", "doctor"], "--simulate many: expected a number of devices"),
        (["bench", "links", "--out", "."], "Is a directory"),
        (["bench", "links", "--matmul", "0"], "--matmul 0 must be at least 1"),
        (["doctor", "--nope"], "doctor takes no options, got --nope"),
        (["train", "tiny", "--mesh", "--steps", "3"], "expected axes and their sizes, as in --mesh fsdp=2,tp=4"),
        (["train", "tiny", "--data.source", "/nowhere/at/all"], "/nowhere/at/all"),
        (
            ["train", "tiny", "--data.tokenizer", "bpe:4096"],
            "has 4096 tokens but model.vocab_size=2048; set --model.voc",
        ),
        (["train", "tiny", "--model.embed-dim", "1000000000"], "; use more devices, fsdp or tp that splits them, or a"),
        (["train", "tiny", "--optimizer.schedule", "exotic"], "error: invalid choice 'exotic' for argument"),
        (["train", "tiny", "--steps", "1e3"], "10: '1e3'; jaxscale train tiny --help"),
        (["train", "tiny", "--simulate", "2", "--simulate", "4"], "--simulate is given twice"),
        (["train", "tiny_moe", "--model.moe.num-replicas", "8"], "num_replicas=8 copies of experts would drift apart"),
        (["generate", "--temperature", "nan"], "temperature=nan must be 0 (the likeliest token) or a positive number"),
        (["generate", "--top-k", "3"], "do nothing at temperature=0; set temperature=1.0"),
        (["generate", "--max-new-tokens", "0"], "max_new_tokens=0 must be at least 1"),
        (["generate", "--prompt"], "name a model and at least one prompt"),
        (["generate", "--cache", "int3"], "--cache 'int3' is unknown; use one of int8, float8_e4m3fn, int4"),
        (["generate", "--quantize", "w3"], "no recipe 'w3'"),
        (["convert", "--quantize", "w4a16-g64-awq", "--out", "x"], "needs a calibration set: --text FILE"),
        (["train", "tiny", "--out", "/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_mistakes_are_one_line(capsys, args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = call(capsys, *args)
    assert status == cli.EXIT_USER_ERROR
    assert message in err
    assert err.startswith("error: ")
    assert "---" not in err  # the parser's frame
    assert len(err.strip().splitlines()) == 1


FRAMED = """\
╭─ Value error ─────────────────────────────────────────────────────╮
│ Error parsing --mesh.fsdp: invalid literal for int() with base    │
│ 10: 'fsdp=2'                                                      │
│ ───────────────────────────────────────────────────────────────── │
│ For full helptext, see jaxscale train tiny --help                 │
╰───────────────────────────────────────────────────────────────────╯
"""


@pytest.mark.parametrize("marks", ["╭╰╮╯│─", "     -"])
def test_what_the_parser_says_is_taken_out_of_its_frame(marks):
    framed = FRAMED.translate(str.maketrans("╭╰╮╯│─", marks)).replace("- Value", "  Value")
    assert cli._words(framed) == "--mesh.fsdp: invalid literal for int() with base 10: 'fsdp=2'"
    of_ours = framed.replace("--mesh.fsdp: invalid literal for", "TrainConfig: steps=0 must be")
    assert cli._words(of_ours) == "steps=0 must be int() with base 10: 'fsdp=2'"


def test_a_file_of_rates_is_left_only_by_what_measured_them(tmp_path, monkeypatch, capsys):
    from jaxscale.plan import links

    def fails(*args, **kwargs):
        raise NotImplementedError("bfloat16 is not there")

    monkeypatch.setattr(links, "measure", fails)
    old, new = tmp_path / "old.toml", tmp_path / "new.toml"
    old.write_text("kept")
    for out in (old, new):
        assert call(capsys, "bench", "links", "--out", str(out))[0] == cli.EXIT_USER_ERROR
    assert old.read_text() == "kept" and not new.exists()


def test_a_function_that_is_no_run(capsys, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def big():\n    return 3\n")
    assert "returned int; a run is a function that returns a TrainConfig" in call(capsys, "train", f"{path}:big")[2]
    assert "no function 'bigg' (did you mean 'big'?)" in call(capsys, "train", f"{path}:bigg")[2]


def test_help_teaches(capsys):
    status, out, _ = call(capsys)
    assert status == 0
    for word in ("train", "generate", "doctor", "tiny", "--simulate"):
        assert word in out
    assert "A language model of Python source" in call(capsys, "train", "--help")[1]


def test_doctor_names_what_is_here(capsys):
    import jax

    status, out, _ = call(capsys, "doctor")
    assert status == 0
    assert jax.__version__ in out
    assert "8 x cpu" in out


MODEL = """
import jax, jax.numpy as jnp

def build():
    def loss(params, batch):
        return ((jax.nn.gelu(batch @ params["up"]) @ params["down"]) ** 2).mean()
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    return loss, {"up": shape(4096, 16384), "down": shape(16384, 4096)}, shape(8192, 4096)
"""


BAD = """def raises():
    return 1 / 0
def takes(size):
    return size
def shapes():
    import jax.numpy as jnp
    return (lambda params, batch: (batch @ params).sum()), jnp.ones((4, 4)), jnp.ones((3, 3))
"""


def test_plan_without_the_pod(capsys):
    status, text, _ = call(
        capsys, "plan", "--model", "llama3-70b", "--on", "h200:16x8", "--seq", "8192", "--batch", "1M-tokens"
    )
    assert status == 0
    assert "fsdp=" in text
    for args, message in [
        (["--model", "lama3-70b"], "llama3-70b"),
        (["--on", "h2000:16x8"], "h200"),
        (["--batch", "many"], "'many' is neither rows (512) nor tokens"),
        (["--model", "llama3-405b", "--on", "h200:1x1"], "fits no mesh of h200:1x1"),
        (["--seq", "0"], "--seq 0 is no number of tokens; use 1 to 131072"),
        (["--seq", "-1"], "--seq -1 is no number of tokens"),
        (["--on", "h200:9999999999x8"], "79,999,999,992 devices"),
    ]:
        status, _, err = call(capsys, "plan", *args)
        assert status == cli.EXIT_USER_ERROR
        assert message in err
        assert len(err.strip().splitlines()) == 1


def test_rules_for_a_model_of_ones_own(capsys, tmp_path):
    import sharding_rules

    (tmp_path / "mine.py").write_text(MODEL)
    (tmp_path / "bad.py").write_text(BAD)
    (tmp_path / "torn.py").write_text("x = 1\ndef build(:\n")
    (tmp_path / "text.txt").write_text("words")
    build, out = f"{tmp_path}/mine.py:build", str(tmp_path / "rules.toml")
    status, text, _ = call(capsys, "rules", build, "--mesh", "fsdp=2,tp=4", "--out", out)
    assert status == 0
    assert "column-parallel" in text
    assert "row-parallel" in text
    assert "tp" in sharding_rules.Plan.load(out).specs["down"][0]  # by its rows, which are contracted
    for args, message in [
        ([build, "--mesh", "tp=7"], "no axis divides by tp=7"),
        ([build, "--mesh", "fsdp=-1"], "a mesh of known size"),
        ([build, "--mesh", ""], "mesh '' is one device: nothing to split; name axes, as in --mesh fsdp=8,tp=8"),
        ([build, "--mesh", "tp=2,tp=4"], "tp is given twice, 2 and 4"),
        ([build, "--memory-gb", "nan"], "--memory-gb nan must be a positive, finite number"),
        ([f"{tmp_path}/bad.py:raises"], "line 2: ZeroDivisionError: division by zero"),
        ([f"{tmp_path}/bad.py:takes"], "TypeError: takes() missing 1 required positional argument"),
        ([f"{tmp_path}/bad.py:shapes"], "line 7: TypeError"),
        ([f"{tmp_path}/torn.py:build"], "torn.py:build, line 2: SyntaxError"),
        ([f"{tmp_path}/text.txt:build"], "text.txt is not a Python file"),
        ([build, "--hardware", "h2000"], "h2000"),
        ([f"{tmp_path}/mine.py:buid"], "did you mean 'build'?"),
        ([], "returns (loss_fn, params, batch)"),
    ]:
        status, _, err = call(capsys, "rules", *args)
        assert status == cli.EXIT_USER_ERROR
        assert message in err
        assert len(err.strip().splitlines()) == 1


def test_checkpoint_commands(capsys, tmp_path):
    import jax.numpy as jnp

    from jaxscale.checkpoint import Checkpointer

    with Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, {"a": jnp.arange(4.0), "b": jnp.ones(3)})
        ckpt.save(2, {"a": jnp.arange(4.0) + 1, "b": jnp.ones(3)})
    one, two = str(tmp_path / "run" / "1"), str(tmp_path / "run" / "2")
    status, text, _ = call(capsys, "checkpoint", "ls", str(tmp_path / "run"))
    assert status == 0
    assert len(text.strip().splitlines()) == 2
    assert "every byte" in call(capsys, "checkpoint", "verify", one)[1]
    status, text, _ = call(capsys, "checkpoint", "diff", one, two)
    assert status == 1
    assert text.startswith("a  values")
    assert "1 array(s) differ" in text
    assert call(capsys, "checkpoint", "convert", one, str(tmp_path / "copy"), "a")[0] == 0
    assert "only in the first" in call(capsys, "checkpoint", "diff", one, str(tmp_path / "copy"))[1]
    for args in (
        ["ls", str(tmp_path / "nowhere")],
        ["verfy", one],
        ["diff", one],
        ["verify", str(tmp_path / "nowhere")],
    ):
        status, _, err = call(capsys, "checkpoint", *args)
        assert status == cli.EXIT_USER_ERROR
        assert len(err.strip().splitlines()) == 1


@pytest.mark.slow
def test_sigterm_from_outside_and_the_same_command_again(tmp_path):
    """Processes, as a scheduler would treat them."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(30):
        (text / f"{i}.txt").write_text(f"file {i} says that the mesh splits every array\n" * 30)
    out = tmp_path / "run"
    sizes = {"vocab-size": 256, "num-layers": 2, "embed-dim": 32, "mlp-dim": 64, "head-dim": 8}
    command = [sys.executable, "-m", "jaxscale.cli", "train", "tiny", "--simulate", "4", "--out", str(out)]
    command += ["--data.source", str(text), "--data.tokenizer", "bytes", "--data.seq-len", "32", "--steps", "150"]
    command += [arg for name, size in sizes.items() for arg in (f"--model.{name}", str(size))]
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == cli.EXIT_PREEMPTED
    assert "preempted: saved at step" in err
    assert "Traceback" not in err
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=True)
    assert "resumed from step" in again.stdout
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, 151))
