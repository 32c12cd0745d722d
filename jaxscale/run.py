"""A whole run from one TrainConfig: data, mesh, parameters, training, checkpoints. Starting it again resumes it."""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxscale import pretrained
from jaxscale.callbacks import (
    Checkpoints,
    LossPlot,
    MetricsFile,
    Profile,
    Progress,
    TensorBoard,
    Validate,
    peak_flops,
    write_whole,
)
from jaxscale.config import ModelConfig, TrainConfig, from_dict
from jaxscale.data import load_tokenizer, make_dataset
from jaxscale.data.corpus import require_source, scan_corpus
from jaxscale.mesh import hosts_along, make_mesh
from jaxscale.models import decoder
from jaxscale.optim import make_optimizer
from jaxscale.parallel import context as over_cp
from jaxscale.parallel import expert as over_ep
from jaxscale.parallel import pipeline as over_pp
from jaxscale.parallel.context_cost import Context, plan
from jaxscale.parallel.context_layout import permute_batch
from jaxscale.params import abstract_params, fallback_notes, init_params, num_params, path_name
from jaxscale.plan.check import check_config
from jaxscale.plan.estimate import pipeline_of
from jaxscale.plan.hardware import pod_of
from jaxscale.plan.room import memory_errors, room_note
from jaxscale.quantize import training as quantized
from jaxscale.train import (
    Callback,
    TrainState,
    abstract_train_state,
    batch_share,
    fit,
    make_train_state,
    make_train_step,
    put_batch,
)
from sharding_rules.rules import MEGATRON_FSDP, Rules


