"""Which parts work together: a run's configuration is checked before data is read, pairs of features are traced.

check_config(cfg, num_devices)            # ValueError or NotImplementedError in one line, nothing is traced
verdict(["cp=ring", "windows"], "v5p")    # a tiny training step with both, traced for that hardware: no device needed

Neither holds rules of its own: `check_config` calls the checks that the parts call themselves, a verdict is what they
say while a training step (or a decoding step, or an export) is traced on a mesh without devices.
"""

import functools
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from jaxscale import generate
from jaxscale.checkpoint.huggingface_config import config_to_hf
from jaxscale.config import MeshConfig, TrainConfig, from_dict
from jaxscale.mesh import make_abstract_mesh
from jaxscale.models import decoder, moe
from jaxscale.optim import make_optimizer
from jaxscale.parallel import context_cost
from jaxscale.parallel import pipeline as over_pp
from jaxscale.parallel.context_layout import permute_batch
from jaxscale.params import abstract_params
from jaxscale.plan.aot import abstract_batch
from jaxscale.plan.features import BASE, FEATURES, Feature
from jaxscale.plan.hardware import DEVICES
from jaxscale.quantize import training as quantized
from jaxscale.quantize.apply import abstract_quantized
from jaxscale.train import abstract_train_state, make_train_step
from pallas_kernels import attention_implementation
from pallas_kernels.attention.api import BACKENDS
from sharding_rules.rules import MEGATRON_FSDP


class Verdict(NamedTuple):
    """What became of features used together."""

    state: str  # "runs", "refused", "not built", "alternatives" (two of a kind), "apart" (never in one program)
    why: str = ""

    @property
    def runs(self) -> bool:
        return self.state == "runs"


def check_config(cfg: TrainConfig, num_devices: int) -> None:
    """Refuses a run that could not work, before its corpus is read and before anything is traced.

    Raises:
      ValueError: sizes that do not fit together, with what would.
      NotImplementedError: a part that is not built.
    """
    mesh = cfg.mesh.fill(num_devices)
    mesh.check_model(cfg.model)
    rows, seq_len = cfg.data.batch_size, cfg.data.seq_len
    mesh.check_rows(rows, cfg.accum_steps)
    over_pp.plan(mesh, cfg.model, rows, cfg.accum_steps)
    if cfg.model.moe is not None and (copies := cfg.model.moe.num_replicas):
        raise ValueError(f"num_replicas={copies} copies of experts would drift apart in training; set num_replicas=0")
    if mesh.pp > 1 and cfg.precision:
        _check_stages_in_8_bits(cfg, mesh)
    if mesh.cp > 1:
        one_row = {name: np.zeros((1, seq_len), np.int32) for name in ("positions", "segment_ids")}
        if mesh.cp_layout != "auto":  # before a strategy is said not to run on rows of this length
            permute_batch(one_row, mesh.cp_layout, mesh.cp)
        if (mesh.cp_strategy, mesh.cp_layout) != context_cost.Context():
            # Whether any choice can run does not depend on the rates; the devices' own would start a backend here.
            found, _ = context_cost.plan(mesh, cfg.model, rows, seq_len, rates=context_cost.UNKNOWN)
            permute_batch(one_row, found.layout, mesh.cp)


def _check_stages_in_8_bits(cfg: TrainConfig, mesh: MeshConfig) -> None:
    what = f"precision={cfg.precision} does not run over pp={mesh.pp}"
    micro = over_pp.count(over_pp.plan(mesh, cfg.model, cfg.data.batch_size, cfg.accum_steps))
    rows = cfg.data.batch_size // (cfg.accum_steps * micro * mesh.dp * mesh.fsdp)
    if cfg.precision not in quantized.PRECISIONS:
        raise NotImplementedError(
            f"{what}: inside of a stage its rounding cannot be left to the partitioner; use fp8 or int8, or pp=1"
        )
    if cfg.precision == "int8" and mesh.tp > 1:
        raise NotImplementedError(f"{what} with tp={mesh.tp}: its tokens' scales are split over tp; use fp8, or tp=1")
    if cfg.model.moe and not moe.adds_up(cfg.model, rows):
        raise NotImplementedError(
            f"{what} where routers are balanced over the whole batch: scales would be added over micro-batches; "
            f"set balance_rows=1, or use pp=1"
        )


def verdict(names: Sequence[str], hardware: str) -> Verdict:
    """Whether the features `names` run together on `hardware` (a key of DEVICES), and why not.

    A model of two layers is trained for one step with all of them (or takes one decoding step, or is exported), as
    shapes on a mesh without devices: every check of the library's own code is met, kernels are traced for that
    hardware, nothing is compiled.
    """
    features = [FEATURES[name] for name in names]
    for a, b in itertools.combinations(features, 2):
        if a.kind == b.kind:
            return Verdict("alternatives")
        if apart(a, b):
            return Verdict("apart")
    use = next((f.use for f in features if f.use), "train")
    try:
        case = configure(features)
    except ValueError as error:
        return Verdict("refused", _line(error))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a cast that a layer warns of is not a refusal
            trace(case, hardware, use=use)
    except NotImplementedError as error:
        return Verdict("not built" if "not built" in str(error) else "refused", _line(error))
    except Exception as error:  # whatever a part says: the table shows it
        return Verdict("refused", _line(error))
    return Verdict("runs")


