"""Which launcher is recognised, what JAX is then asked, and what a half-set environment is answered."""

import jax
import pytest

from jaxscale import distributed

VARIABLES = {
    "JAX": ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"),
    "SLURM": ("NTASKS", "STEP_NUM_TASKS"),
    "OMPI": ("COMM_WORLD_SIZE",),
    "TPU": ("WORKER_HOSTNAMES",),
    "KUBERNETES": ("SERVICE_HOST",),
    "JOB": ("COMPLETION_INDEX",),
}


@pytest.fixture
def asked(monkeypatch):
    """The calls of jax.distributed.initialize, from an environment without launchers and without TPUs."""
    calls = []
    for launcher, names in VARIABLES.items():
        for name in names:
            monkeypatch.delenv(f"{launcher}_{name}", raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: [])
    return calls


def install(monkeypatch, *packages):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", dict.fromkeys(packages, "installed").get)


def start(monkeypatch, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.initialize()


def test_a_lone_process_joins_nothing(asked, monkeypatch):
    start(monkeypatch)
    assert asked == []


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_STEP_NUM_TASKS": "64"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"},
    ],
)
def test_launchers_are_left_to_jax(environment, asked, monkeypatch):
    install(monkeypatch, "kubernetes")
    start(monkeypatch, **environment)
    assert asked == [()]


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": "64"},  # the script that sbatch runs, before it calls srun
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # a notebook in a pod of its own
    ],
)
def test_one_process_of_a_launcher_is_alone(environment, asked, monkeypatch):
    start(monkeypatch, **environment)
    assert asked == []


def test_tpu_vm(asked, monkeypatch):
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: ["/dev/vfio/0"] if "vfio" in pattern else [])
    install(monkeypatch)
    start(monkeypatch)
    assert asked == []  # a device passed through to a virtual machine, but no TPU runtime
    install(monkeypatch, "libtpu")
    start(monkeypatch)
    assert asked == [()]


def test_plain_hosts(asked, monkeypatch):
    plain = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "8", "JAX_PROCESS_ID": "7"}
    start(monkeypatch, **plain, SLURM_STEP_NUM_TASKS="8")  # what is said goes before what is found
    assert asked == [("10.0.0.1:1234", 8, 7)]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID set but JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES missing"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "8", "JAX_PROCESS_ID": "8"}, r"not in 0\.\.7"),
        (
            {"JAX_COORDINATOR_ADDRESS": "h", "JAX_NUM_PROCESSES": "8", "JAX_PROCESS_ID": "0"},
            "'h' has no port; write it",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "8", "JAX_PROCESS_ID": "-1"}, "'-1' is not a number"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "'two' is not a num"),
    ],
)
def test_wrong_variables(environment, message, asked, monkeypatch):
    with pytest.raises(ValueError, match=message):
        start(monkeypatch, **environment)
    assert asked == []


def test_kubernetes_without_its_package(asked, monkeypatch):
    install(monkeypatch)
    with pytest.raises(ImportError, match=r"pod 2 of a Kubernetes Job: pip install jax\[k8s\]"):
        start(monkeypatch, KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX="2")
    assert asked == []
