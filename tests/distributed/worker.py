"""One process of a job: a small run on each of the given meshes. `config` is also a run for the command line."""

import dataclasses
import sys
from pathlib import Path

from jaxscale import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from jaxscale.models import presets


def config() -> TrainConfig:
    sizes = {"num_layers": 2, "embed_dim": 32, "mlp_dim": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    return TrainConfig(
        model=dataclasses.replace(presets.tiny(), **sizes),
        steps=4,
        mesh=MeshConfig(fsdp=-1),
        data=DataConfig(seq_len=32, batch_size=8, holdout=0.2),
        optimizer=OptimizerConfig(warmup_steps=2),
        checkpoint=CheckpointConfig(every=4),
        eval_every=2,
        eval_batches=2,
        log_every=1,
    )


def on_mesh(mesh: str, source: Path, out: Path) -> TrainConfig:
    cfg = config()
    data = dataclasses.replace(cfg.data, source=str(source))
    return dataclasses.replace(cfg, mesh=MeshConfig.parse(mesh), data=data, out=str(out / mesh))


if __name__ == "__main__":
    from jaxscale import distributed
    from jaxscale.run import run

    distributed.initialize()
    for mesh in sys.argv[3:]:
        run(on_mesh(mesh, Path(sys.argv[1]), Path(sys.argv[2])))