def run(
    cfg: TrainConfig, *, rules: Rules = MEGATRON_FSDP, console: Any = None, callbacks: tuple[Callback, ...] = ()
) -> TrainState:
    """Train as cfg says, resuming from the newest checkpoint in cfg.out if there is one.

    Writes into cfg.out: config.json, metrics.jsonl, loss.png, tensorboard/, checkpoints/, tokenizer.json.

    Raises:
      ValueError: the configuration, the corpus or the checkpoint do not fit together.
      NonFiniteLoss, Preempted: see `fit`.
    """
    from rich.console import Console

    from jaxscale.checkpoint import open_levels

    console = console or Console(quiet=jax.process_index() > 0, soft_wrap=True)  # a log has no width
    out = Path(cfg.out)
    mesh = make_mesh(cfg.mesh)
    check_config(cfg, mesh.size)
    specs = decoder.param_specs(cfg.model)
    devices = mesh.devices.ravel().tolist()
    crowded = room_note(cfg, devices, rules)
    precision, scales = _precision(cfg)
    index, count = share = batch_share(mesh, cfg.data.batch_size, rules)
    where = {"process_index": index, "process_count": count}
    first = jax.process_index() == 0
    saved = out / "tokenizer.json"
    begins = not saved.exists()
    require_source(cfg.data)
    known = None
    if begins and cfg.init_from:  # a run that goes on has no more need of it
        model, known = load_outline(cfg.init_from)
        for note in _check_outline(cfg, model, known):
            console.print(note, style="yellow", highlight=False)
    tokenizer = _tokenizer_of(cfg, saved, known)
    if first:
        out.mkdir(parents=True, exist_ok=True)  # before the corpus is read: it may not be possible
    parts: dict[str, Any] = {"tokenizer": tokenizer, "corpus": scan_corpus(cfg.data), **where}
    data, held_out = make_dataset(cfg.data, **parts), make_dataset(cfg.data, split="valid", **parts)
    optimizer = make_optimizer(cfg.optimizer, cfg.steps)
    console.print(
        f"{cfg.model.name}: {num_params(specs):,} parameters; mesh {cfg.mesh.fill(mesh.size)} of {mesh.size} "
        f"{mesh.devices.flat[0].device_kind} device(s); {data.num_tokens:,} training tokens in {data.num_rows:,} rows",
        highlight=False,
    )
    for note in [*fallback_notes(specs, mesh, rules), *([crowded] if crowded else [])]:
        console.print(note, style="yellow", highlight=False)

    context = None
    split = cfg.mesh.fill(mesh.size)
    if split.cp > 1 and (split.cp_strategy, split.cp_layout) != Context():
        context, why = plan(split, cfg.model, cfg.data.batch_size, cfg.data.seq_len)
        console.print(f"sequences over {why}", highlight=False)

    sizes = {"batch_size": cfg.data.batch_size, "seq_len": cfg.data.seq_len, "accum_steps": cfg.accum_steps}
    sizes |= {"remat": cfg.remat, "loss_chunk": cfg.loss_chunk, "rules": rules}
    pipeline = pipeline_of(cfg.model, split, pod_of(devices), **sizes)
    if split.pp > 1:
        idle = over_pp.bubble(pipeline, split.pp)
        console.print(
            f"{pipeline.micro_batches} micro-batches over {split.pp} stages of {pipeline.interleave} chunk(s) of "
            f"layers: {idle:.0%} of the pipeline's time idle",
            highlight=False,
        )

    model = cfg.model
    if model.moe and model.moe.ep_hosts is None:
        model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, ep_hosts=hosts_along(mesh, "ep")))

    def put(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        if context is not None:
            batch = permute_batch(batch, context.layout, split.cp)
        return put_batch(batch, mesh, rules, share)

    def loss_fn(params, batch):
        options = {"remat": cfg.remat, "z_loss": cfg.z_loss, "chunk": cfg.loss_chunk}
        options |= {"context": context, "pipeline": pipeline}
        return decoder.loss_fn(params, batch, model, rules=rules, **options)

    platform = mesh.devices.flat[0].platform
    options = over_cp.compiler_options(platform) if split.cp > 1 else {}
    if split.ep > 1:
        options |= over_ep.compiler_options(platform)
    if precision is not None:
        loss_fn = quantized.rounded(loss_fn, specs, precision)
        options |= quantized.compiler_options(precision, platform)

    @jax.jit
    def eval_step(params, batch):
        whole = pipeline._replace(micro_batches=None)  # rows that accum_steps does not split
        options = {"chunk": cfg.loss_chunk, "context": context, "pipeline": whole}
        _, parts = decoder.loss_fn(params, batch, model, rules=rules, **options)
        return parts["nll"], parts["weight"]

    levels = open_levels(out / "checkpoints", cfg.checkpoint)
    smaller = lambda: room_note(cfg, devices, rules, full=True) or "use fewer or shorter rows, or --remat full"
    with memory_errors(smaller), jax.set_mesh(mesh), contextlib.ExitStack() as opened:
        opened.push(levels)
        levels.claim()  # before anything is written beside what another run writes
        if first and begins:
            whole = saved.with_suffix(".tmp")  # other processes may look while it is written
            data.tokenizer.save(whole)
            whole.replace(saved)
        if levels.latest_step() is None:
            key, param_key = jax.random.split(jax.random.key(cfg.seed))
            params = _params_of(cfg, mesh, rules) if cfg.init_from else init_params(param_key, specs, mesh, rules)
            state = make_train_state(params, optimizer, key, scales)
            position = data.state(0)
        else:
            # Delayed scales are part of the state and are read as they were saved; another precision begins its own.
            then = levels.metadata()["config"]
            if changes := _changes(then, json.loads(json.dumps(dataclasses.asdict(cfg)))):
                console.print(
                    f"changed since the last checkpoint: {', '.join(changes)}", style="yellow", highlight=False
                )
            then = {name: then.get(name, "") for name in ("precision", "precision_skip")}
            before = _precision(dataclasses.replace(cfg, **then))[1]
            state = levels.restore(abstract_train_state(specs, optimizer, mesh, rules, before))
            if jax.tree.structure(before) != jax.tree.structure(scales):
                fresh = jax.tree.map(lambda x: jax.reshard(x, jax.P()), scales)
                state = dataclasses.replace(state, scales=fresh)
            position = levels.metadata(int(state.step))["data"]
            console.print(f"resumed from step {int(state.step)} of {out}", highlight=False)
            if int(state.step) >= cfg.steps:
                console.print(f"nothing is left to do of --steps {cfg.steps}", highlight=False)
        batches = data.batches(position)  # before anything is written: it may not fit
        ahead = batches.state()["batch"] - int(state.step)  # where the batch size has changed, steps are no batches
        if first:
            write_whole(out / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")

        def metadata(step: int) -> dict[str, Any]:
            return {"config": dataclasses.asdict(cfg), "data": data.state(step + ahead), "mesh": dict(mesh.shape)}

        held_out_rows = [held_out[i] for i in range(min(cfg.eval_batches, held_out.batches_per_epoch))]

        def validation() -> Iterator[dict[str, jax.Array]]:
            return map(put, held_out_rows)

        held_out_bytes = _total((held_out.count_bytes(rows["labels"]) for rows in held_out_rows), count)
        if not held_out_bytes:
            raise ValueError(
                f"the {len(held_out_rows)} held-out batches have nothing to learn; raise eval_batches="
                f"{cfg.eval_batches} or data.holdout={cfg.data.holdout}, or give longer rows"
            )
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        flops = cfg.model.flops_per_token(cfg.data.seq_len)
        tokens = cfg.data.batch_size * cfg.data.seq_len
        writers: tuple[Callback, ...] = (
            MetricsFile(out / "metrics.jsonl"),
            TensorBoard(out / "tensorboard", cfg.log_every),
            LossPlot(out / "metrics.jsonl", out / "loss.png"),
        )
        opened.pop_all()  # Checkpoints ends them from here on
        return fit(
            state,
            make_train_step(loss_fn, optimizer, accum_steps=cfg.accum_steps, compiler_options=options or None),
            map(put, batches),
            steps=cfg.steps,
            callbacks=(
                Progress(console, tokens, flops * tokens, peak and peak * mesh.size, cfg.log_every),
                *(() if cfg.profile_at is None else (Profile(console, out / "tensorboard", cfg.profile_at),)),
                *(writers if first else ()),
                Validate(eval_step, validation, held_out_bytes, cfg.eval_every),
                Checkpoints(levels, metadata),
                *callbacks,
            ),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """What a run left behind, on the mesh that it was asked for."""

    train: TrainConfig
    params: Any
    tokenizer: Any
    step: int

    @property
    def cfg(self) -> ModelConfig:
        return self.train.model


def load_run(out: str | Path, mesh: jax.sharding.Mesh, *, rules: Rules = MEGATRON_FSDP) -> LoadedRun:
    """The newest good checkpoint of the run in `out`, in the shards of `mesh`, whatever mesh it was trained on.

    Raises:
      ValueError: `out` holds no run.
    """
    from jaxscale.checkpoint import Checkpointer

    out = Path(out)
    train = _config_of(out)
    step = jax.ShapeDtypeStruct((), np.int32, sharding=jax.NamedSharding(mesh, jax.P()))
    target = {"params": abstract_params(decoder.param_specs(train.model), mesh, rules), "step": step}
    with Checkpointer(out / "checkpoints") as checkpointer:  # moments, twice the parameters, stay where they are
        state = checkpointer.restore(target, only=["params/*", "step"])
    return LoadedRun(
        train=train, params=state["params"], tokenizer=load_tokenizer(out / "tokenizer.json"), step=int(state["step"])
    )


def load_outline(name_or_path: str) -> tuple[ModelConfig, Any]:
    """Configuration and tokenizer of what a run may begin with: a published model, or the directory of a run.

    Raises:
      ValueError: no such model, or one whose parameters are quantized.
      ConnectionError: a named model is not cached and cannot be fetched.
    """
    out = Path(name_or_path)
    if not (out / "checkpoints").is_dir():
        return pretrained.load_outline(name_or_path)
    return _config_of(out).model, load_tokenizer(out / "tokenizer.json")


def _config_of(out: Path) -> TrainConfig:
    if not (out / "config.json").exists():
        raise ValueError(f"{out} holds no run: there is no config.json; give the directory that `jaxscale train` wrote")
    return from_dict(TrainConfig, _read_config(out / "config.json"))


def _check_outline(cfg: TrainConfig, model: ModelConfig, tokenizer: Any) -> Iterator[str]:
    """What differs between a run and the model that it begins with, in words.

    Raises:
      ValueError: the parameters differ.
    """
    shapes = lambda model: {
        path_name(p): spec.shape for p, spec in jax.tree.leaves_with_path(decoder.param_specs(model))
    }
    have, want = shapes(model), shapes(cfg.model)
    for name in have | want:
        if have.get(name) != want.get(name):
            raise ValueError(
                f"{cfg.init_from} has {name} {have.get(name)}, this run's model {want.get(name)}; "
                f"use its own configuration, as `jaxscale train {cfg.init_from}` does"
            )
    alone = {"name", "dtype", "param_dtype", "max_seq_len"}
    plain = lambda model: {k: v for k, v in dataclasses.asdict(model).items() if k not in alone}
    if changes := _changes(plain(model), plain(cfg.model), "model."):
        yield f"unlike {cfg.init_from}, which it begins with: {', '.join(changes)}"
    named = cfg.data.tokenizer
    alike = lambda: named[:4] != "bpe:" and load_tokenizer(named).fingerprint == tokenizer.fingerprint
    if named != cfg.init_from and not alike():
        yield f"{cfg.init_from} knows other tokens than {named}; its own are --data.tokenizer {cfg.init_from}"


def _params_of(cfg: TrainConfig, mesh: jax.sharding.Mesh, rules: Rules) -> Any:
    """The parameters of cfg.init_from in their shards, in the dtypes that the run keeps them in."""
    if (Path(cfg.init_from) / "checkpoints").is_dir():
        params = load_run(cfg.init_from, mesh, rules=rules).params
    else:
        params = pretrained.load_model(cfg.init_from, mesh=mesh, rules=rules, dtype="float32").params
    return jax.tree.map(lambda spec, x: x.astype(spec.dtype), decoder.param_specs(cfg.model), params)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is no JSON ({error}); remove it and start the run's command again, which writes it anew"
        ) from None


def _changes(then: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """What of a configuration another one says otherwise; what leaves the result alone is not compared."""
    out = []
    aside = set() if where else {"out", "mesh", "checkpoint", "log_every", "profile_at"}
    for name in then.keys() & now.keys() - aside:
        old, new = then[name], now[name]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            out += _changes(old, new, f"{where}{name}.")
        elif old != new:
            out.append(f"{where}{name} {old} -> {new}")
    return sorted(out)


def _tokenizer_of(cfg: TrainConfig, saved: Path, known: Any) -> Any:
    """The tokenizer that the run in `saved`'s directory began with, else the one that cfg names; None where that is to
    be trained on the corpus. `known` is that of cfg.init_from, where a run begins with it.

    Raises:
      ValueError: the run began with another one than cfg names, or the model has fewer tokens than it.
    """
    named, config = cfg.data.tokenizer, saved.parent / "config.json"
    kind, _, size = named.partition(":")
    tokenizer = None
    if saved.exists():
        began = _read_config(config)["data"]["tokenizer"] if config.exists() else named
        if began != named:
            raise ValueError(
                f"{saved.parent} was begun with tokenizer={began!r} but this run says {named!r}; "
                f"set --data.tokenizer {began}, or another --out"
            )
        tokenizer = load_tokenizer(saved)
    elif kind != "bpe":
        tokenizer = known if named == cfg.init_from else load_tokenizer(named)
    ids = int(size) if tokenizer is None else tokenizer.vocab_size
    if ids > cfg.model.vocab_size:
        raise ValueError(
            f"the tokenizer {named} has {ids} tokens but model.vocab_size={cfg.model.vocab_size}; "
            f"set --model.vocab-size {ids} or more"
        )
    return tokenizer


def _precision(cfg: TrainConfig) -> tuple[Any, Any]:
    """How matmuls are rounded, and the state of delayed scaling at step 0; None each where cfg does not ask for it."""
    if not cfg.precision:
        return None, None
    precision = quantized.parse_precision(cfg.precision, cfg.precision_skip)
    return precision, quantized.init_scales(decoder.param_specs(cfg.model), precision)


def _total(counts: Iterable[float], num_parts: int) -> float:
    """The sum over all parts of the batch. As many processes hold each part as any other."""
    total = sum(counts)
    if jax.process_count() == 1:
        return total
    from jax.experimental import multihost_utils

    return float(multihost_utils.process_allgather(np.float64(total)).sum()) * num_parts / jax.process_count()
