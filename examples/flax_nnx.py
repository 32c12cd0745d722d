"""A flax.nnx model that jaxscale did not write, trained sharded: split it, and it is a pure function of a tree.

    python examples/flax_nnx.py --simulate 8                        eight simulated devices, fully sharded
    python examples/flax_nnx.py --simulate 8 --mesh fsdp=4,tp=2     and tensor-parallel, by rules given below
    python examples/flax_nnx.py --text ~/my-notes --steps 1000      on the accelerators that are here

Nothing in the model knows of a mesh. What would serve for equinox, linen or plain functions is all in `main`.
"""

import argparse
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from rich.console import Console

from jaxscale import Callback, DataConfig, MeshConfig, fit, make_mesh, make_train_state, make_train_step, put_batch
from jaxscale.data import make_dataset
from jaxscale.sharding import auto, fsdp_shardings


class Block(nnx.Module):
    def __init__(self, dim: int, heads: int, *, rngs: nnx.Rngs):
        self.attn_norm = nnx.LayerNorm(dim, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(heads, dim, use_bias=False, decode=False, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(dim, rngs=rngs)
        self.up = nnx.Linear(dim, 4 * dim, rngs=rngs)
        self.down = nnx.Linear(4 * dim, dim, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attn(self.attn_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Transformer(nnx.Module):
    def __init__(self, vocab: int, length: int, dim: int, heads: int, depth: int, *, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(vocab, dim, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.positions = nnx.Embed(length, dim, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.blocks = nnx.List([Block(dim, heads, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(dim, rngs=rngs)

    def __call__(self, tokens, positions, segments):
        """int32 [B, T] each -> float32 [B, T, V]; a token sees what comes before it in its own document."""
        same = nnx.make_attention_mask(segments, segments, jnp.equal)
        mask = nnx.combine_masks(nnx.make_causal_mask(tokens), same)
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x, mask)
        return self.tokens.attend(self.norm(x))


def make_loss_fn(graphdef):
    def loss_fn(params, batch):
        model = nnx.merge(graphdef, params)
        logits = model(batch["tokens"], batch["positions"], batch["segment_ids"])
        counted = (batch["labels"] >= 0).astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch["labels"], 0))
        weight = counted.sum()
        return (losses * counted).sum() / weight, {"weight": weight}

    return loss_fn


def main() -> None:
    options = parse_options()
    console = Console(width=110, highlight=False)
    if options.simulate:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.simulate)
    data = make_dataset(DataConfig(source=options.text, seq_len=options.length, batch_size=options.batch))

    def init(key):
        sizes = (data.tokenizer.vocab_size, options.length, options.dim, options.heads, options.depth)
        return nnx.split(Transformer(*sizes, rngs=nnx.Rngs(key)), nnx.Param)

    # The model's shapes, without memory for them: enough to say where each parameter goes.
    graphdef, shapes = nnx.eval_shape(init, jax.random.key(0))
    loss_fn = make_loss_fn(graphdef)
    mesh = make_mesh(MeshConfig.parse(options.mesh))
    shardings = fsdp_shardings(shapes, mesh, tensor_parallel(shapes))
    params = jax.jit(lambda key: init(key)[1], out_shardings=shardings)(jax.random.key(0))  # made in its shards
    show(params, mesh, console)

    with jax.set_mesh(mesh):
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(options.learning_rate))
        state = make_train_state(params, optimizer, jax.random.key(1))
        step = make_train_step(auto(loss_fn), optimizer)
        batches = (put_batch(batch, mesh) for batch in data.batches())
        fit(state, step, batches, steps=options.steps, callbacks=[Print(console, options.steps)])


# Megatron's rules by hand: split what comes first by its outputs and what comes next by its inputs.
# `sharding_rules.search(sharding_rules.infer(loss_fn, shapes, batch), mesh.shape)` finds such rules for any program.
SPLIT_OVER_TP = {
    r"attn/(query|key|value)/kernel": P(None, "tp"),
    r"attn/out/kernel": P("tp"),
    r"up/kernel": P(None, "tp"),
    r"up/bias": P("tp"),
    r"down/kernel": P("tp"),
}


def tensor_parallel(shapes):
    """A PartitionSpec for each parameter, by its path."""

    def spec(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return next((spec for pattern, spec in SPLIT_OVER_TP.items() if re.search(pattern, name)), P())

    return jax.tree.map_with_path(spec, shapes)


def show(params, mesh, console) -> None:
    sizes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    total = sum(x.size for x in jax.tree.leaves(params))
    held = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(params))
    console.print(f"{total:,} parameters on mesh {sizes}; a device holds {held:,} of them, for example")
    for path, x in jax.tree.leaves_with_path(params)[:5]:
        console.print(
            f"  {jax.tree_util.keystr(path[:-1], simple=True, separator='/')}: {x.shape} as {x.sharding.spec}"
        )


@dataclasses.dataclass
class Print(Callback):
    console: Console
    steps: int

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        if step == 1 or step % 10 == 0 or step == self.steps:
            bits = metrics["loss"] / np.log(2)
            self.console.print(f"step {step:>5}  {bits:.3f} bits per byte  {metrics['seconds'] * 1e3:.0f} ms")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", type=int, help="train on this many simulated devices of the CPU")
    parser.add_argument("--mesh", default="fsdp=-1", help="axis=size, ...; -1 takes the devices that are left")
    parser.add_argument(
        "--text", default="stdlib", help="a directory of text (default: the running Python's own source)"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16, help="rows in a step, over the whole mesh")
    parser.add_argument("--length", type=int, default=128, help="bytes in a row")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
