"""benchmarks/runner.py: whatever happens to a job, the others run, and the exit status tells."""

import subprocess
import sys
import textwrap

from benchmarks import runner

SCRIPT = """
    import os, sys, time
    sys.path.insert(0, {root!r})
    from benchmarks import runner

    WAYS = ("fine", "raises", "dies", "hangs", "absent", "lacks", "last")

    def do(job):
        kind, name, *_ = job
        print("a compiler says something")
        if name == "raises":
            raise ValueError("first line\\nsecond line")
        if name == "dies":
            os._exit(7)
        if name == "hangs":
            time.sleep(60)
        if name in ("absent", "lacks"):
            raise ModuleNotFoundError("No module", name="torch" if name == "absent" else "jaxscale")
        return {{"pid": os.getpid(), "kind": kind}}

    def jobs():
        for name in WAYS:
            yield "check", name, "a", ""
            yield "time", name, "a", ""

    args = runner.parser("", {seconds}).parse_args()
    if args.child:
        sys.exit(runner.serve(do))
    results = runner.run(jobs(), do, args, 1.5, __file__)
    for job, result in results.items():
        print("row", *job[:2], runner.trouble(job, result) or "numbers")
    sys.exit(runner.status(results))
"""


def run_script(tmp_path, *args, seconds=60):
    path = tmp_path / "bench.py"
    path.write_text(textwrap.dedent(SCRIPT.format(root=str(runner.HERE.parent), seconds=seconds)))
    done = subprocess.run([sys.executable, str(path), *args], capture_output=True, text=True, timeout=50)
    words = [line.split() for line in done.stdout.splitlines() if line.startswith("row")]
    return done, {(kind, name): " ".join(rest) for _, kind, name, *rest in words}


def test_every_row_has_its_end(tmp_path):
    done, rows = run_script(tmp_path)
    assert rows == {
        ("check", "fine"): "numbers",
        ("time", "fine"): "numbers",
        ("check", "raises"): "WRONG ValueError: first line",
        ("check", "dies"): "WRONG the process ended with 7",
        ("check", "hangs"): "WRONG no answer in 2 s",
        ("check", "absent"): "absent ModuleNotFoundError: No module",
        ("time", "absent"): "absent ModuleNotFoundError: No module",
        ("check", "lacks"): "WRONG ModuleNotFoundError: No module",
        ("check", "last"): "numbers",
        ("time", "last"): "numbers",
    }
    assert done.returncode == 1 and "4 of 10 failed: check raises a; check dies a; check hangs a" in done.stderr


def test_what_is_chosen_decides_the_status(tmp_path):
    done, rows = run_script(tmp_path, "--only", "fine|absent", "--json", str(tmp_path / "out.json"))
    assert len(rows) == 4 and done.returncode == 0 and not done.stderr.count("failed")
    assert (tmp_path / "out.json").read_text().count("pid") == 2
    done, rows = run_script(tmp_path, "--seconds", "4")
    assert not rows and "14 jobs were not started within --seconds 4" in done.stdout


def test_report_of_ptxas():
    printed = "".join(
        f"ptxas info : Compiling entry function '{name}' for 'sm_90a'\nptxas info : Function properties for {name}\n"
        f"0 bytes stack frame, {spilled} bytes spill stores, 28 bytes spill loads\nptxas info : Used 168 registers\n"
        for name, spilled in (
            ("f_mosaic_gpu_kernel", 24),
            ("ragged_dot", 0),
            ("fusion_1", 8),
            ("f_mosaic_gpu_kernel", 24),
        )
    )
    printed += "ptxas info : (C7512) Potential Performance Loss: ... in the function 'f_mosaic_gpu_kernel'\n"
    assert runner.kernels(printed) == [("f", 168, 24, ["C7512"]), ("ragged_dot", 168, 0, [])]
