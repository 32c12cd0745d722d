"""Vision and two towers: ViT, DiT, ResNet, MLP-Mixer, CLIP."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tests.rules.models.case import Case, arrays, attend, cross_entropy, layer_norm, row, tokens

COL, ROW = P(None, "tp"), P("tp")


def dense(x, p):
    y = x @ p["w"]
    return y + row(p["b"], y)


def linear(i, o):
    return {"w": (i, o), "b": (o,)}


def normed(x, p=None):
    if p is None:
        y = x - x.mean(-1, keepdims=True)
        return y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6)
    return layer_norm(x, p["g"], p["b"])


def mha(x, w, N, causal=False):
    """Fused qkv as timm writes it: [3, N, H] within the last dim."""
    b, t, d = x.shape
    q, k, v = jnp.moveaxis(dense(x, w["qkv"]).reshape(b, t, 3, N, d // N), 2, 0)
    return dense(attend(q, k, v, causal).reshape(b, t, d), w["proj"])


def mlp(x, w):
    return dense(jax.nn.gelu(dense(x, w["fc1"])), w["fc2"])


def block_shapes(D):
    norm = {"g": (D,), "b": (D,)}
    return {
        "norm1": norm, "norm2": norm, "attn": {"qkv": linear(D, 3 * D), "proj": linear(D, D)},
        "mlp": {"fc1": linear(D, 4 * D), "fc2": linear(4 * D, D)},
    }  # fmt: skip


def encoder(x, blocks, N, causal=False):
    for w in blocks:
        x = x + mha(normed(x, w["norm1"]), w["attn"], N, causal)
        x = x + mlp(normed(x, w["norm2"]), w["mlp"])
    return x


def patches(image, size):
    b, h, w, c = image.shape
    x = image.reshape(b, h // size, size, w // size, size, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // size) * (w // size), size * size * c)


BLOCK_EXPERT = [
    ("(qkv|fc1)/w", COL), ("(qkv|fc1)/b", ROW), ("(proj|fc2)/w", ROW),
]  # fmt: skip


def vit(L, D, N, I, S, C, B):
    n = (I // S) ** 2
    shapes = {
        "patch": linear(S * S * 3, D), "cls": (1, 1, D), "pos": (n + 1, D), "blocks": [block_shapes(D)] * L,
        "norm": {"g": (D,), "b": (D,)}, "head": linear(D, C),
    }  # fmt: skip

    def loss(p, image, label):
        x = dense(patches(image, S), p["patch"])
        x = jnp.concatenate([jnp.broadcast_to(p["cls"], (x.shape[0], 1, D)), x], 1) + p["pos"][None]
        x = normed(encoder(x, p["blocks"], N), p["norm"])
        return cross_entropy(dense(x[:, 0], p["head"]), label)

    return loss, arrays(shapes), (jax.ShapeDtypeStruct((B, I, I, 3), jnp.float32), tokens(B))


def dit(L, D, N, I, S, B):
    """Blocks modulated by the time step: adaLN-zero."""
    block = {**block_shapes(D), "adaLN": linear(D, 6 * D)}
    del block["norm1"], block["norm2"]
    shapes = {
        "x_embed": linear(S * S * 4, D), "pos": ((I // S) ** 2, D), "t1": linear(256, D), "t2": linear(D, D),
        "blocks": [block] * L, "final": {"adaLN": linear(D, 2 * D), "linear": linear(D, S * S * 4)},
    }  # fmt: skip

    def modulate(x, shift, scale):
        return normed(x) * (1 + scale[:, None]) + shift[:, None]

    def loss(p, image, time, noise):
        x = dense(patches(image, S), p["x_embed"]) + p["pos"][None]
        angles = time[:, None] * jnp.exp(-jnp.arange(128, dtype=jnp.float32) / 14)[None]
        c = dense(jax.nn.silu(dense(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1), p["t1"])), p["t2"])
        for w in p["blocks"]:
            a, b, g, d, e, h = jnp.split(dense(jax.nn.silu(c), w["adaLN"]), 6, -1)
            x = x + g[:, None] * mha(modulate(x, a, b), w["attn"], N)
            x = x + h[:, None] * mlp(modulate(x, d, e), w["mlp"])
        a, b = jnp.split(dense(jax.nn.silu(c), p["final"]["adaLN"]), 2, -1)
        return jnp.square(dense(modulate(x, a, b), p["final"]["linear"]) - patches(noise, S)).mean()

    image = jax.ShapeDtypeStruct((B, I, I, 4), jnp.float32)
    return loss, arrays(shapes), (image, jax.ShapeDtypeStruct((B,), jnp.float32), image)


def resnet(W, blocks, C, I, B):
    """Bottleneck blocks in four stages; each channel is normed over its image in place of batch norm."""
    shapes = {"stem": (7, 7, 3, W), "stages": [], "head": linear(32 * W, C)}
    width = W
    for s in range(4):
        inner, outer = W * 2**s, 4 * W * 2**s
        stage = []
        for i in range(blocks):
            unit = {"conv1": (1, 1, width, inner), "conv2": (3, 3, inner, inner), "conv3": (1, 1, inner, outer),
                    "n1": (inner,), "n2": (inner,), "n3": (outer,)}  # fmt: skip
            if i == 0:
                unit["down"] = (1, 1, width, outer)
            stage.append(unit)
            width = outer
        shapes["stages"].append(stage)

    def conv(x, w, stride=1):
        return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def norm(x, g):
        y = x - x.mean((1, 2), keepdims=True)
        # A large epsilon: the last stage of the tiny model is one pixel, of which only rounding is left.
        return y * jax.lax.rsqrt((y * y).mean((1, 2), keepdims=True) + 1e-2) * row(g, x)

    def loss(p, image, label):
        x = jax.nn.relu(conv(image, p["stem"], 2))
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        for s, stage in enumerate(p["stages"]):
            for i, w in enumerate(stage):
                stride = 2 if s and not i else 1
                y = jax.nn.relu(norm(conv(x, w["conv1"]), w["n1"]))
                y = jax.nn.relu(norm(conv(y, w["conv2"], stride), w["n2"]))
                y = norm(conv(y, w["conv3"]), w["n3"])
                x = jax.nn.relu(y + (conv(x, w["down"], stride) if "down" in w else x))
        return cross_entropy(dense(x.mean((1, 2)), p["head"]), label)

    return loss, arrays(shapes), (jax.ShapeDtypeStruct((B, I, I, 3), jnp.float32), tokens(B))


RESNET_EXPERT = [("conv1", P(None, None, None, "tp")), ("conv2", P(None, None, "tp")), ("n1", P("tp"))]


def mixer(L, D, F, G, I, S, C, B):
    n = (I // S) ** 2
    block = {
        "norm1": {"g": (D,), "b": (D,)}, "norm2": {"g": (D,), "b": (D,)},
        "tokens": {"fc1": linear(n, G), "fc2": linear(G, n)}, "channels": {"fc1": linear(D, F), "fc2": linear(F, D)},
    }  # fmt: skip
    shapes = {"stem": linear(S * S * 3, D), "blocks": [block] * L, "norm": {"g": (D,), "b": (D,)}, "head": linear(D, C)}

    def loss(p, image, label):
        x = dense(patches(image, S), p["stem"])
        for w in p["blocks"]:
            x = x + mlp(normed(x, w["norm1"]).swapaxes(1, 2), w["tokens"]).swapaxes(1, 2)
            x = x + mlp(normed(x, w["norm2"]), w["channels"])
        return cross_entropy(dense(normed(x, p["norm"]).mean(1), p["head"]), label)

    return loss, arrays(shapes), (jax.ShapeDtypeStruct((B, I, I, 3), jnp.float32), tokens(B))


def clip(L, DI, NI, DT, NT, E, I, S, V, T, B):
    n = (I // S) ** 2
    shapes = {
        "image": {"patch": linear(S * S * 3, DI), "pos": (n, DI), "blocks": [block_shapes(DI)] * L, "out": (DI, E)},
        "text": {"embed": (V, DT), "pos": (T, DT), "blocks": [block_shapes(DT)] * L, "out": (DT, E)},
        "scale": (),
    }

    def loss(p, image, tok):
        i, t = p["image"], p["text"]
        x = encoder(dense(patches(image, S), i["patch"]) + i["pos"][None], i["blocks"], NI)
        y = encoder(t["embed"][tok] + t["pos"][None], t["blocks"], NT, causal=True)
        x, y = x.mean(1) @ i["out"], y[:, -1] @ t["out"]
        x, y = (a * jax.lax.rsqrt((a * a).sum(-1, keepdims=True) + 1e-6) for a in (x, y))
        logits = x @ y.T * jnp.exp(p["scale"])
        same = jnp.arange(logits.shape[0])
        return cross_entropy(logits, same) + cross_entropy(logits.T, same)

    return loss, arrays(shapes), (jax.ShapeDtypeStruct((B, I, I, 3), jnp.float32), tokens(B, T))


CASES = [
    Case("ViT", vit, {"L": 32, "D": 1280, "N": 16, "I": 224, "S": 14, "C": 1000, "B": 256},
         {"L": 2, "D": 64, "N": 8, "I": 16, "S": 4, "C": 12, "B": 8},
         [*BLOCK_EXPERT, ("head/w", COL), ("head/b", ROW)]),
    Case("DiT", dit, {"L": 28, "D": 1152, "N": 16, "I": 32, "S": 2, "B": 256},
         {"L": 2, "D": 64, "N": 8, "I": 8, "S": 2, "B": 8}, BLOCK_EXPERT),
    Case("ResNet", resnet, {"W": 128, "blocks": 3, "C": 1000, "I": 224, "B": 256},
         {"W": 8, "blocks": 2, "C": 12, "I": 32, "B": 8}, RESNET_EXPERT),
    Case("MLP-Mixer", mixer, {"L": 32, "D": 1280, "F": 5120, "G": 640, "I": 224, "S": 14, "C": 1000, "B": 256},
         {"L": 2, "D": 64, "F": 96, "G": 32, "I": 16, "S": 4, "C": 12, "B": 8},
         [("fc1/w", COL), ("fc1/b", ROW), ("fc2/w", ROW)]),
    Case("CLIP (two towers)", clip,
         {"L": 24, "DI": 1024, "NI": 16, "DT": 768, "NT": 8, "E": 768, "I": 224, "S": 14, "V": 49408, "T": 77,
          "B": 512},
         {"L": 2, "DI": 64, "NI": 8, "DT": 32, "NT": 4, "E": 32, "I": 16, "S": 4, "V": 64, "T": 8, "B": 8},
         [*BLOCK_EXPERT, ("text/embed", ROW)]),
]  # fmt: skip