def apart(a: Feature, b: Feature) -> bool:
    """Whether two features are never in one program."""
    return bool(a.use and b.use and a.use != b.use)


class Case(NamedTuple):
    """A tiny run with features in it."""

    cfg: TrainConfig
    packed: bool = False  # its rows hold several documents
    weights: str = ""  # the recipe that weights are quantized by before they are decoded with


def configure(features: Sequence[Feature]) -> Case:
    """The tiny run with these features in it.

    Raises:
      ValueError: the configuration refuses them.
    """
    values: dict[str, Any] = {}
    for changes in (BASE, *(f.changes for f in features)):
        values = _merge(values, changes)
    beside = {name: values.pop(name) for name in ("packed", "weights") if name in values}
    return Case(from_dict(TrainConfig, values), **beside)


def trace(case: Case, hardware: str, *, use: str = "train") -> None:
    """Traces one step of a run for devices that are not here; raises what the library raises."""
    cfg = case.cfg
    if use == "export":
        config_to_hf(cfg.model)
        return
    sizes = cfg.mesh
    check_config(cfg, sizes.num_devices or 1)
    mesh = abstract_devices(sizes, hardware)
    rows, seq_len = cfg.data.batch_size, cfg.data.seq_len
    specs = decoder.param_specs(cfg.model)
    if use == "decode":
        params = abstract_params(specs, mesh, MEGATRON_FSDP)
        if case.weights:
            params = abstract_quantized(case.weights, specs, mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        if use == "decode":
            one = jax.ShapeDtypeStruct((rows,), jnp.int32)

            def decode(params, tokens, positions):
                cache = decoder.init_cache(cfg.model, rows, seq_len)
                return generate.decode_step(params, cache, tokens, positions, cfg.model)

            jax.eval_shape(decode, params, one, one)
            return
        context = None
        if sizes.cp > 1:
            context, _ = context_cost.plan(sizes, cfg.model, rows, seq_len, rates=context_cost.UNKNOWN)
        batch = abstract_batch(mesh, rows, seq_len)
        if not case.packed:
            batch = {name: x for name, x in batch.items() if name in ("tokens", "labels")}
        if context is not None and context.layout != "contiguous":  # dealt rows carry their positions
            batch["positions"] = batch["tokens"]
        options = {"remat": cfg.remat, "z_loss": cfg.z_loss, "chunk": cfg.loss_chunk, "context": context}
        options["pipeline"] = over_pp.plan(sizes, cfg.model, rows, cfg.accum_steps)
        loss_fn = functools.partial(decoder.loss_fn, cfg=cfg.model, **options)
        optimizer, scales = make_optimizer(cfg.optimizer, cfg.steps), None
        if cfg.precision:
            precision = quantized.parse_precision(cfg.precision, cfg.precision_skip)
            loss_fn = quantized.rounded(loss_fn, specs, precision)
            scales = jax.eval_shape(lambda: quantized.init_scales(specs, precision))
        state = abstract_train_state(specs, optimizer, mesh, MEGATRON_FSDP, scales)
        jax.eval_shape(make_train_step(loss_fn, optimizer, accum_steps=cfg.accum_steps), state, batch)


def abstract_devices(mesh: MeshConfig, hardware: str) -> AbstractMesh:
    """A mesh of devices of this kind, none of which is here."""
    platform = "cpu" if hardware == "cpu" else "tpu" if DEVICES[hardware].startswith("TPU") else "gpu"
    device = jax.sharding.AbstractDevice(device_kind=DEVICES[hardware], num_cores=None, platform=platform)
    return make_abstract_mesh(mesh).update(abstract_device=device)


def attention_backend(hardware: str, head_dim: int, dtype: str) -> tuple[str, str]:
    """(the kernel that attention runs there, why the kernels before it in the order of preference do not)."""
    shape = jax.ShapeDtypeStruct((1, 128, 1, head_dim), dtype)
    with jax.sharding.use_abstract_mesh(abstract_devices(MeshConfig(), hardware)):
        chosen = attention_implementation(shape, shape, shape, causal=True)
        reasons = []
        for name in itertools.takewhile(lambda name: name != chosen, BACKENDS):
            try:
                attention_implementation(shape, shape, shape, causal=True, implementation=name)
            except NotImplementedError as error:
                reasons.append(f"{name} {str(error).rpartition('cannot run this call: ')[2]}")
    return chosen, "; ".join(reasons)


def _merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts laid over each other; the later one wins."""
    out = dict(values)
    for name, value in changes.items():
        old = out.get(name)
        out[name] = _merge(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return out


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    name = "" if isinstance(error, ValueError | NotImplementedError) else f"{type(error).__name__}: "
    return name + (text if len(text) <= 300 else text[:297] + "...")
