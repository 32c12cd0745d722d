"""Named runs: a run is a Python function that returns a TrainConfig. `jaxscale train NAME` starts it.

Your own: write such a function in any file and say `jaxscale train my_runs.py:name`.
"""

import dataclasses
from pathlib import Path

from jaxscale.config import CheckpointConfig, DataConfig, MeshConfig, MoEConfig, OptimizerConfig, TrainConfig
from jaxscale.models import presets


def tiny() -> TrainConfig:
    """A language model of Python source, for two CPU cores and five minutes."""
    return TrainConfig(
        model=dataclasses.replace(presets.tiny(), vocab_size=2048, max_seq_len=512),
        out="runs/tiny",
        steps=400,
        mesh=MeshConfig(fsdp=-1),
        data=DataConfig(tokenizer="bpe:2048", seq_len=128, batch_size=32),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=30),
        checkpoint=CheckpointConfig(every=100),
        eval_every=100,
        log_every=10,
    )


def tiny_moe() -> TrainConfig:
    """The same with a mixture of eight experts in each layer, of which a token meets two and a shared one."""
    cfg = tiny()
    experts = MoEConfig(num_experts=8, top_k=2, mlp_dim=96, shared_dim=96, router_z_weight=1e-3)
    return dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, name="tiny-moe", moe=experts), out="runs/tiny-moe"
    )


def llama3_8b() -> TrainConfig:
    """Llama 3.1 8B on a pod or cluster: fully sharded over the hosts, tensor-parallel within eight devices."""
    return TrainConfig(
        model=presets.llama3_8b(),
        out="runs/llama3-8b",
        steps=50_000,
        mesh=MeshConfig(fsdp=-1, tp=4),
        data=DataConfig(seq_len=8192, batch_size=512, tokenizer="bpe:32768"),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
        checkpoint=CheckpointConfig(every=500, keep_last=3, keep_every=5000),
        accum_steps=1,
        remat="full",
        z_loss=1e-4,
        eval_every=500,
    )


def go_on(model: str) -> TrainConfig:
    """A published model, or another run's, goes on with text of your own (--data.source), at a low learning rate."""
    import jax

    from jaxscale import distributed
    from jaxscale.run import load_outline

    distributed.initialize()  # before JAX looks at its devices
    cfg, _ = load_outline(model)
    return TrainConfig(
        model=dataclasses.replace(cfg, dtype="float32" if jax.default_backend() == "cpu" else "bfloat16"),
        init_from=model,
        out=f"runs/{Path(model).name.removesuffix('.gguf')}-tuned",
        steps=200,
        mesh=MeshConfig(fsdp=-1),
        data=DataConfig(tokenizer=model, seq_len=min(512, cfg.max_seq_len), batch_size=8),
        optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=20),
        checkpoint=CheckpointConfig(every=100),
        eval_every=50,
        log_every=10,
    )
