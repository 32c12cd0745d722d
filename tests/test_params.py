"""ParamSpecs, initial values and the published sizes of the presets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.config import ModelConfig
from jaxscale.mesh import make_abstract_mesh, make_mesh
from jaxscale.models import decoder, presets
from jaxscale.params import ParamSpec, abstract_params, constant, init_params, normal, num_params, param_shardings
from jaxscale.sharding import explain
from sharding_rules.rules import MEGATRON_FSDP

# Parameters as published: the safetensors index of each repository, tied heads counted once; the text model of Gemma 3.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "qwen2-7b": 7_615_616_512,
    "qwen3-0-6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "smollm2-135m": 134_515_008,
    "smollm2-1-7b": 1_711_376_384,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_419_200,  # without the layer that predicts a second token
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}


def test_every_published_preset_is_checked():
    assert set(presets.PRESETS) == {*PUBLISHED, "tiny"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_number_of_parameters(name):
    cfg = presets.preset(name)
    assert cfg.name == name
    assert num_params(decoder.param_specs(cfg)) == PUBLISHED[name]


def test_a_preset_by_any_spelling_or_the_nearest_names():
    assert presets.preset("Qwen3-0.6B") == presets.preset("qwen3_0_6b") == presets.qwen3_0_6b()
    with pytest.raises(ValueError, match="llama3-8b"):
        presets.preset("llama-3-8b")


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("num_devices", [1, 6, 8, 64, 384, 1024])
def test_preset_mesh_uses_every_device_and_divides_the_model(name, num_devices):
    cfg = presets.preset(name)
    mesh = presets.preset_mesh(cfg, num_devices)
    assert mesh.fill(num_devices) == mesh
    assert cfg.num_kv_heads % mesh.tp == cfg.mlp_dim % mesh.tp == cfg.embed_dim % mesh.fsdp == 0
    assert mesh.tp <= 8


SPECS = {
    "a": {"w": ParamSpec((6, 16, 10), ("layers", "embed", "mlp"), normal(0.5))},
    "b": ParamSpec((16,), ("embed",), constant(2.5)),
    "c": ParamSpec((12, 16), ("vocab", "embed"), normal(1.0), "bfloat16"),
}


def test_initial_values_have_the_same_bits_on_every_mesh():
    key = jax.random.key(7)
    expected = jax.device_get(init_params(key, SPECS))
    assert expected["c"].dtype == jnp.bfloat16
    for sizes in ({"fsdp": 8}, {"fsdp": 2, "tp": 2, "cp": 2}):
        mesh = make_mesh(**sizes)
        params = init_params(key, SPECS, mesh, MEGATRON_FSDP)
        got, shardings = jax.tree.leaves(params), jax.tree.leaves(param_shardings(SPECS, mesh, MEGATRON_FSDP))
        for x, want, where in zip(got, jax.tree.leaves(expected), shardings, strict=True):
            assert x.sharding.is_equivalent_to(where, x.ndim)
            np.testing.assert_array_equal(np.asarray(x), want)


def test_initial_values_follow_the_path_alone():
    """Another parameter beside it changes nothing; another path or key changes everything."""
    key = jax.random.key(7)
    w = normal(1.0)
    one = init_params(key, {"x": ParamSpec((64,), (None,), w)})["x"]
    two = init_params(key, {"a": ParamSpec((3,), (None,), w), "x": ParamSpec((64,), (None,), w)})["x"]
    other = init_params(key, {"y": ParamSpec((64,), (None,), w)})["y"]
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, init_params(jax.random.key(8), {"x": ParamSpec((64,), (None,), w)})["x"])


def test_normal_is_normal():
    x = np.asarray(init_params(jax.random.key(0), {"w": ParamSpec((400, 500), (None, None), normal(0.02))})["w"])
    assert abs(x.mean()) < 4 * 0.02 / x.size**0.5
    assert abs(x.std() / 0.02 - 1) < 0.01
    inside = (np.abs(x) < 0.02).mean()
    assert abs(inside - 0.6827) < 0.005


def test_abstract_params_are_the_parameters_without_memory():
    mesh = make_abstract_mesh(fsdp=512, tp=2)
    cfg = ModelConfig(vocab_size=64, num_layers=2, embed_dim=1024, mlp_dim=64, num_heads=2, num_kv_heads=2, head_dim=8)
    abstract = abstract_params(decoder.param_specs(cfg), mesh, MEGATRON_FSDP)
    assert abstract["layers"]["mlp"]["w_up"].sharding.shard_shape((2, 1024, 64)) == (2, 2, 32)
    with pytest.raises(ValueError, match="needs rules"):
        abstract_params(SPECS, mesh)


def test_a_spec_names_every_dim():
    with pytest.raises(ValueError, match="differ in length"):
        ParamSpec((2, 3), ("embed",), normal(1.0))


def test_what_has_no_logical_axes_is_refused_with_what_takes_it():
    """Parameters of a function that is not the library's, given where specs are wanted."""
    mesh = make_mesh(fsdp=8)
    for ask in (lambda p: explain(p, mesh), lambda p: init_params(jax.random.key(0), p, mesh, MEGATRON_FSDP)):
        with pytest.raises(ValueError, match=r"holds a ArrayImpl, which has no logical axes; jaxscale.fsdp_shardings"):
            ask({"w": jnp.ones((8, 8))})
    with pytest.raises(ValueError, match=r"mesh data: the axes are pp dp fsdp ep cp tp, as in make_mesh\(fsdp=4, tp=2"):
        make_mesh(data=8)
