"""Joining the processes of a job: Slurm, Open MPI, Kubernetes, TPU pods, or plain hosts."""

import glob
import importlib.util
import os

import jax

_PLAIN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> None:
    """Join the job that this process was started in; nothing for a lone process. Call it before any other JAX call.

    Slurm (srun), Open MPI, Kubernetes Jobs and TPU pods are recognised from what they set; JAX reads the rest. On plain
    hosts set, for each process, JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      ValueError: only some of the three variables are set, one is not a number, a process id is out of range, or the
        address has no port.
      ImportError: a Kubernetes Job without the package through which JAX asks it for its pods.
    """
    if jax.distributed.is_initialized():
        return
    given = [name for name in _PLAIN if os.environ.get(name)]
    if given and len(given) < len(_PLAIN):
        missing = " and ".join(name for name in _PLAIN if name not in given)
        raise ValueError(f"{' and '.join(given)} set but {missing} missing; plain hosts need all three in each process")
    if given:
        num, index = (_number(name) for name in _PLAIN[1:])
        if not 0 <= index < num:
            raise ValueError(f"JAX_PROCESS_ID={index} is not in 0..{num - 1} (JAX_NUM_PROCESSES={num})")
        address = os.environ[_PLAIN[0]]
        if not address.rpartition(":")[2].isdecimal():
            raise ValueError(f"JAX_COORDINATOR_ADDRESS={address!r} has no port; write it as in 10.0.0.1:1234")
        jax.distributed.initialize(address, num, index)
    elif _in_cluster():
        jax.distributed.initialize()


def _in_cluster() -> bool:
    """Whether a launcher started this process as one of several."""
    # Of a Slurm step rather than of the allocation: a script that sbatch runs is one process, what it gives srun many.
    if any(os.environ.get(name) and _number(name) > 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")):
        return True
    if len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1 or _on_tpu_vm():
        return True
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
        if importlib.util.find_spec("kubernetes") is None:
            raise ImportError(
                f"this is pod {os.environ['JOB_COMPLETION_INDEX']} of a Kubernetes Job: pip install jax[k8s] lets JAX "
                f"find the others, or set {', '.join(_PLAIN)}"
            )
        return True
    return False


def _on_tpu_vm() -> bool:
    """A TPU VM tells the others of its pod by its metadata server; one alone joins a job of one."""
    has_chips = bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))
    return has_chips and importlib.util.find_spec("libtpu") is not None


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r} is not a number")
    return int(text)
