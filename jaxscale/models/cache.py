"""What decoding keeps of earlier tokens: arrays [L, B, S, K, H] of all layers, a slot for each token."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxscale.config import ModelConfig
from jaxscale.sharding import active_mesh, axes_of, compute_spec, constrain, partitions
from pallas_kernels.decode_attention.api import MAX_QUERIES, decode_attention, decode_attention_implementation
from pallas_kernels.quantized_matmul.array import FORMATS, largest, round_to
from sharding_rules.rules import MEGATRON_FSDP, Rules

Cache = dict[str, Array]
CacheFormat = Literal["int8", "float8_e4m3fn", "int4"]
CACHE = (None, "batch", "seq", "kv_heads", None)
STEP = 64  # slots that decode_attention reads at a time
KERNELS = ("mosaic_gpu",)  # of its implementations those that are faster here than attention over all slots


def init_cache(
    cfg: ModelConfig,
    batch_size: int,
    max_len: int,
    rules: Rules = MEGATRON_FSDP,
    *,
    format: CacheFormat | None = None,
) -> Cache:
    """An empty cache in cfg.dtype, split over batch, slots (cp) and kv heads on the mesh in context.

    Args:
      format: with it values are in 8 or 4 bits, with float32 scales [L, B, S, K, 1]: one for a token and head.

    Raises:
      ValueError: an unknown format, or one for latent attention; a model that cannot decode, since its router looks at
        tokens that are still to come.
    """
    if format not in (None, *get_args(CacheFormat)):
        raise ValueError(f"a cache in {format!r} is unknown; use one of {', '.join(get_args(CacheFormat))}, or None")
    if format is not None and cfg.mla is not None:
        raise ValueError(f"{cfg.name} keeps latents, which are not rounded to {format}; leave the cache's format out")
    if cfg.moe is not None and cfg.moe.router == "expert_choice":
        raise ValueError(
            f"{cfg.name} cannot decode: with router='expert_choice' each of its {cfg.moe.num_experts} experts chooses "
            f"among all tokens of a row, later ones too; train with router='softmax' or 'sigmoid' to generate"
        )
    shapes = cache_shapes(cfg, batch_size, max_len)
    zeros = lambda shape, dtype: jnp.zeros(shape, dtype, out_sharding=compute_spec(shape, CACHE, rules))
    cache = {name: zeros(shape, format or cfg.dtype) for name, shape in shapes.items()}
    return (
        cache if format is None else cache | {_scale(n): zeros((*x.shape[:-1], 1), "float32") for n, x in cache.items()}
    )


def cache_shapes(cfg: ModelConfig, batch_size: int, max_len: int) -> dict[str, tuple[int, ...]]:
    """Keys and values [L, B, S, K, H]; of latent attention the latent and the rotated key, one after the other."""
    slots = (cfg.num_layers, batch_size, max_len)
    if cfg.mla is not None:
        return {"latent": (*slots, 1, cfg.mla.kv_rank + cfg.mla.rope_dim)}
    return dict.fromkeys(("k", "v"), (*slots, cfg.num_kv_heads, cfg.head_dim))


def update(cache: Cache, new: dict[str, Array], index: Array, positions: Array, rules: Rules) -> Cache:
    """`cache` with what is new [B, T, K, H] in layer `index`, rounded where the cache holds fewer bits."""
    for name in [name for name in new if _scale(name) in cache]:
        new = new | _rounded(name, new[name], cache)
    return cache | {name: write(cache[name], x, index, positions, rules) for name, x in new.items()}


def layer(cache: Cache, name: str, index: Array, dtype: Any, rules: Rules) -> tuple[Array, Array]:
    """Layer `index` of one of the cache's arrays in `dtype`, and the positions [B, S] of its slots."""
    x, positions = read(cache[name], index, rules)
    if _scale(name) in cache:
        x = (x.astype(jnp.float32) * read(cache[_scale(name)], index, rules)[0]).astype(dtype)
    return x, positions


