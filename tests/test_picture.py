"""Pictures of shardings say what JAX says about where the parts of an array are."""

import itertools
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale import make_abstract_mesh, make_mesh
from jaxscale.picture import show

SIZES = ({"fsdp": 8}, {"fsdp": 4, "tp": 2}, {"dp": 2, "fsdp": 2, "tp": 2})
ENTRIES = (None, "fsdp", "tp", ("fsdp", "tp"), ("tp", "dp"))


def specs(num_dims):
    for entries in itertools.product(ENTRIES, repeat=num_dims):
        axes = [a for e in entries if e for a in ((e,) if isinstance(e, str) else e)]
        if len(axes) == len(set(axes)):
            yield P(*entries)


@pytest.mark.parametrize("sizes", SIZES)
def test_parts_are_where_jax_puts_them(sizes):
    mesh, shape = make_mesh(**sizes), (16, 32, 8)
    for spec in specs(3):
        want = {}
        for device, index in NamedSharding(mesh, spec).devices_indices_map(shape).items():
            want.setdefault(tuple(s.indices(n)[0] for s, n in zip(index, shape)), set()).add(device.id)
        picture = show(mesh, spec, shape)
        got = {
            tuple(i * n // p for i, n, p in zip(at, shape, picture.parts)): set(ids) for at, ids in picture.held.items()
        }
        assert got == want, spec


def test_drawing(rng):
    mesh = make_mesh(fsdp=4, tp=2)
    x = jax.device_put(jnp.zeros((3, 8, 6)), NamedSharding(mesh, P(None, "fsdp", "tp")))
    picture = show(mesh, x, names=("layers", "<embed>", "mlp"))
    svg = ET.fromstring(picture.svg())
    texts = [t.text for t in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}rect"))) == 8
    assert texts[:2] == ["mlp = 6, over tp=2", "<embed> = 8, over fsdp=4"]
    assert texts[2:] == [str(d) for d in range(8)]
    assert "part 0, 3, 1: devices 7" in str(picture)
    ET.fromstring(picture._repr_html_())


def test_replicas_and_few_dims():
    mesh = make_mesh(dp=8)
    assert show(mesh, P(), ()).held == {(): list(range(8))}
    for shape in ((), (4,), (4, 4)):
        svg = show(mesh, P(), shape).svg()
        assert svg.count("<rect") == 1 and ">0-7</text>" in svg
    assert show(make_mesh(fsdp=2, tp=4), P("tp"), (8,)).svg().count("<rect") == 4


def test_mesh_without_devices():
    picture = show(make_abstract_mesh(fsdp=128, tp=8), P("fsdp", "tp"), (4096, 14336))
    assert picture.parts == (128, 8) and picture.held[127, 7] == [1023]
    assert sorted(np.ravel(list(picture.held.values()))) == list(range(1024))


@pytest.mark.parametrize(
    ("what", "shape", "message"),
    [
        (P("fsdp"), None, "pass the shape"),
        (P("fsdp"), (6,), "a dim of 6 is not divisible by fsdp=4"),
        (P("fsdp", "tp"), (8,), "2 entries for an array of 1 dims"),
        (jnp.zeros(8), None, "not on mesh fsdp=4, tp=2"),
    ],
)
def test_errors(what, shape, message):
    with pytest.raises(ValueError, match=message):
        show(make_mesh(fsdp=4, tp=2), what, shape)


def test_array_of_another_mesh():
    x = jax.device_put(jnp.zeros(8), NamedSharding(make_mesh(fsdp=8), P("fsdp")))
    with pytest.raises(ValueError, match="lies on mesh fsdp=8, not on fsdp=4, tp=2"):
        show(make_mesh(fsdp=4, tp=2), x)
