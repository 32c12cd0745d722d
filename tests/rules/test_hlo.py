"""The parser of compiled programs: real programs of known collectives, and text forms that CPU does not print."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding_rules.hlo import SELDOM, census, collectives, wire_bytes


def _mesh(shape, names):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def _shard_mapped(mesh, body, spec, shape):
    fn = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    return collectives(fn.lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().as_text())


def test_every_kind_with_its_bytes_and_axes():
    mesh = _mesh((2, 4), ("d", "t"))

    def body(x):  # [16, 16] float32 on each device: 1024 bytes
        x = jax.lax.all_to_all(x, "t", 0, 1, tiled=True).reshape(16, 16)
        x = jax.lax.ppermute(x, "t", [(i, (i + 1) % 4) for i in range(4)])
        y = jax.lax.psum_scatter(x, "t", scatter_dimension=0, tiled=True)
        z = jax.lax.all_gather(jnp.sin(y), "d", axis=0, tiled=True)
        return x + jax.lax.psum(jnp.tile(z, (2, 1)), ("d", "t"))

    found = {c.kind: c for c in _shard_mapped(mesh, body, P("d", "t"), (32, 64))}
    assert set(found) == {"all-to-all", "collective-permute", "reduce-scatter", "all-gather", "all-reduce"}
    sizes = {k: (c.operand_bytes, c.result_bytes, c.bytes, c.group_size) for k, c in found.items()}
    assert sizes == {
        "all-to-all": (1024, 1024, 1024, 4),
        "collective-permute": (1024, 1024, 1024, 2),
        "reduce-scatter": (1024, 256, 1024, 4),
        "all-gather": (256, 512, 512, 2),
        "all-reduce": (1024, 1024, 1024, 8),
    }
    shape = {"d": 2, "t": 4}
    assert {k: c.axes(shape) for k, c in found.items()} == {
        "all-to-all": ("t",),
        "collective-permute": ("t",),
        "reduce-scatter": ("t",),
        "all-gather": ("d",),
        "all-reduce": ("d", "t"),
    }
    assert found["collective-permute"].groups[0] == (0, 1)
    assert found["reduce-scatter"].wire_bytes == 768
    assert found["all-reduce"].wire_bytes == 1792


@pytest.mark.parametrize("outer", [1, 3])
def test_loops_multiply(outer, rng):
    mesh = _mesh((8,), ("t",))
    inner = int(rng.integers(2, 9))

    def body(x):
        def step(c, _):
            return jax.lax.psum(jnp.sin(c), "t"), None

        def block(c, _):
            return jax.lax.scan(step, jax.lax.psum(c * c, "t"), None, length=inner)[0], None

        return jax.lax.scan(block, x, None, length=outer)[0]

    found = _shard_mapped(mesh, body, P(), (4, 4))
    assert census(found) == {"all-reduce": outer * inner + outer}
    assert all(c.trips_known for c in found)


def test_an_unknown_trip_count_is_said():
    mesh = _mesh((8,), ("t",))

    def body(x):
        return jax.lax.while_loop(lambda s: s.sum() > 1.0, lambda s: jax.lax.psum(s, "t") * 0.1, x)

    (found,) = _shard_mapped(mesh, body, P(), (4,))
    assert found.count == 1
    assert not found.trips_known


def test_a_loop_that_seldom_runs_does_not_count():
    mesh = _mesh((8,), ("t",))

    def later(x, turns):
        return jax.lax.while_loop(lambda c: c[1] < turns, lambda c: (jax.lax.psum(c[0], "t"), c[1] + 1), (x, 0))[0]

    def body(x):
        turns = x.astype(jnp.int32)[0]
        with jax.named_scope(SELDOM):
            y = later(x, turns)
        return jax.lax.ppermute(y, "t", [(0, 1)]) + later(x + 1, turns)

    found = _shard_mapped(mesh, body, P("t"), (32,))
    assert sorted((c.kind, c.trips_known) for c in found) == [("all-reduce", False), ("collective-permute", True)]


def test_a_scanned_partitioned_program():
    """Two all-gathers forward and backward per layer, as the partitioner writes them (iota and mesh groups)."""
    mesh = _mesh((2, 4), ("d", "t"))
    layers, D, F, B = 5, 64, 128, 16

    def loss(w1, w2, x):
        def step(x, w):
            return x + jax.nn.relu(x @ w[0]) @ w[1], None

        return (jax.lax.scan(step, x, (w1, w2))[0] ** 2).sum()

    def arg(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    args = arg((layers, D, F), None, "d", "t"), arg((layers, F, D), None, "t", "d"), arg((B, D), "d")
    found = collectives(jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*args).compile().as_text())
    shape = {"d": 2, "t": 4}
    gathers = [c for c in found if c.kind == "all-gather"]
    assert {c.axes(shape) for c in gathers} == {("d",)}
    assert {c.bytes for c in gathers} == {D * F // 4 * 4}
    activations = [c for c in found if c.kind == "all-reduce" and c.axes(shape) == ("t",)]
    assert {c.bytes for c in activations} == {B // 2 * D * 4}
    assert sum(c.count for c in activations) in (2 * layers - 1, 2 * layers)


def _module(instruction: str, extra: str = "", header: str = "num_partitions=8") -> str:
    main = f"%p = f32[16,4]{{1,0:T(8,128)}} parameter(0)\n  {instruction}"
    return f"HloModule m, {header}\n\n{extra}\nENTRY %main (p: f32[16,4]) -> f32[16,4] {{\n  {main}\n}}\n"


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("{}", (tuple(range(8)),)),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[2,4]<=[4,2]T(1,0)", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", ((0, 2), (1, 3))),
        ("mesh[] {}", ((0,),)),
    ],
)
def test_replica_groups(text, groups):
    (found,) = collectives(_module(f"ROOT %r = f32[16,4] all-reduce(%p), replica_groups={text}, to_apply=%add"))
    assert found.groups == groups


def test_iota_groups_against_numpy(rng):
    sizes = rng.integers(1, 5, size=3)
    for permutation in itertools.permutations(range(3)):
        want = np.arange(sizes.prod()).reshape(sizes).transpose(permutation).reshape(-1, sizes[permutation[2]])
        text = f"[{want.shape[0]},{want.shape[1]}]<=[{','.join(map(str, sizes))}]T({','.join(map(str, permutation))})"
        (found,) = collectives(_module(f"ROOT %r = f32[16,4] all-reduce(%p), replica_groups={text}, to_apply=%add"))
        np.testing.assert_array_equal(np.array(found.groups), want)


@pytest.mark.parametrize(
    ("lines", "kind", "operand", "result"),
    [
        (
            "%s = (f32[16,4], f32[32,4]) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}\n"
            "  ROOT %d = f32[32,4] all-gather-done(%s)",
            "all-gather",
            256,
            512,
        ),
        (
            "%s = f32[16,4] all-reduce-start(%p), replica_groups=[4,2]<=[8]\n  ROOT %d = f32[16,4] all-reduce-done(%s)",
            "all-reduce",
            256,
            256,
        ),
        (
            "%s = (f32[16,4], f32[16,4], u32[], u32[]) collective-permute-start(f32[16,4]{1,0} %p), "
            "source_target_pairs={{0,1},{1,0}}\n  ROOT %d = f32[16,4] collective-permute-done(%s)",
            "collective-permute",
            256,
            256,
        ),
        (
            "%s = ((f32[16,4]), f32[4,4], u32[]) async-start(%p), calls=%wrapped\n"
            "  ROOT %d = f32[4,4] async-done(%s), calls=%wrapped",
            "reduce-scatter",
            256,
            64,
        ),
        ("ROOT %f = f32[4,4] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3", "reduce-scatter", 256, 64),
    ],
)
def test_asynchronous_pairs_and_wrappers_count_once(lines, kind, operand, result):
    inner = "%q = f32[16,4] parameter(0)\n  ROOT %{0} {1}\n}}\n"
    extra = "%wrapped (q: f32[16,4]) -> f32[4,4] {\n  " + inner.format(
        "r", "= f32[4,4] reduce-scatter(%q), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add"
    )
    extra += "%all-reduce-scatter.3 (q: f32[16,4]) -> f32[4,4] {\n  " + inner.format(
        "a", "= f32[16,4] all-reduce(%q), replica_groups=[2,4]<=[8], to_apply=%add"
    )
    (found,) = collectives(_module(lines, extra))
    assert (found.kind, found.operand_bytes, found.result_bytes, found.count) == (kind, operand, result, 1)


def test_a_conditional_counts_its_dearer_branch():
    branch = "%{0} (q: f32[16,4]) -> f32[16,4] {{\n  %q = f32[16,4] parameter(0)\n  ROOT %r = f32[16,4] {1}\n}}\n"
    extra = branch.format("a", "all-reduce(%q), replica_groups=[1,8]<=[8]") + branch.format("b", "negate(%q)")
    line = "ROOT %c = f32[16,4] conditional(%p, %p, %p), branch_computations={%b, %a}"
    assert census(collectives(_module(line, extra))) == {"all-reduce": 1}


def test_conditionals_of_one_line_take_the_same_branch():
    """One branch sends on the way forward, the other more on the way back: no run does both."""

    @jax.custom_vjp
    def later(x):
        return x * 1.0

    later.defvjp(lambda x: (later(x), None), lambda _, g: (jax.lax.all_gather(g, "d").sum(0),))

    def body(x):
        even = jax.lax.pmax(x.sum(), "d") > 0

        def loss(x):
            now = lambda x: x * jax.lax.psum(jax.lax.stop_gradient(x), "d")
            return jnp.sin(jax.lax.cond(even, now, later, jnp.cos(x))).sum()

        return jax.grad(loss)(x)

    found = _shard_mapped(_mesh((8,), ("d",)), body, P("d"), (128, 64))
    assert census([c for c in found if c.operand_bytes > 4]) == {"all-gather": 1}


def test_condition_gives_the_trips_when_the_compiler_does_not():
    extra = (
        "%cond (s: (s32[], f32[16,4])) -> pred[] {\n  %s = (s32[], f32[16,4]) parameter(0)\n"
        "  %i = s32[] get-tuple-element(%s), index=0\n  %n = s32[] constant(7)\n"
        "  ROOT %lt = pred[] compare(%i, %n), direction=LT\n}\n"
        "%body (s: (s32[], f32[16,4])) -> (s32[], f32[16,4]) {\n  %s = (s32[], f32[16,4]) parameter(0)\n"
        "  %x = f32[16,4] get-tuple-element(%s), index=1\n  %r = f32[16,4] all-reduce(%x), replica_groups={}\n}\n"
    )
    line = "%w = (s32[], /*index=1*/f32[16,4]) while(%p), condition=%cond, body=%body"
    assert census(collectives(_module(line, extra))) == {"all-reduce": 7}


@pytest.mark.parametrize(("stride", "trips"), [(1, 15), (2, 8), (4, 4)])
def test_a_loop_may_take_several_steps_at_once(stride, trips):
    """As the partitioner writes a matmul whose operand travels around: unsigned, and unrolled."""
    state = "(f32[16,4], u32[], /*index=2*/u32[])"
    extra = (
        f"%cond (s: {state}) -> pred[] {{\n  %n = u32[] constant(15)\n  %s = {state} parameter(0)\n"
        "  %i = u32[] get-tuple-element(%s), index=1\n  ROOT %lt = pred[] compare(%i, %n), direction=LT\n}\n"
        f"%body (s: {state}) -> {state} {{\n  %s = {state} parameter(0)\n  %one = u32[] constant({stride})\n"
        "  %i = u32[] get-tuple-element(%s), index=1\n  %x = f32[16,4] get-tuple-element(%s), index=0\n"
        "  %k = u32[] get-tuple-element(%s), index=2\n  %r = f32[16,4] all-reduce(%x), replica_groups={}\n"
        f"  %next = u32[] add(%i, %one)\n  ROOT %t = {state} tuple(%r, %next, /*index=2*/%k)\n}}\n"
    )
    line = f"%w = {state} while(%p), condition=%cond, body=%body"
    (found,) = collectives(_module(line, extra))
    assert (found.count, found.trips_known) == (trips, True)


def test_element_types():
    for dtype, size in [("bf16", 32), ("pred", 16), ("s4", 8), ("f8e4m3fn", 16), ("c64", 128)]:
        line = f"%x = {dtype}[16] negate(%p)\n  ROOT %r = {dtype}[16] all-reduce(%x), replica_groups={{}}"
        (found,) = collectives(_module(line))
        assert found.bytes == size, dtype


def test_text_that_is_not_a_module():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        collectives("module @jit_f { }")


def test_wire_bytes_of_a_group_of_one():
    assert wire_bytes("all-reduce", 100, 1) == 0


def test_kernels_that_say_what_they_move():
    """As a TPU's compiler prints them, in a loop; other kernels, and one in a loop that seldom runs, do not count."""
    says = 'frontend_attributes={kernel_metadata={\n"bytes":"4096",\n"collective":"ragged-all-to-all",\n%s\n}}'
    says %= '"replica_groups":"[[0, 1], [2, 3]]"'
    kernel = 'f32[8,1,128]{2,1,0:T(1,128)} custom-call(%x), custom_call_target="tpu_custom_call"'
    text = f"""HloModule m, num_partitions=4

%body (p: (s32[], f32[8,1,128])) -> (s32[], f32[8,1,128]) {{
  %p = (s32[], f32[8,1,128]{{2,1,0}}) parameter(0)
  %x = f32[8,1,128]{{2,1,0}} get-tuple-element(%p), index=1
  %ragged.1 = {kernel}, {says}, metadata={{op_name="jit(f)/ragged" stack_frame_id=9}}, backend_config={{"a":{{"b":1}}}}
  %ragged.2 = {kernel}, {says}, metadata={{op_name="jit(f)/{SELDOM}/ragged" stack_frame_id=9}}
  %other = {kernel}, frontend_attributes={{kernel_metadata={{\n"mesh_axes":"[]"\n}}}}, metadata={{op_name="o"}}
  ROOT %t = (s32[], f32[8,1,128]{{2,1,0}}) tuple(%n, %ragged.1)
}}

ENTRY %main (a: f32[8,1,128]) -> f32[8,1,128] {{
  %w = (s32[], f32[8,1,128]) while(%t), condition=%c, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
}}
"""
    (found,) = collectives(text)
    assert (found.kind, found.name, found.count, found.bytes) == ("ragged-all-to-all", "ragged.1", 3, 4096)
    assert found.wire_bytes == 3 * 2048 and found.op_name == "jit(f)/ragged"
    assert found.axes({"d": 2, "ep": 2}) == ("ep",)
