"""Rules: which mesh axes split each logical axis, and the presets that the library ships."""

import dataclasses
from collections.abc import Mapping

AxisTable = Mapping[str, tuple[str, ...]]

MESH_AXES = ("pp", "dp", "fsdp", "ep", "cp", "tp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Logical axis -> mesh axes, once for parameters at rest and once for arrays in computation.

    A logical axis that is absent is not split. `spill` names the mesh axes that may move to another dim of a parameter
    when the dim that they belong to does not divide: where a parameter rests is free, how it is computed with is not.
    """

    params: AxisTable
    compute: AxisTable
    spill: tuple[str, ...] = ()

    def __hash__(self):  # static under jit, as configs are
        return hash((tuple(sorted(self.params.items())), tuple(sorted(self.compute.items())), self.spill))

    def __post_init__(self):
        for table in (self.params, self.compute):
            for logical, mesh_axes in table.items():
                if isinstance(mesh_axes, str) or len(set(mesh_axes)) != len(mesh_axes):
                    raise ValueError(
                        f"rule {logical!r} -> {mesh_axes!r}: expected a tuple of distinct mesh axes, as ('fsdp', 'cp')"
                    )


# Megatron tensor parallelism with sequence-parallel norms, fully sharded parameters, data and context parallelism: the
# whole vocabulary of axes, so that any mesh is a special case (an axis of size 1 splits nothing).
MEGATRON_FSDP = Rules(
    params={
        # cp and ep too: otherwise weight gradients all-reduce over them instead of scattering. Of experts ep is taken,
        # of layers pp, which splits by embed what lies outside of the pipeline.
        "embed": ("pp", "fsdp", "cp", "ep"),
        "latent": ("pp", "fsdp", "cp", "ep"),  # of low-rank projections
        "mlp": ("tp",),
        "q_heads": ("tp",),
        "kv_heads": ("tp",),
        "vocab": ("tp",),
        "experts": ("ep",),
        "layers": ("pp",),
    },
    compute={
        "batch": ("pp", "dp", "fsdp", "ep"),  # over pp outside of the pipeline: embedding, loss
        "seq": ("cp",),
        "norm_seq": ("cp", "tp"),  # between the blocks: norms and residuals are split over tp by sequence
        "mlp": ("tp",),
        "q_heads": ("tp",),
        "kv_heads": ("tp",),
        "vocab": ("tp",),
        "experts": ("ep",),
    },
    spill=("fsdp", "cp"),
)
