"""Language models: Llama, LoRA on it, GPT-2, GPT-NeoX, T5, Mixtral, MLA, Mamba, RWKV."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tests.rules.models.case import Case, arrays, attend, cross_entropy, layer_norm, rms, rope, row, tokens

COL, ROW, VOCAB = P(None, None, "tp"), P(None, "tp"), P("tp")  # of weights stacked over layers; of an embedding


# Llama: scanned, grouped heads, gate and up apart --------------------------------------------------------------------


def llama_block(x, w, K, H):
    b, t, _ = x.shape
    h = rms(x, w["n1"])
    q = rope((h @ w["wq"]).reshape(b, t, -1, H))
    k, v = rope((h @ w["wk"]).reshape(b, t, K, H)), (h @ w["wv"]).reshape(b, t, K, H)
    q = q.reshape(b, t, K, -1, H)
    s = jnp.einsum("btkgh,bskh->bkgts", q, k) * H**-0.5
    keep = jnp.tril(jnp.ones((t, t), bool))[None, None, None]
    o = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(jnp.where(keep, s, -1e9), -1), v)
    x = x + o.reshape(b, t, -1) @ w["wo"]
    h = rms(x, w["n2"])
    return x + (jax.nn.silu(h @ w["wg"]) * (h @ w["wu"])) @ w["wd"]


def llama_shapes(L, D, F, V, N, K, H):
    return {
        "embed": (V, D), "out": (D, V), "norm": (D,),
        "layers": {
            "wq": (L, D, N * H), "wk": (L, D, K * H), "wv": (L, D, K * H), "wo": (L, N * H, D),
            "wg": (L, D, F), "wu": (L, D, F), "wd": (L, F, D), "n1": (L, D), "n2": (L, D),
        },
    }  # fmt: skip


def llama(L, D, F, V, N, K, H, B, T, unroll=False):
    def loss(p, tok):
        x = p["embed"][tok]
        if unroll:
            for i in range(L):
                x = llama_block(x, {k: v[i] for k, v in p["layers"].items()}, K, H)
        else:
            block = jax.checkpoint(functools.partial(llama_block, K=K, H=H))
            x, _ = jax.lax.scan(lambda x, w: (block(x, w), None), x, p["layers"])
        return cross_entropy(rms(x, p["norm"]) @ p["out"], tok)

    return loss, arrays(llama_shapes(L, D, F, V, N, K, H)), (tokens(B, T),)


LLAMA_TINY = {"L": 2, "D": 64, "F": 96, "V": 128, "N": 8, "K": 4, "H": 8, "B": 8, "T": 16}
LLAMA_70B = {"L": 80, "D": 8192, "F": 28672, "V": 128256, "N": 64, "K": 8, "H": 128, "B": 64, "T": 4096}
LLAMA_EXPERT = [("embed", VOCAB), ("out", P(None, "tp")), ("w[qkvgu]$", COL), ("w[od]$", ROW)]


def lora(L, D, F, V, N, K, H, B, T, R):
    """Rank-R pairs on wq, wv and wd; the base is frozen."""
    base = llama_shapes(L, D, F, V, N, K, H)
    lw = base["layers"]
    pairs = {n: {"a": (L, lw[n][1], R), "b": (L, R, lw[n][2])} for n in ("wq", "wv", "wd")}

    def loss(p, tok):
        frozen = jax.lax.stop_gradient(p["base"])

        def body(x, ws):
            w, ab = ws
            w = {**w, **{n: w[n] + ab[n]["a"] @ ab[n]["b"] for n in ab}}
            return llama_block(x, w, K, H), None

        x, _ = jax.lax.scan(body, frozen["embed"][tok], (frozen["layers"], p["lora"]))
        return cross_entropy(rms(x, frozen["norm"]) @ frozen["out"], tok)

    return loss, arrays({"base": base, "lora": pairs}), (tokens(B, T),)


LORA_EXPERT = [("lora/w[qv]/b", COL), ("lora/wd/a", ROW), ("lora", P()), *LLAMA_EXPERT]


# GPT-2: fused c_attn, tied embeddings, learned positions, unrolled ---------------------------------------------------


def gpt2(L, D, V, N, B, T):
    block = {
        "ln_1": {"g": (D,), "b": (D,)}, "ln_2": {"g": (D,), "b": (D,)},
        "attn": {"c_attn": {"w": (D, 3 * D), "b": (3 * D,)}, "c_proj": {"w": (D, D), "b": (D,)}},
        "mlp": {"c_fc": {"w": (D, 4 * D), "b": (4 * D,)}, "c_proj": {"w": (4 * D, D), "b": (D,)}},
    }  # fmt: skip
    shapes = {"wte": (V, D), "wpe": (T, D), "h": [block] * L, "ln_f": {"g": (D,), "b": (D,)}}

    def dense(x, p):
        y = x @ p["w"]
        return y + row(p["b"], y)

    def loss(p, tok):
        b, t = tok.shape
        x = p["wte"][tok] + p["wpe"][None]
        for w in p["h"]:
            q, k, v = jnp.split(dense(layer_norm(x, *(w["ln_1"][n] for n in "gb")), w["attn"]["c_attn"]), 3, -1)
            o = attend(*(y.reshape(b, t, N, -1) for y in (q, k, v)))
            x = x + dense(o.reshape(b, t, -1), w["attn"]["c_proj"])
            h = jax.nn.gelu(dense(layer_norm(x, *(w["ln_2"][n] for n in "gb")), w["mlp"]["c_fc"]))
            x = x + dense(h, w["mlp"]["c_proj"])
        return cross_entropy(layer_norm(x, p["ln_f"]["g"], p["ln_f"]["b"]) @ p["wte"].T, tok)

    return loss, arrays(shapes), (tokens(B, T),)


GPT2_EXPERT = [
    ("c_attn/w|c_fc/w", P(None, "tp")),
    ("c_attn/b|c_fc/b", P("tp")),
    ("c_proj/w", P("tp")),  # 50257 rows do not divide: the embedding stays whole
]


# GPT-NeoX: heads interleaved as [N, 3, H], parallel attention and mlp ------------------------------------------------


def neox(L, D, V, N, B, T):
    H = D // N
    block = {
        "input_layernorm": {"g": (L, D), "b": (L, D)}, "post_attention_layernorm": {"g": (L, D), "b": (L, D)},
        "attention": {"query_key_value": {"w": (L, D, 3 * D), "b": (L, 3 * D)}, "dense": {"w": (L, D, D), "b": (L, D)}},
        "mlp": {"dense_h_to_4h": {"w": (L, D, 4 * D), "b": (L, 4 * D)},
                "dense_4h_to_h": {"w": (L, 4 * D, D), "b": (L, D)}},
    }  # fmt: skip
    shapes = {"embed_in": (V, D), "layers": block, "final": {"g": (D,), "b": (D,)}, "embed_out": (D, V)}

    def dense(x, p):
        y = x @ p["w"]
        return y + row(p["b"], y)

    def body(x, w):
        b, t, _ = x.shape
        h = dense(layer_norm(x, *(w["input_layernorm"][n] for n in "gb")), w["attention"]["query_key_value"])
        h = h.reshape(b, t, N, 3, H)
        o = attend(rope(h[:, :, :, 0]), rope(h[:, :, :, 1]), h[:, :, :, 2]).reshape(b, t, -1)
        m = dense(layer_norm(x, *(w["post_attention_layernorm"][n] for n in "gb")), w["mlp"]["dense_h_to_4h"])
        return x + dense(o, w["attention"]["dense"]) + dense(jax.nn.gelu(m), w["mlp"]["dense_4h_to_h"]), None

    def loss(p, tok):
        x, _ = jax.lax.scan(body, p["embed_in"][tok], p["layers"])
        return cross_entropy(layer_norm(x, p["final"]["g"], p["final"]["b"]) @ p["embed_out"], tok)

    return loss, arrays(shapes), (tokens(B, T),)


NEOX_EXPERT = [
    ("embed_in", VOCAB), ("embed_out", P(None, "tp")),
    ("(query_key_value|dense_h_to_4h)/w", COL), ("(query_key_value|dense_h_to_4h)/b", P(None, "tp")),
    ("(dense|dense_4h_to_h)/w", ROW),
]  # fmt: skip


# T5: encoder and decoder, relative position bias shared by the layers ------------------------------------------------


def t5(L, D, F, V, N, H, B, T, S):
    attn = {"q": (D, N * H), "k": (D, N * H), "v": (D, N * H), "o": (N * H, D), "norm": (D,)}
    ff = {"wi_0": (D, F), "wi_1": (D, F), "wo": (F, D), "norm": (D,)}
    shapes = {
        "shared": (V, D), "lm_head": (D, V),
        "encoder": {"bias": (32, N), "norm": (D,), "blocks": [{"self": attn, "ff": ff}] * L},
        "decoder": {"bias": (32, N), "norm": (D,), "blocks": [{"self": attn, "cross": attn, "ff": ff}] * L},
    }  # fmt: skip

    def mha(x, y, w, causal, bias=None):
        q, k, v = ((a @ w[n]).reshape(*a.shape[:2], N, H) for a, n in ((x, "q"), (y, "k"), (y, "v")))
        return attend(q, k, v, causal, bias).reshape(*x.shape[:2], -1) @ w["o"]

    def relative(table, t):
        bucket = jnp.clip(jnp.arange(t)[:, None] - jnp.arange(t)[None] + 16, 0, 31)
        return table[bucket].transpose(2, 0, 1)[None]

    def feed(x, w):
        h = rms(x, w["norm"])
        return x + (jax.nn.gelu(h @ w["wi_0"]) * (h @ w["wi_1"])) @ w["wo"]

    def loss(p, source, target):
        e, d = p["encoder"], p["decoder"]
        x, bias = p["shared"][source], relative(e["bias"], source.shape[1])
        for w in e["blocks"]:
            h = rms(x, w["self"]["norm"])
            x = feed(x + mha(h, h, w["self"], False, bias), w["ff"])
        x = rms(x, e["norm"])
        y, bias = p["shared"][target], relative(d["bias"], target.shape[1])
        for w in d["blocks"]:
            h = rms(y, w["self"]["norm"])
            y = y + mha(h, h, w["self"], True, bias)
            y = feed(y + mha(rms(y, w["cross"]["norm"]), x, w["cross"], False), w["ff"])
        return cross_entropy(rms(y, d["norm"]) @ p["lm_head"], target)

    return loss, arrays(shapes), (tokens(B, S), tokens(B, T))


T5_EXPERT = [
    ("shared", VOCAB), ("lm_head", P(None, "tp")), ("bias", P(None, "tp")),
    ("(self|cross)/[qkv]$|wi_", P(None, "tp")), ("(self|cross)/o$|wo$", P("tp")),
]  # fmt: skip


# Mixtral-like: every expert computes, the router's weights select ----------------------------------------------------


def mixtral(L, D, F, V, N, K, H, E, B, T):
    shapes = llama_shapes(L, D, F, V, N, K, H)
    w = shapes["layers"]
    w |= {"router": (L, D, E), "wg": (L, E, D, F), "wu": (L, E, D, F), "wd": (L, E, F, D)}

    def body(x, w):
        b, t, _ = x.shape
        h = rms(x, w["n1"])
        q = rope((h @ w["wq"]).reshape(b, t, N, H))
        k, v = rope((h @ w["wk"]).reshape(b, t, K, H)), (h @ w["wv"]).reshape(b, t, K, H)
        k, v = jnp.repeat(k, N // K, 2), jnp.repeat(v, N // K, 2)
        x = x + attend(q, k, v).reshape(b, t, -1) @ w["wo"]
        h = rms(x, w["n2"])
        gates = jax.nn.softmax(h @ w["router"], -1)
        second = jax.lax.top_k(gates, 2)[0][..., 1:]
        gates = jnp.where(gates >= second, gates, 0.0)
        up = jax.nn.silu(jnp.einsum("btd,edf->ebtf", h, w["wg"])) * jnp.einsum("btd,edf->ebtf", h, w["wu"])
        y = jnp.einsum("ebtf,efd->ebtd", up, w["wd"])
        return x + jnp.einsum("ebtd,bte->btd", y, gates), None

    def loss(p, tok):
        x, _ = jax.lax.scan(body, p["embed"][tok], p["layers"])
        return cross_entropy(rms(x, p["norm"]) @ p["out"], tok)

    return loss, arrays(shapes), (tokens(B, T),)


MIXTRAL_EXPERT = [
    ("embed", VOCAB), ("out", P(None, "tp")), ("w[qkv]$", COL), ("wo$", ROW),
    ("w[gu]$", P(None, None, None, "tp")), ("wd$", P(None, None, "tp")),
]  # fmt: skip


# Multi-head latent attention, as in DeepSeek -------------------------------------------------------------------------


def mla(L, D, F, V, N, H, R, Q, C, B, T):
    """H and R: head dims without and with rope; Q and C: ranks of the query and the key-value compression."""
    shapes = {
        "embed": (V, D), "out": (D, V), "norm": (D,),
        "layers": {
            "q_a": (L, D, Q), "q_norm": (L, Q), "q_b": (L, Q, N * (H + R)),
            "kv_a": (L, D, C + R), "kv_norm": (L, C), "kv_b": (L, C, N * 2 * H), "o": (L, N * H, D),
            "wg": (L, D, F), "wu": (L, D, F), "wd": (L, F, D), "n1": (L, D), "n2": (L, D),
        },
    }  # fmt: skip

    def body(x, w):
        b, t, _ = x.shape
        h = rms(x, w["n1"])
        q = (rms(h @ w["q_a"], w["q_norm"]) @ w["q_b"]).reshape(b, t, N, H + R)
        kv = h @ w["kv_a"]
        up = (rms(kv[..., :C], w["kv_norm"]) @ w["kv_b"]).reshape(b, t, N, 2 * H)
        k_rope = rope(kv[..., None, C:])[:, :, 0]
        s = jnp.einsum("btnh,bsnh->bnts", q[..., :H], up[..., :H])
        s = s + jnp.einsum("btnh,bsh->bnts", rope(q[..., H:]), k_rope)
        keep = jnp.tril(jnp.ones((t, t), bool))[None, None]
        p = jax.nn.softmax(jnp.where(keep, s * (H + R) ** -0.5, -1e9), -1)
        x = x + jnp.einsum("bnts,bsnh->btnh", p, up[..., H:]).reshape(b, t, -1) @ w["o"]
        h = rms(x, w["n2"])
        return x + (jax.nn.silu(h @ w["wg"]) * (h @ w["wu"])) @ w["wd"], None

    def loss(p, tok):
        x, _ = jax.lax.scan(body, p["embed"][tok], p["layers"])
        return cross_entropy(rms(x, p["norm"]) @ p["out"], tok)

    return loss, arrays(shapes), (tokens(B, T),)


MLA_EXPERT = [("embed", VOCAB), ("out", P(None, "tp")), ("(q_b|kv_b|wg|wu)$", COL), ("(/o|wd)$", ROW)]


# Mamba: in_proj of two segments, causal convolution, selective scan --------------------------------------------------


def mamba(L, D, I, S, R, V, B, T):
    """I inner width, S state size, R rank of dt."""
    shapes = {
        "embedding": (V, D), "norm_f": (D,),
        "layers": {
            "norm": (L, D), "in_proj": (L, D, 2 * I), "conv": (L, 4, 1, I), "conv_b": (L, I),
            "x_proj": (L, I, R + 2 * S), "dt_proj": (L, R, I), "dt_b": (L, I), "A_log": (L, I, S), "D": (L, I),
            "out_proj": (L, I, D),
        },
    }  # fmt: skip

    def body(x, w):
        u, z = jnp.split(rms(x, w["norm"]) @ w["in_proj"], 2, -1)
        u = jax.lax.conv_general_dilated(
            u, w["conv"], (1,), [(3, 0)], dimension_numbers=("NTC", "TIO", "NTC"), feature_group_count=I
        )
        u = jax.nn.silu(u + row(w["conv_b"], u))
        dt, b, c = jnp.split(u @ w["x_proj"], [R, R + S], -1)
        dt = dt @ w["dt_proj"]
        dt = jax.nn.softplus(dt + row(w["dt_b"], dt))
        a = jnp.exp(dt[..., None] * -jnp.exp(w["A_log"])[None, None])
        bu = (dt * u)[..., None] * b[:, :, None]

        def step(h, ab):
            h = ab[0] * h + ab[1]
            return h, h

        _, y = jax.lax.scan(step, jnp.zeros_like(a[:, 0]), (a.swapaxes(0, 1), bu.swapaxes(0, 1)))
        y = jnp.einsum("tbis,bts->bti", y, c) + u * row(w["D"], u)
        return x + (y * jax.nn.silu(z)) @ w["out_proj"], None

    def loss(p, tok):
        x, _ = jax.lax.scan(body, p["embedding"][tok], p["layers"])
        return cross_entropy(rms(x, p["norm_f"]) @ p["embedding"].T, tok)

    return loss, arrays(shapes), (tokens(B, T),)


MAMBA_EXPERT = [
    ("embedding", VOCAB), ("in_proj|dt_proj", COL), ("conv$", P(None, None, None, "tp")),
    ("conv_b|dt_b|layers/D$", P(None, "tp")), ("A_log|x_proj|out_proj", ROW),
]  # fmt: skip


# RWKV: token shift, a recurrence per channel, squared-relu channel mix -----------------------------------------------


def rwkv(L, D, F, V, B, T):
    shapes = {
        "emb": (V, D), "head": (D, V), "ln_out": {"g": (D,), "b": (D,)},
        "blocks": {
            "ln1": {"g": (L, D), "b": (L, D)}, "ln2": {"g": (L, D), "b": (L, D)},
            "att": {"mix": (L, 3, D), "decay": (L, D), "first": (L, D), "key": (L, D, D), "value": (L, D, D),
                    "receptance": (L, D, D), "output": (L, D, D)},
            "ffn": {"mix": (L, 2, D), "key": (L, D, F), "receptance": (L, D, D), "value": (L, F, D)},
        },
    }  # fmt: skip

    def shift(x):
        return jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]

    def mix(x, last, m):
        return x * row(m, x) + last * (1 - row(m, x))

    def wkv(k, v, decay, first):
        def step(state, kv):
            num, den = state
            k, v = kv
            e = jnp.exp(first[None] + k)
            out = (num + e * v) / (den + e)
            d, ek = jnp.exp(-jnp.exp(decay))[None], jnp.exp(k)
            return (d * num + ek * v, d * den + ek), out

        zero = jnp.zeros_like(k[:, 0])
        _, y = jax.lax.scan(step, (zero, zero + 1e-6), (k.swapaxes(0, 1), v.swapaxes(0, 1)))
        return y.swapaxes(0, 1)

    def body(x, w):
        a, f = w["att"], w["ffn"]
        h = layer_norm(x, w["ln1"]["g"], w["ln1"]["b"])
        last = shift(h)
        k, v, r = (mix(h, last, a["mix"][i]) @ a[n] for i, n in enumerate(("key", "value", "receptance")))
        x = x + (jax.nn.sigmoid(r) * wkv(k, v, a["decay"], a["first"])) @ a["output"]
        h = layer_norm(x, w["ln2"]["g"], w["ln2"]["b"])
        last = shift(h)
        k = jnp.square(jax.nn.relu(mix(h, last, f["mix"][0]) @ f["key"]))
        return x + jax.nn.sigmoid(mix(h, last, f["mix"][1]) @ f["receptance"]) * (k @ f["value"]), None

    def loss(p, tok):
        x, _ = jax.lax.scan(body, p["emb"][tok], p["blocks"])
        return cross_entropy(layer_norm(x, p["ln_out"]["g"], p["ln_out"]["b"]) @ p["head"], tok)

    return loss, arrays(shapes), (tokens(B, T),)


RWKV_EXPERT = [
    ("emb", VOCAB), ("head", P(None, "tp")), ("att/(key|value|receptance)|ffn/key", COL),
    ("att/(decay|first)", P(None, "tp")), ("att/output|ffn/value", ROW),
]  # fmt: skip


CASES = [
    Case("Llama (raw JAX, scanned)", llama, LLAMA_70B, LLAMA_TINY, LLAMA_EXPERT),
    Case("LoRA on Llama", lora, {**LLAMA_70B, "R": 16}, {**LLAMA_TINY, "R": 4}, LORA_EXPERT),
    Case("GPT-2", gpt2, {"L": 24, "D": 1024, "V": 50257, "N": 16, "B": 64, "T": 1024},
         {"L": 2, "D": 64, "V": 101, "N": 8, "B": 8, "T": 16}, GPT2_EXPERT),
    Case("GPT-NeoX", neox, {"L": 44, "D": 6144, "V": 50432, "N": 64, "B": 32, "T": 2048},
         {"L": 2, "D": 64, "V": 128, "N": 8, "B": 8, "T": 16}, NEOX_EXPERT),
    Case("T5", t5, {"L": 24, "D": 4096, "F": 10240, "V": 32128, "N": 64, "H": 64, "B": 32, "T": 512, "S": 512},
         {"L": 2, "D": 64, "F": 96, "V": 128, "N": 8, "H": 8, "B": 8, "T": 8, "S": 16}, T5_EXPERT),
    Case("Mixtral", mixtral,
         {"L": 32, "D": 4096, "F": 14336, "V": 32000, "N": 32, "K": 8, "H": 128, "E": 8, "B": 16, "T": 4096},
         {**LLAMA_TINY, "E": 4}, MIXTRAL_EXPERT),
    Case("MLA (DeepSeek)", mla,
         {"L": 60, "D": 5120, "F": 12288, "V": 102400, "N": 128, "H": 128, "R": 64, "Q": 1536, "C": 512, "B": 32,
          "T": 4096},
         {"L": 2, "D": 64, "F": 96, "V": 128, "N": 8, "H": 8, "R": 4, "Q": 24, "C": 16, "B": 8, "T": 16}, MLA_EXPERT),
    Case("Mamba", mamba, {"L": 64, "D": 2560, "I": 5120, "S": 16, "R": 160, "V": 50304, "B": 32, "T": 2048},
         {"L": 2, "D": 64, "I": 128, "S": 4, "R": 4, "V": 128, "B": 8, "T": 16}, MAMBA_EXPERT),
    Case("RWKV", rwkv, {"L": 32, "D": 4096, "F": 14336, "V": 65536, "B": 32, "T": 2048},
         {"L": 2, "D": 64, "F": 96, "V": 128, "B": 8, "T": 16}, RWKV_EXPERT),
]  # fmt: skip
