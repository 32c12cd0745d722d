"""Generation: prefill and decode with a sharded key-value cache, one compiled program each.

answers = generate(params, cfg, [[504, 2365, 6354]], max_new_tokens=20)
"""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxscale.config import ModelConfig, check_sampling
from jaxscale.models import coherent as staying
from jaxscale.models import decoder
from jaxscale.models.unstacked import unstack
from jaxscale.sharding import active_mesh, constrain, place
from sharding_rules.rules import MEGATRON_FSDP, Rules

# Prompts are padded to a multiple of the first, caches to a multiple of the second: few lengths are compiled.
PROMPT_STEP, CACHE_STEP = 64, 256


def generate(
    params: decoder.Params,
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]] | np.ndarray,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Collection[int] = (),
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
    rules: Rules = MEGATRON_FSDP,
    on_token: Callable[[int, int], None] | None = None,
    cache_format: decoder.CacheFormat | None = None,
    coherent: bool = False,
) -> list[list[int]]:
    """The tokens that follow each prompt.

    Args:
      params, cfg: of the decoder.
      prompts: token ids; their lengths may differ. All rows decode together, each at its own position.
      max_new_tokens: for each row.
      temperature: 0 takes the likeliest token; above it tokens are drawn from softmax(logits / temperature).
      top_k: draw among the k likeliest tokens.
      top_p: draw among the fewest tokens whose probabilities sum to at least top_p (after top_k).
      stop_tokens: a row ends before the first of these, which is not returned.
      key: a PRNG key, for a temperature above 0. What a row draws depends on the key, the row's index and the position.
      mesh, rules: where to compute; parameters that lie elsewhere are moved. By default the mesh that params lie on.
      on_token: called with (row, token) as soon as each token is known.
      cache_format: of keys and values: "int8", "float8_e4m3fn" or "int4" with scales; None: as they are.
      coherent: over ep tokens stay where their experts are: one all_to_all a layer instead of two transfers, for which
        every device holds the cache of all rows, and the parameters but for the experts. For models that send a token
        to one expert, or to one group of experts that is on one device.

    Raises:
      ValueError: an empty prompt, a token outside the vocabulary, more tokens than cfg.max_seq_len, a sampling setting
        outside its range; coherent for another model or over other axes than ep.
    """
    rows = _check_prompts(prompts, cfg, max_new_tokens)
    top_k = _check_sampling(cfg, temperature, top_k, top_p, key)
    mesh = _mesh_of(params) if mesh is None else mesh
    if coherent:
        staying.check(cfg, mesh)
    if mesh is not None:
        rest = dataclasses.replace(rules, params=staying.PARAMS) if coherent else rules
        params = jax.device_put(params, place(params, decoder.param_specs(cfg), mesh, rest))
    if _copied_by_xla(params) and not coherent:
        params = unstack(params, join=mesh is None or mesh.shape["tp"] == 1, interleave=mesh is None)
    # Rows without a prompt fill the batch up, so that it divides over the mesh.
    split = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in rules.compute.get("batch", ()))
    tokens, lengths = _pad(rows, _round_up(len(rows), split))
    max_len = _round_up(max(int(lengths.max()) + max_new_tokens, tokens.shape[1]), CACHE_STEP)
    greedy = temperature == 0
    sampling = {
        "key": None if greedy else key,
        "temperature": None if greedy else np.float32(temperature),
        "top_p": None if top_p is None else np.float32(top_p),
        "top_k": top_k,
        "rules": rules,
        "coherent": coherent,
    }

    answers: list[list[int]] = [[] for _ in rows]
    alive = list(range(len(rows)))
    with jax.set_mesh(mesh) if mesh is not None else jax.named_scope("generate"):
        new, cache = _prefill_and_sample(
            params, tokens, lengths, cfg, max_len=max_len, cache_format=cache_format, **sampling
        )
        for step in range(max_new_tokens):
            last = new
            if step + 1 < max_new_tokens:  # dispatched before the host reads `last`: the device does not wait for it
                new, cache = _decode_and_sample(params, cache, last, lengths + np.int32(step), cfg, **sampling)
            values = np.asarray(last)
            alive = [row for row in alive if values[row] not in stop_tokens]
            for row in alive:
                answers[row].append(int(values[row]))
                if on_token is not None:
                    on_token(row, int(values[row]))
            if not alive:
                break
    return answers


