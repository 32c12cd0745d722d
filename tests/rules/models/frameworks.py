"""The same kind of model in other people's frameworks: this library's decoder, flax.linen, flax.nnx, equinox."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxscale.config import ModelConfig
from jaxscale.models import decoder
from jaxscale.params import abstract_params
from tests.rules.models.case import Case, cross_entropy, tokens


def own(L, D, F, V, N, K, H, B, T):
    cfg = ModelConfig(
        vocab_size=V, num_layers=L, embed_dim=D, mlp_dim=F, num_heads=N, num_kv_heads=K, head_dim=H, max_seq_len=T,
        tie_embeddings=False, dtype="float32",
    )  # fmt: skip

    def loss(params, tok):
        return cross_entropy(decoder.forward(params, tok, cfg), tok)

    return loss, abstract_params(decoder.param_specs(cfg)), (tokens(B, T),)


OWN_EXPERT = [
    ("embed", P("tp")), ("head|unembed", P(None, "tp")), ("w[qkv]$", P(None, None, "tp")), ("wo$", P(None, "tp")),
    ("w_(gate|up)", P(None, None, "tp")), ("w_down", P(None, "tp")),
]  # fmt: skip


def linen(L, D, F, V, N, B, T):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            mask = nn.make_causal_mask(x[..., 0])
            x = x + nn.MultiHeadDotProductAttention(num_heads=N, deterministic=True)(nn.LayerNorm()(x), mask=mask)
            return x + nn.Dense(D)(nn.gelu(nn.Dense(F)(nn.LayerNorm()(x))))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tok):
            x = nn.Embed(V, D)(tok)
            for _ in range(L):
                x = Block()(x)
            return nn.Dense(V, use_bias=False)(nn.LayerNorm()(x))

    model = Model()
    params = jax.eval_shape(model.init, jax.random.key(0), tokens(B, T))
    return (lambda p, tok: cross_entropy(model.apply(p, tok), tok)), params, (tokens(B, T),)


LINEN_EXPERT = [
    ("Embed_0", P("tp")), ("(query|key|value)/kernel", P(None, "tp")), ("(query|key|value)/bias", P("tp")),
    ("out/kernel", P("tp")), ("Block.*Dense_1/kernel", P(None, "tp")), ("Block.*Dense_1/bias", P("tp")),
    ("Block.*Dense_0/kernel", P("tp")), ("params/Dense_0/kernel", P(None, "tp")),
]  # fmt: skip


def nnx_model(L, D, F, V, N, B, T):
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm1, self.norm2 = nnx.RMSNorm(D, rngs=rngs), nnx.RMSNorm(D, rngs=rngs)
            self.attn = nnx.MultiHeadAttention(num_heads=N, in_features=D, decode=False, use_bias=False, rngs=rngs)
            self.up, self.down = nnx.Linear(D, F, rngs=rngs), nnx.Linear(F, D, rngs=rngs)

        def __call__(self, x):
            x = x + self.attn(self.norm1(x), mask=nnx.make_causal_mask(x[..., 0]))
            return x + self.down(nnx.relu(self.up(self.norm2(x))))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed, self.head = nnx.Embed(V, D, rngs=rngs), nnx.Linear(D, V, use_bias=False, rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(L)])
            self.norm = nnx.RMSNorm(D, rngs=rngs)

        def __call__(self, tok):
            x = self.embed(tok)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    graph, params, rest = nnx.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), nnx.Param, ...)
    # Counters and keys of dropout, which is off: any values will do.
    rest = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype) if s.dtype == jnp.uint32 else jax.random.key(0), rest)

    def loss(p, tok):
        return cross_entropy(nnx.merge(graph, p, rest)(tok), tok)

    return loss, nnx.to_pure_dict(params), (tokens(B, T),)


NNX_EXPERT = [
    ("embed", P("tp")), ("head", P(None, "tp")), ("(query|key|value)/kernel", P(None, "tp")), ("out/kernel", P("tp")),
    ("up/kernel", P(None, "tp")), ("up/bias", P("tp")), ("down/kernel", P("tp")),
]  # fmt: skip


def equinox(L, D, F, V, N, B, T):
    class Block(eqx.Module):
        attn: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP
        norms: list

        def __init__(self, key):
            self.attn = eqx.nn.MultiheadAttention(N, D, key=key)
            self.mlp = eqx.nn.MLP(D, D, F, 1, key=key)
            self.norms = [eqx.nn.LayerNorm(D), eqx.nn.LayerNorm(D)]

        def __call__(self, x, mask):
            h = jax.vmap(self.norms[0])(x)
            x = x + self.attn(h, h, h, mask=mask)
            return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))

    class Model(eqx.Module):
        embed: eqx.nn.Embedding
        blocks: list
        head: eqx.nn.Linear

        def __init__(self, key):
            self.embed = eqx.nn.Embedding(V, D, key=key)
            self.blocks = [Block(key) for _ in range(L)]
            self.head = eqx.nn.Linear(D, V, use_bias=False, key=key)

        def __call__(self, tok):
            x = jax.vmap(self.embed)(tok)
            mask = jnp.tril(jnp.ones((T, T), bool))
            for block in self.blocks:
                x = block(x, mask)
            return jax.vmap(self.head)(x)

    params, static = eqx.partition(eqx.filter_eval_shape(Model, jax.random.key(0)), lambda x: hasattr(x, "shape"))

    def loss(p, tok):
        return cross_entropy(jax.vmap(eqx.combine(p, static))(tok), tok)

    return loss, params, (tokens(B, T),)


EQUINOX_EXPERT = [
    ("embed", P("tp")), ("head", P("tp")), ("(query|key|value)_proj/weight", P("tp")),
    ("output_proj/weight", P(None, "tp")),
    ("layers/0/weight", P("tp")), ("layers/0/bias", P("tp")), ("layers/1/weight", P(None, "tp")),
]  # fmt: skip

SMALL = {"L": 24, "D": 2048, "F": 8192, "V": 32000, "N": 16, "B": 64, "T": 1024}
TINY = {"L": 2, "D": 64, "F": 96, "V": 128, "N": 8, "B": 8, "T": 16}
CASES = [
    Case("jaxscale decoder", own,
         {"L": 32, "D": 4096, "F": 14336, "V": 128256, "N": 32, "K": 8, "H": 128, "B": 64, "T": 4096},
         {"L": 2, "D": 64, "F": 96, "V": 128, "N": 8, "K": 4, "H": 8, "B": 8, "T": 16}, OWN_EXPERT),
    Case("flax.linen transformer", linen, SMALL, TINY, LINEN_EXPERT),
    Case("flax.nnx transformer", nnx_model, SMALL, TINY, NNX_EXPERT),
    Case("equinox transformer", equinox, SMALL, TINY, EQUINOX_EXPERT),
]  # fmt: skip
