"""Joining the processes of a job: Slurm, Open MPI, Kubernetes, TPU pods, or plain hosts."""

import os

import jax

_PLAIN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> None:
    """Join the job that this process was started in; nothing for a lone process. Call it before any other JAX call.

    Slurm, Open MPI, Kubernetes and TPU pods are recognised by JAX from what they set. On plain hosts set, for each
    process, JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      ValueError: only some of the three variables are set, or a process id is out of range.
    """
    if jax.distributed.is_initialized():
        return
    given = [name for name in _PLAIN if name in os.environ]
    if given and len(given) < len(_PLAIN):
        missing = " and ".join(name for name in _PLAIN if name not in os.environ)
        raise ValueError(f"{' and '.join(given)} set but {missing} missing; plain hosts need all three in each process")
    if given:
        num, index = int(os.environ[_PLAIN[1]]), int(os.environ[_PLAIN[2]])
        if not 0 <= index < num:
            raise ValueError(f"JAX_PROCESS_ID={index} is not in 0..{num - 1} (JAX_NUM_PROCESSES={num})")
        jax.distributed.initialize(os.environ[_PLAIN[0]], num, index)
    elif _in_cluster():
        jax.distributed.initialize()


def _in_cluster() -> bool:
    """Whether a launcher started this process as one of several."""
    several = [("SLURM_NTASKS", 1), ("OMPI_COMM_WORLD_SIZE", 1)]
    if any(int(os.environ.get(name, "0")) > least for name, least in several):
        return True
    if len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1:
        return True
    return "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
