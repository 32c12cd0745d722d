"""A mixture of experts on real text: eight devices, experts spread over four of them, then placed by what they do.

    python examples/train_moe.py                       on 8 simulated devices, a few minutes on two CPU cores
    python examples/train_moe.py --steps 10            a quick look
    python examples/train_moe.py --devices-real        on the devices that are there
    python examples/train_moe.py --text ~/my-notes --balance-rows 1      balance each sequence, not the whole batch

Prints the loss and what the routers do, and at the end how a placement of the experts changes the tokens that must
travel between devices.
"""

import argparse
import dataclasses
import functools
import sys

import jax
import numpy as np

from jaxscale.config import DataConfig, MeshConfig, MoEConfig, OptimizerConfig
from jaxscale.data import make_dataset
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder, presets
from jaxscale.optim import make_optimizer
from jaxscale.params import init_params, num_params
from jaxscale.plan.placement import crossings, place, round_robin
from jaxscale.train import make_train_state, make_train_step, put_batch
from sharding_rules.rules import MEGATRON_FSDP


def main() -> int:
    options = parse_options()
    if not options.devices_real:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
    experts = MoEConfig(
        num_experts=8, top_k=2, mlp_dim=96, shared_dim=96, router_z_weight=1e-3, balance_rows=options.balance_rows
    )
    cfg = dataclasses.replace(presets.tiny(), name="tiny-moe", moe=experts)
    mesh_sizes = MeshConfig.parse(options.mesh)
    mesh = make_mesh(mesh_sizes)
    mesh_sizes.fill(mesh.size).check_model(cfg)
    data = DataConfig(source=options.text, seq_len=64, batch_size=16)
    train, held_out = (make_dataset(data, split=split) for split in ("train", "valid"))
    specs = decoder.param_specs(dataclasses.replace(cfg, vocab_size=train.tokenizer.vocab_size))
    cfg = dataclasses.replace(cfg, vocab_size=train.tokenizer.vocab_size)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=4e-3, warmup_steps=10), options.steps)
    print(f"{num_params(specs):,} parameters, {experts.num_experts} experts a layer, mesh {options.mesh}")

    with jax.set_mesh(mesh):
        params = init_params(jax.random.key(options.seed), specs, mesh, MEGATRON_FSDP)
        state = make_train_state(params, optimizer, jax.random.key(1))
        loss_fn = functools.partial(decoder.loss_fn, cfg=cfg)
        step = make_train_step(loss_fn, optimizer)
        for i in range(options.steps):
            state, metrics = step(state, put_batch(train[i], mesh))
            if i % 10 == 0 or i == options.steps - 1:
                show = ("nll", "router_balance", "router_load", "router_entropy", "router_dropped")
                print(f"step {i + 1:4d}  " + "  ".join(f"{k} {float(metrics[k]):.3f}" for k in show), flush=True)
        evaluate = jax.jit(lambda params, batch: loss_fn(params, batch)[1]["nll"])
        rows = [held_out[i] for i in range(min(4, held_out.batches_per_epoch))]
        losses = [float(evaluate(state.params, put_batch(batch, mesh))) for batch in rows]
        trace = jax.jit(functools.partial(decoder.router_trace, cfg=cfg))
        chosen = np.concatenate([trace(state.params, put_batch(batch, mesh)["tokens"]) for batch in rows], axis=1)

    print(f"validation: {np.mean(losses):.3f} nats a token")
    ep = mesh.shape["ep"]
    half = chosen.shape[1] // 2  # placed by one half of the trace, judged by the other
    placement = place(chosen[:, :half], num_experts=experts.num_experts, num_devices=ep)
    dealt = round_robin(chosen.shape[0], experts.num_experts, ep)
    before, after = (crossings(chosen[:, half:], p) for p in (dealt, placement))
    print(f"steps between layers that change the device: {before:.1%} dealt out, {after:.1%} placed")
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="stdlib", help="a directory of text (default: the running Python's own)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--mesh", default="fsdp=2,ep=4")
    parser.add_argument("--balance-rows", type=int, help="rows balanced together (default: the whole batch)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--devices-real", action="store_true", help="the devices that are there, not simulated ones")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