def write(cache: Array, new: Array, index: Array, positions: Array, rules: Rules) -> Array:
    """[L, B, S, K, H] with `new` [B, T, K, H] written to layer `index`, at each row's first position onwards."""
    new = constrain(new.astype(cache.dtype), ("batch", None, "kv_heads", None), rules)
    starts = constrain(positions, ("batch", None), rules)[:, 0]
    slots_over = () if active_mesh() is None else tuple(axes_of(partitions(cache)[2:3]))

    def write_part_local(cache, new, index, starts):
        """Of the tokens, which all devices hold, each writes those whose slots it holds."""
        first = jax.lax.axis_index(slots_over) * cache.shape[2]
        slots = starts[:, None] + jnp.arange(new.shape[1], dtype=jnp.int32)[None] - first
        rows = jnp.broadcast_to(jnp.arange(starts.shape[0], dtype=jnp.int32)[:, None], slots.shape)
        where = jnp.stack([jnp.full_like(slots, index), rows, slots], axis=2)
        dims = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(2, 3), inserted_window_dims=(0, 1, 2), scatter_dims_to_operand_dims=(0, 1, 2)
        )
        return jax.lax.scatter(cache, where, new, dims, unique_indices=True, mode="drop")

    def write_local(cache, new, index, starts):
        # A scatter of one [T, K, H] window for each row, its dims in the cache's order: vmap would move the batch to
        # the front, and XLA then transposes the whole cache.
        if starts.shape[0] == new.shape[1] == 1:  # XLA makes two kernels of a scatter of one token: another, to nowhere
            starts, new = jnp.pad(starts, (0, 1), constant_values=-1), jnp.pad(new, ((0, 1), (0, 0), (0, 0), (0, 0)))
        rows = jnp.arange(starts.shape[0], dtype=jnp.int32)
        where = jnp.stack([jnp.full_like(rows, index), rows, starts], axis=1)
        dims = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(1, 2, 3), inserted_window_dims=(0, 1), scatter_dims_to_operand_dims=(0, 1, 2)
        )
        unique = {"indices_are_sorted": True, "unique_indices": True, "mode": "drop"}  # a position of -1: nowhere
        return jax.lax.scatter(cache, where, new, dims, **unique)

    if active_mesh() is not None:
        body = write_part_local if slots_over else write_local
        write_local = jax.shard_map(body, out_specs=jax.typeof(cache).sharding.spec)
    return write_local(cache, new, index, starts)


def read(cache: Array, index: Array, rules: Rules) -> tuple[Array, Array]:
    """Layer `index` of [L, B, S, K, H], and the positions [B, S] of its slots: those after a query's are hidden."""
    layer = jax.lax.dynamic_index_in_dim(cache, index, keepdims=False)
    slots = jnp.broadcast_to(jnp.arange(layer.shape[1], dtype=jnp.int32)[None], layer.shape[:2])
    return layer, constrain(slots, ("batch", None), rules)


def pages_fit(cache: Cache, q: Any) -> bool:
    """Whether `attend` has a kernel for queries [B, T, N, H] over this cache, here."""
    mesh = active_mesh()
    if "k" not in cache or q.shape[1] > MAX_QUERIES or cache["k"].shape[2] % STEP:
        return False
    if mesh is not None:  # each device must hold whole heads of both, and all slots
        split = [axes_of(partitions(x)[d : d + 1]) for x, d in ((q, 2), (cache["k"], 3))]
        if split[0] != split[1] or partitions(cache["k"])[2] is not None:
            return False
    B = cache["k"].shape[1]
    new = jax.ShapeDtypeStruct
    k, v, scales = jax.eval_shape(_pages, {name: new(x.shape, x.dtype) for name, x in cache.items()})
    ints = new((B, 1), jnp.int32), new((B,), jnp.int32)
    return decode_attention_implementation(new(q.shape, q.dtype), k, v, *ints, **scales) in KERNELS


def attend(
    cache: Cache,
    q: Array,
    index: Array,
    positions: Array,
    rules: Rules,
    *,
    sinks: Array | None = None,
    **options: Any,
) -> Array:
    """Attention of queries [B, T, N, H], the last T tokens of each row, to layer `index`; their keys are in the cache.

    The cache of all layers is read where it lies: a row of a layer is a page, and the layer says which is the first.
    """
    positions = constrain(positions, ("batch", None), rules)

    def attend_local(q, cache, index, positions, sinks):
        k, v, scales = _pages(cache)
        table = jnp.asarray(np.arange(q.shape[0], dtype=np.int32)[:, None])  # a constant, where an iota is a kernel
        first = index * jnp.int32(q.shape[0])
        lengths = positions[:, -1] + 1
        return decode_attention(q, k, v, table, lengths, sinks=sinks, first_page=first, **scales, **options)

    if active_mesh() is not None:
        q = constrain(q, ("batch", None, "q_heads", None), rules)
        if sinks is not None:
            sinks = constrain(sinks, ("q_heads",), rules)
        attend_local = jax.shard_map(attend_local, out_specs=jax.typeof(q).sharding.spec)
    return attend_local(q, cache, index, positions, sinks)


def _pages(cache: Cache) -> tuple[Array, Array, dict[str, Array]]:
    """Keys and values of all layers [L * B, S, K, H], and the scales [L * B, S, K] of a rounded cache."""
    pages = {name: x.reshape(-1, *x.shape[2:]) for name, x in cache.items()}
    scales = {f"{n}_scales": pages[_scale(n)][..., 0] for n in ("k", "v") if _scale(n) in pages}
    return pages["k"], pages["v"], scales


def _scale(name: str) -> str:
    return f"{name}_scale"


def _rounded(name: str, x: Array, cache: Cache) -> Cache:
    """Keys or values [B, T, K, H] in the cache's format, and a scale for each token and head."""
    format = jnp.dtype(cache[name].dtype).name
    high = FORMATS[format][2]
    x = x.astype(jnp.float32)
    scale = largest(x, (3,)) / high
    return {name: round_to(x, scale[..., 0], None, format), _scale(name): scale}  # pyright: ignore