def prefill(
    params: decoder.Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    cfg: ModelConfig,
    *,
    max_len: int,
    rules: Rules = MEGATRON_FSDP,
    cache_format: decoder.CacheFormat | None = None,
) -> tuple[Float[Array, "B V"], decoder.Cache]:
    """Logits of the token that follows each prompt, and a cache of max_len >= T slots.

    Prompts are padded on the right. What the padding writes to the cache is hidden by causality until `decode_step`
    overwrites it.
    """
    T, mesh = tokens.shape[1], active_mesh()
    # Attention reads T slots here, not max_len. Slots that are split over cp must already lie where they will stay.
    slots = T if mesh is None or mesh.shape["cp"] == 1 else max_len
    cache = decoder.init_cache(cfg, tokens.shape[0], slots, rules, format=cache_format)
    x, cache = decoder.hidden(params, tokens, cfg, cache=cache, rules=rules)
    assert cache is not None
    last = constrain(jnp.arange(T)[None, :] == lengths[:, None] - 1, ("batch", "norm_seq"), rules)
    x = jnp.where(last[..., None], x, jnp.zeros((), x.dtype)).sum(axis=1, keepdims=True)
    if slots < max_len:
        padding = [(0, 0), (0, 0), (0, max_len - slots), (0, 0), (0, 0)]
        cache = jax.tree.map(lambda c: jnp.pad(c, padding), cache)
    return decoder.logits(params, x, cfg, rules)[:, 0], cache


def decode_step(
    params: decoder.Params,
    cache: decoder.Cache,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    cfg: ModelConfig,
    *,
    rules: Rules = MEGATRON_FSDP,
    coherent: bool = False,
) -> tuple[Float[Array, "B V"], decoder.Cache]:
    """Logits of the token that follows `tokens`, which stand at `positions`; the cache with these. Donate the cache.

    coherent: parameters and cache lie as `jaxscale.models.coherent.hidden` takes them.
    """
    if coherent:
        x, new = staying.hidden(params, cache, tokens, positions, cfg, rules)
    else:
        x, new = decoder.hidden(params, tokens[:, None], cfg, positions=positions[:, None], cache=cache, rules=rules)
    assert new is not None
    return decoder.logits(params, x, cfg, rules)[:, 0], new


def sample(
    logits: Float[Array, "B V"],
    positions: Int[Array, " B"],
    *,
    key: jax.Array | None,
    temperature: float | Array | None,
    top_p: float | Array | None = None,
    top_k: int | None = None,
    rules: Rules = MEGATRON_FSDP,
) -> Int[Array, " B"]:
    """One token for each row, the same on every mesh; greedy when temperature is None.

    Args:
      positions: of the tokens to draw; with the row's index they make the row's key.
      key, temperature, top_p, top_k: as in `generate`; top_k is static.
    """
    logits = constrain(logits, ("batch", None), rules)
    if temperature is None:
        return constrain(jnp.argmax(logits, axis=-1).astype(jnp.int32), (None,), rules)
    assert key is not None
    rows = constrain(jnp.arange(logits.shape[0], dtype=jnp.int32), ("batch",), rules)
    positions = constrain(positions, ("batch",), rules)

    def sample_local(logits, rows, positions, key_data, temperature, top_p):
        logits = logits / temperature
        indices = None
        if top_k is not None or top_p is not None:
            logits, indices = jax.lax.top_k(logits, top_k or logits.shape[-1])
        if top_p is not None:
            probs = jax.nn.softmax(logits, axis=-1)
            before = jnp.cumsum(probs, axis=-1) - probs  # of all likelier tokens: 0 for the first, which always stays
            logits = jnp.where(before < top_p, logits, -jnp.inf)

        def draw(logits, row, position):
            row_key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key_data), row), position)
            return jax.random.categorical(row_key, logits)

        drawn = jax.vmap(draw)(logits, rows, positions)
        return drawn if indices is None else jnp.take_along_axis(indices, drawn[:, None], axis=-1)[:, 0]

    args = logits, rows, positions, jax.random.key_data(key), jnp.float32(temperature)
    args += (None if top_p is None else jnp.float32(top_p),)
    if active_mesh() is not None:
        sample_local = jax.shard_map(sample_local, out_specs=jax.typeof(rows).sharding.spec)
    return constrain(sample_local(*args).astype(jnp.int32), (None,), rules)


