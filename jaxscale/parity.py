"""parity(): the same loss and the same gradients on every mesh as on one device, for any function."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale.config import MeshConfig
from jaxscale.mesh import make_mesh
from jaxscale.params import param_shardings, path_name
from jaxscale.sharding import auto, fsdp_shardings
from jaxscale.table import Table
from sharding_rules.resolve import resolve_spec
from sharding_rules.rules import MEGATRON_FSDP, Rules

# In float32: what the order of a sum changes, and no more.
LOSS_TOLERANCE = 1e-6
GRAD_TOLERANCE = 1e-5


def parity(
    loss_fn: Callable[..., Any],
    params: Any,
    batch: Any,
    meshes: Iterable[Mesh | MeshConfig | str],
    *,
    specs: Any = None,
    shardings: Any = None,
    rules: Rules = MEGATRON_FSDP,
    loss_tolerance: float = LOSS_TOLERANCE,
    grad_tolerance: float = GRAD_TOLERANCE,
    check: bool = True,
) -> "ParityReport":
    """Compares the loss and every gradient on each mesh with those of one device.

    A model of this library gives `specs`; it runs in Explicit mode with its own collectives. Any other function is left
    to the partitioner (`jaxscale.sharding.auto`) with its parameters laid out by `shardings`.

        parity(loss_fn, params, batch, ["fsdp=4,tp=2", "dp=8"], specs=param_specs(cfg))
        parity(my_loss, params, batch, ["fsdp=4,tp=2"], shardings={"w1": P("fsdp", "tp"), "w2": P("tp", "fsdp")})

    Args:
      loss_fn: (params, batch) -> a scalar, or (scalar, anything).
      params: a tree of arrays, float32 for the tolerances to hold.
      batch: a tree of arrays; dim 0 is split over the batch axes and, with specs, dim 1 over the sequence axes.
      meshes: meshes, MeshConfigs, or their text. A mesh may be smaller than the number of devices.
      specs: a tree of ParamSpec like params.
      shardings: a tree of PartitionSpec like params, or a function of the mesh that returns one (or a tree of
        NamedSharding). Without specs and shardings: `fsdp_shardings`.
      rules: what the logical axes of specs, and of the batch, mean.
      loss_tolerance: largest relative difference of the loss.
      grad_tolerance: largest norm of a gradient's difference over the gradient's norm.
      check: raise where a figure is over its tolerance; otherwise only report.

    Raises:
      ParityError: names the first parameter whose gradient differs (or the loss), with the figures.
      ValueError: both specs and shardings, or a mesh that does not fit the devices.
    """
    if specs is not None and shardings is not None:
        raise ValueError("pass specs (a model of this library) or shardings (any other function), not both")
    loss_and_grads = jax.value_and_grad(_scalar(loss_fn))
    params, batch = jax.device_get((params, batch))
    device = jax.devices()[0]
    loss, grads = jax.device_get(jax.jit(loss_and_grads)(*jax.device_put((params, batch), device)))
    expected = {path_name(path): g for path, g in jax.tree.leaves_with_path(grads)}

    results = []
    for mesh in map(_mesh, meshes):
        if specs is not None:
            where, fn = param_shardings(specs, mesh, rules), loss_and_grads
        else:
            where, fn = _user_shardings(params, mesh, shardings), jax.value_and_grad(auto(_scalar(loss_fn)))
        with jax.set_mesh(mesh):
            args = jax.device_put(params, where), _put_batch(batch, mesh, rules, seq=specs is not None)
            mesh_loss, mesh_grads = jax.device_get(jax.jit(fn)(*args))
        got = {path_name(path): g for path, g in jax.tree.leaves_with_path(mesh_grads)}
        diffs = {name: _difference(got[name], g) for name, g in expected.items()}
        loss_diff = _difference(mesh_loss, loss)
        results.append(MeshParity(_text(mesh), float(mesh_loss), loss_diff, diffs, loss_tolerance, grad_tolerance))
    report = ParityReport(float(loss), tuple(results))
    if check:
        report.check()
    return report


class MeshParity(NamedTuple):
    """One mesh against one device; differences are relative."""

    mesh: str
    loss: float
    loss_diff: float
    grad_diffs: dict[str, float]
    loss_tolerance: float
    grad_tolerance: float

    @property
    def worst(self) -> tuple[str, float]:
        """The parameter whose gradient differs most (not a number counts as most)."""
        return max(self.grad_diffs.items(), key=lambda item: np.inf if np.isnan(item[1]) else item[1])

    @property
    def failure(self) -> str | None:
        """What differs, or None. `not <=` rather than `>`: a nan differs."""
        for name, diff in self.grad_diffs.items():
            if not diff <= self.grad_tolerance:
                bad = sum(not d <= self.grad_tolerance for d in self.grad_diffs.values())
                return (
                    f"on mesh {self.mesh} the gradient of {name} differs by {diff:.2g} "
                    f"(tolerance {self.grad_tolerance:g}), the first of {bad}; the loss by {self.loss_diff:.2g}"
                )
        if not self.loss_diff <= self.loss_tolerance:
            return f"on mesh {self.mesh} the loss differs by {self.loss_diff:.2g} (tolerance {self.loss_tolerance:g})"
        return None


class ParityReport(NamedTuple):
    """The loss of one device, and each mesh beside it."""

    loss: float
    meshes: tuple[MeshParity, ...]

    def check(self) -> None:
        """Raises ParityError for the first mesh that differs."""
        for result in self.meshes:
            if result.failure:
                raise ParityError(result.failure, self)

    def table(self) -> Table:
        rows = [("one device", f"{self.loss:.7g}", "", "", "", "")]
        for m in self.meshes:
            name, diff = m.worst
            rows.append(
                (
                    m.mesh,
                    f"{m.loss:.7g}",
                    f"{m.loss_diff:.1e}",
                    name,
                    f"{diff:.1e}",
                    "differs" if m.failure else "equal",
                )
            )
        return Table("Parity", ("mesh", "loss", "difference", "worst gradient", "difference", ""), rows)

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


class ParityError(AssertionError):
    """A mesh computes something else than one device. `report` holds all figures."""

    def __init__(self, message: str, report: ParityReport):
        super().__init__(message)
        self.report = report


def _difference(got: Any, expected: Any) -> float:
    """Norm of the difference over the norm; 0 where both vanish."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    norm, diff = np.linalg.norm(expected), np.linalg.norm(got - expected)
    return float(diff / norm) if norm else float(np.inf if diff else 0.0)


def _scalar(loss_fn):
    def loss(params, batch):
        out = loss_fn(params, batch)
        return out[0] if isinstance(out, tuple) else out

    return loss


def _mesh(mesh):
    if isinstance(mesh, str):
        mesh = MeshConfig.parse(mesh)
    if isinstance(mesh, MeshConfig):
        return make_mesh(mesh, jax.devices()[: mesh.num_devices])
    return mesh


def _text(mesh):
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"


def _user_shardings(params, mesh, shardings):
    if shardings is None:
        return fsdp_shardings(params, mesh)
    tree = shardings(mesh) if callable(shardings) else shardings
    is_spec = lambda s: isinstance(s, P)
    return jax.tree.map(lambda s: NamedSharding(mesh, s) if is_spec(s) else s, tree, is_leaf=is_spec)


def _put_batch(batch, mesh, rules, seq):
    def put(x):
        axes = ("batch", "seq" if seq else None)[: x.ndim] + (None,) * (x.ndim - 2)
        table = {k: tuple(a for a in v if a in mesh.shape) for k, v in rules.compute.items()}
        return jax.device_put(x, NamedSharding(mesh, resolve_spec(x.shape, axes, table, dict(mesh.shape)).spec))

    return jax.tree.map(put, batch)