def stream_text(tokenizer: Any, write: Callable[[int, str], None]) -> Callable[[int, int], None]:
    """An `on_token` that passes each row's text to write(row, text), held back until its bytes are whole characters.

    Args:
      tokenizer: anything whose decode(ids) gives text.
    """
    written, pending = defaultdict(list), defaultdict(list)  # row -> tokens; those last written give the next context

    def on_token(row: int, token: int) -> None:
        pending[row].append(token)
        before, text = tokenizer.decode(written[row]), tokenizer.decode(written[row] + pending[row])
        if len(text) > len(before) and not text.endswith("\ufffd"):
            write(row, text[len(before) :])
            written[row], pending[row] = pending[row], []

    return on_token


@functools.partial(jax.jit, static_argnames=("cfg", "max_len", "top_k", "rules", "cache_format", "coherent"))
def _prefill_and_sample(params, tokens, lengths, cfg, *, max_len, rules, cache_format, coherent, **sampling):
    logits, cache = prefill(params, tokens, lengths, cfg, max_len=max_len, rules=rules, cache_format=cache_format)
    if coherent:
        cache = jax.tree.map(lambda c: jax.reshard(c, P()), cache)
    return sample(logits, lengths, rules=rules, **sampling), cache


@functools.partial(jax.jit, static_argnames=("cfg", "top_k", "rules", "coherent"), donate_argnames=("cache",))
def _decode_and_sample(params, cache, tokens, positions, cfg, *, rules, coherent, **sampling):
    logits, cache = decode_step(params, cache, tokens, positions, cfg, rules=rules, coherent=coherent)
    return sample(logits, positions + 1, rules=rules, **sampling), cache


def _check_prompts(prompts: Any, cfg: ModelConfig, max_new_tokens: int) -> list[np.ndarray]:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if len(prompts) == 0:
        raise ValueError("there are no prompts; pass at least one list of token ids")
    rows = [np.asarray(prompt) for prompt in prompts]
    for i, row in enumerate(rows):
        if row.size == 0:
            raise ValueError(f"prompt {i} is empty; give it at least one token, such as the one that begins a text")
        if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"prompt {i} must be a list of token ids, got an array of {row.dtype} {row.shape}")
        outside = np.flatnonzero((row < 0) | (row >= cfg.vocab_size))
        if outside.size:
            raise ValueError(
                f"prompt {i} has token {row[outside[0]]} at position {outside[0]}, outside the vocabulary of "
                f"{cfg.vocab_size} (0 to {cfg.vocab_size - 1}); encode it with the model's own tokenizer"
            )
        if row.size + max_new_tokens > cfg.max_seq_len:
            raise ValueError(
                f"prompt {i} has {row.size} tokens and max_new_tokens={max_new_tokens}, together more than "
                f"max_seq_len={cfg.max_seq_len}; shorten the prompt or ask for at most "
                f"{max(cfg.max_seq_len - row.size, 0)} new tokens"
            )
    return rows


def _check_sampling(
    cfg: ModelConfig, temperature: float, top_k: int | None, top_p: float | None, key: Any
) -> int | None:
    """top_k, at most the vocabulary."""
    check_sampling(temperature, top_k, top_p)
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} draws at random: pass key=jax.random.key(seed)")
    return None if top_k is None else min(top_k, cfg.vocab_size)


def _pad(rows: list[np.ndarray], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T], zeros on the right, and lengths [B]; added rows are one token long."""
    lengths = np.ones(batch_size, np.int32)
    lengths[: len(rows)] = [row.size for row in rows]
    tokens = np.zeros((batch_size, _round_up(int(lengths.max()), PROMPT_STEP)), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : row.size] = row
    return tokens, lengths


def _mesh_of(params: Any) -> Mesh | None:
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)  # none of numpy arrays
    return sharding.mesh if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) else None


def _copied_by_xla(params: Any) -> bool:
    """Whether to take stacked layers apart, which a GPU's program would copy one by one at each token.

    Values of 4 bits always; wider ones where what is free on the device holds the copies twice over.
    """
    leaves = jax.tree.leaves(params)
    if not isinstance(leaves[0], jax.Array) or (device := next(iter(leaves[0].devices()))).platform != "gpu":
        return False
    if any(jax.dtypes.itemsize_bits(x.dtype) == 4 for x in leaves):
        return True
    stats = device.memory_stats() or {}
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    return stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0) > 2 * held


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
