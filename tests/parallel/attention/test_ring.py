import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import orders
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_eff import models
from jaxrl_eff.models import attention
from jaxrl_eff.parallel.attention import blockwise, kernels, ring
from jaxrl_eff.parallel.attention.context import Mask
from jaxrl_eff.parallel.attention.on_mesh import on_mesh

ROWS, LENGTH, DIM, SCALE = 3, 32, 4, 0.4
EVERYTHING = 10**6  # a window
WAYS = {"ring": ring.ring, "gathered": ring.gathered, "ulysses": ring.ulysses}
ORDERS = (orders.striped, orders.zigzag, orders.contiguous)
TOLERANCE = {"float64": 1e-10, "float32": 2e-5}


def line(parts):
    return Mesh(np.array(jax.devices()[:parts]), ("seq",))


def dense(q, k, v, mask, *, scale, softcap):
    """Attention in the dtype of its operands, as one formula on whole matrices."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    score = scale * jnp.einsum("btnh,bsnh->bnts", q, k)
    score = softcap * jnp.tanh(score / softcap) if softcap else score
    seen = mask.seen()[:, None]
    weight = jnp.where(seen, jnp.exp(score - score.max(axis=-1, keepdims=True)), 0)
    total = weight.sum(axis=-1, keepdims=True)
    return jnp.einsum("bnts,bsnh->btnh", weight / jnp.where(total > 0, total, 1), v)


@functools.cache
def value_and_gradients(attend, softcap):
    """(q, k, v, dout, position, segment, window) -> out, dq, dk, dv, compiled."""

    @jax.jit
    def run(q, k, v, dout, position, segment, window):
        def apply(q, k, v):
            mask = Mask(position, segment, position, segment, window)
            return attend(q, k, v, mask, scale=SCALE, softcap=softcap)

        out, pull = jax.vjp(apply, q, k, v)
        return out, *pull(dout)

    return run


def packed(rng, rows=ROWS, length=LENGTH):
    """Positions and segments of documents of random lengths, some padding, and one empty row."""
    position, segment = np.zeros((2, rows, length), np.int32)
    for row in range(rows - 1):
        start, document = 0, 0
        while start < length - 2:
            size = min(int(rng.integers(1, length)), length - start)
            document += 1
            position[row, start : start + size] = np.arange(size)
            segment[row, start : start + size] = document if rng.random() < 0.9 else 0
            start += size
    return position, segment


def numbers(rng, heads, kv_heads, dtype, rows=ROWS, length=LENGTH):
    sizes = (heads, kv_heads, kv_heads, heads)
    return [rng.normal(size=(rows, length, n, DIM)).astype(dtype) for n in sizes]


def check(way, parts, dtype, kv_heads, softcap, seed=0):
    """That attention on `parts` devices is that on one, for packings, windows and orders."""
    rng = np.random.default_rng(seed)
    heads = max(4, parts) if way == "ulysses" else 4
    slow = attention.plain if dtype == "float32" else dense
    wide = jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()
    fast = on_mesh(WAYS[way](kernel=kernels.xla(3)), line(parts))
    with wide:
        for case, window in enumerate((EVERYTHING, 1, 5)):
            position, segment = packed(rng)
            if case == 2:  # one document that fills the row
                position[0], segment[0] = np.arange(LENGTH), 1
            arrays = *numbers(rng, heads, kv_heads, dtype), position, segment
            window = np.int32(window)
            want = value_and_gradients(slow, softcap)(*arrays, window)
            for layout in ORDERS:
                to = layout(LENGTH, parts)
                placed = [to.place(x) for x in arrays]
                got = value_and_gradients(fast, softcap)(*placed, window)
                for x, y in zip(want, got, strict=True):
                    assert y.dtype == dtype
                    np.testing.assert_allclose(
                        x, to.restore(np.asarray(y)), rtol=0, atol=TOLERANCE[dtype]
                    )
                assert (to.restore(np.asarray(got[0]))[segment == 0] == 0).all()


@pytest.mark.parametrize(
    "way, parts, dtype, kv_heads, softcap",
    [
        ("ring", 8, "float64", 2, 0.7),
        ("ring", 1, "float32", 2, 0.7),
        ("ring", 2, "float32", 1, None),
        ("gathered", 4, "float64", 1, None),
        ("ulysses", 4, "float64", 2, 0.7),
    ],
)
def test_attention_on_many_devices_is_that_on_one(way, parts, dtype, kv_heads, softcap):
    check(way, parts, dtype, kv_heads, softcap)


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("way", WAYS)
def test_every_attention_on_many_devices_is_that_on_one(way, parts, dtype, kv_heads, softcap):
    check(way, parts, dtype, kv_heads, softcap, seed=1)


@pytest.mark.parametrize("parts, reach", [(8, 0), (8, 2), (4, 1), (2, 5)])
def test_tokens_in_order_need_only_the_pieces_that_a_window_reaches(parts, reach):
    """On pieces of 32/P tokens a window of n pieces and one token reaches n pieces back."""
    rng, window = np.random.default_rng(9), min(reach * (LENGTH // parts) + 1, LENGTH)
    position, segment = packed(rng)
    position[0], segment[0] = np.arange(LENGTH), 1
    arrays = *numbers(rng, 4, 2, np.float32), position, segment, np.int32(window)
    fast = on_mesh(ring.ring(reach=reach), line(parts))
    want = value_and_gradients(attention.plain, None)(*arrays)
    got = value_and_gradients(fast, None)(*arrays)
    for x, y in zip(want, got, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)
    forward, both = (program(ring.ring(reach=reach), line(parts), gradient=g) for g in (0, 1))
    sends = min(reach, parts - 1)
    assert count(forward, "ppermute") == sends
    assert count(both, "ppermute") - sends == (2 * sends + 1 if sends else 0)
    with pytest.raises(ValueError, match="reach is -1"):
        ring.ring(reach=-1)


@pytest.mark.parametrize("way", WAYS)
def test_rows_and_heads_are_split_too_and_short_rows_padded(way):
    """Rows over two axes, of which they fill one; a key head for two devices; 3 tokens on 2."""
    rng = np.random.default_rng(2)
    grid = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "seq", "tensor"))
    fast = on_mesh(WAYS[way](), grid)
    for rows in (2, 3):
        position, segment = packed(rng, rows, length=3)
        arrays = *numbers(rng, 4, 1, np.float32, rows, length=3), position, segment, None
        want = value_and_gradients(attention.plain, None)(*arrays)
        got = value_and_gradients(fast, None)(*arrays)
        for x, y in zip(want, got, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)


def test_a_row_may_be_shorter_than_the_ring():
    rng = np.random.default_rng(3)
    segment = np.array([[1, 1, 2]], np.int32)
    position = np.array([[0, 1, 0]], np.int32)
    arrays = *numbers(rng, 4, 2, np.float32, 1, length=3), position, segment, None
    want = value_and_gradients(attention.plain, None)(*arrays)
    got = value_and_gradients(on_mesh(ring.ring(), line(8)), None)(*arrays)
    for x, y in zip(want, got, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)


def test_a_model_on_a_mesh_is_the_model(key):
    """Whose windows are traced and whose layers are recomputed; rows laid out in stripes."""
    cfg = models.LMConfig(
        vocab=11, layers=2, width=8, heads=4, kv_heads=2, head_dim=4, ffn=8, init_std=0.3,
        attn_softcap=5.0, window=3, windowed=(True, False), remat="full",
    )  # fmt: skip
    params = models.init(cfg, key)
    rng = np.random.default_rng(7)
    position, segment = packed(rng)
    tokens = rng.integers(0, 11, position.shape, np.int32)
    weight = rng.normal(size=(*position.shape, 8)).astype(np.float32) * (segment > 0)[..., None]
    rows = weight, tokens, position, segment
    grid = Mesh(np.array(jax.devices()[:4]).reshape(1, 2, 2), ("data", "seq", "tensor"))

    @functools.partial(jax.jit, static_argnums=0)
    def run(attend, params, weight, *rows):
        def loss(params):
            hidden, _ = models.apply(cfg, params, *rows, attend=attend)
            return (hidden * weight).sum()

        return jax.value_and_grad(loss)(params)

    expected = run(attention.plain, params, *rows)
    striped = [orders.striped(LENGTH, 2).place(x) for x in rows]
    with jax.set_mesh(grid):
        got = run(on_mesh(ring.ring(), grid), params, *striped)
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * float(abs(x).max()))


def test_more_keys_than_queries_and_an_unchecked_shard_map():
    rng = np.random.default_rng(4)
    _, k, v, _ = numbers(rng, 4, 2, np.float32)
    q = numbers(rng, 4, 2, np.float32, length=8)[0]
    position, segment = packed(rng)
    position[0], segment[0] = np.arange(LENGTH), 1
    mask = Mask(position[:, -8:], segment[:, -8:], position, segment)
    pieces = PartitionSpec(None, "seq")

    def local(q, k, v, mask):
        return ring.ring("seq")(q, k, v, mask._replace(window=6), scale=SCALE)

    mapped = jax.shard_map(
        local, mesh=line(4), in_specs=pieces, out_specs=pieces, check_vma=False
    )  # fmt: skip
    got = jax.jit(mapped)(q, k, v, mask)
    *arrays, mask = jax.tree.map(jnp.asarray, (q, k, v, mask))
    want = attention.plain(*arrays, mask._replace(window=6), scale=SCALE)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_half_precision_errs_no_more_than_on_one_device():
    rng = np.random.default_rng(5)
    position, segment = packed(rng)
    arrays = [x.astype(jnp.bfloat16) for x in numbers(rng, 4, 2, np.float32)]
    rest = position, segment, None
    exact = value_and_gradients(attention.plain, None)(*(x.astype("f4") for x in arrays), *rest)
    fast = on_mesh(ring.ring(kernel=kernels.xla(3)), line(4))
    errors = []
    for attend in (attention.plain, fast):
        got = value_and_gradients(attend, None)(*arrays, *rest)
        assert all(x.dtype == jnp.bfloat16 for x in got)
        errors.append(
            [float(abs(x.astype("f4") - y).max()) for x, y in zip(got, exact, strict=True)]
        )
    one, many = np.array(errors)
    assert (many <= 2 * one).all(), errors


def test_keys_that_nobody_sees_are_not_computed_with():
    """What is in them does not matter: a product with a weight of 0 would keep what is not finite.

    A document of two chunks, another of six; a window of one chunk.
    """
    chunk = LENGTH // 8
    position = np.concatenate([np.arange(2 * chunk), np.arange(6 * chunk)])[None].astype(np.int32)
    segment = np.repeat([1, 2], [2 * chunk, 6 * chunk])[None].astype(np.int32)
    q, k, v, dout = numbers(np.random.default_rng(6), 4, 2, np.float32, rows=1)
    for parts in (1, 4):
        run = value_and_gradients(on_mesh(ring.ring(kernel=kernels.xla(chunk)), line(parts)), None)
        for bad in range(8):
            spoilt = slice(bad * chunk, (bad + 1) * chunk)
            k2, v2 = k.copy(), v.copy()
            k2[:, spoilt] = v2[:, spoilt] = np.nan
            out, dq, _, _ = run(q, k2, v2, dout, position, segment, np.int32(chunk))
            # Chunks of queries that see the spoilt one: itself and that after it in its document.
            hit = {bad, bad + 1} if bad not in (1, 7) else {bad}
            for x in (out, dq):
                broken = np.isnan(np.asarray(x)).reshape(8, -1).any(axis=1)
                assert set(np.flatnonzero(broken)) == hit


@pytest.mark.parametrize("gap", [0.0, 3.0, 1e4, -1e4, 1e30])
def test_partial_results_merge_whatever_lies_between_them(gap):
    lse = jnp.asarray([1.5, -1e4, blockwise.NEG])
    other = jnp.asarray([1.5 + gap, gap, blockwise.NEG])
    a, b = jnp.full((3, 2), 2.0), jnp.full((3, 2), -4.0)
    a, b = a.at[2].set(0), b.at[2].set(0)  # neither has seen a key
    out, total = blockwise.merge(a, lse, b, other)
    share = 1 / (1 + np.exp(np.minimum(np.float64(lse) - np.float64(other), 700)))
    np.testing.assert_allclose(out[:2], ((1 - share)[:, None] * a + share[:, None] * b)[:2], 1e-5)
    np.testing.assert_allclose(total[:2], np.logaddexp(lse, other)[:2], 1e-6)
    assert (out[2] == 0).all() and total[2] == blockwise.NEG
    back, same = blockwise.merge(b, other, a, lse)
    np.testing.assert_array_equal(out, back)
    np.testing.assert_array_equal(total, same)


# Programs


def collectives(jaxpr, times=1):
    """(name, operand, how often) of every collective of a program."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name.removesuffix("_invariant").removesuffix("_p")
        if name in ("ppermute", "all_gather", "all_to_all", "reduce_scatter", "psum"):
            for x in equation.invars:
                yield name, x.aval, times
        inside = [
            getattr(x, "jaxpr", x)
            for x in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns"))
            if hasattr(getattr(x, "jaxpr", x), "eqns")
        ]
        found = [
            c for x in inside for c in collectives(x, times * equation.params.get("length", 1))
        ]
        assert not (found and name == "cond"), f"devices may differ about {found}"
        yield from found


def program(attend, mesh, heads=4, kv_heads=2, gradient=False, dtype=jnp.bfloat16, wrap=None):
    """The jaxpr of attention with integer weights, or of its gradient."""
    q, k = (jax.ShapeDtypeStruct((ROWS, LENGTH, n, DIM), dtype) for n in (heads, kv_heads))
    where = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    attend = on_mesh(attend, mesh)

    def forward(q, k, v, position, segment):
        return attend(q, k, v, Mask(position, segment, position, segment, 5), scale=SCALE)

    forward = wrap(forward) if wrap else forward

    def loss(*arrays):
        return (forward(*arrays).astype(jnp.float32) ** 2).sum()

    fn = jax.grad(loss, (0, 1, 2)) if gradient else forward
    return jax.make_jaxpr(fn)(q, k, k, where, where).jaxpr


def count(jaxpr, name):
    return sum(times for found, _, times in collectives(jaxpr) if found == name)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_a_ring_permutes_once_a_hop_and_gathers_nothing_but_integers(parts):
    forward, both = (program(ring.ring(), line(parts), gradient=g) for g in (False, True))
    if parts == 1:
        assert not list(collectives(forward)) and not list(collectives(both))
        return
    assert count(forward, "ppermute") == parts - 1
    assert count(both, "ppermute") - count(forward, "ppermute") == 2 * parts - 1
    names = {name for name, _, _ in collectives(both)}
    assert names == {"ppermute", "all_gather"}
    for name, x, times in collectives(both):
        if name == "all_gather":
            assert x.dtype == jnp.int32 and x.ndim == 4 and times == 1
        else:  # keys and values as they came, their gradients wide
            assert x.dtype in (jnp.bfloat16, jnp.float32)
            assert x.size == 2 * ROWS * blockwise.chunks(-(-LENGTH // parts), 512)[1] * 2 * DIM
    home = [t for _, x, t in collectives(both) if x.dtype == jnp.float32]
    assert sum(home) == parts


def test_gathered_attention_gathers_twice_and_scatters_float32_once():
    both = list(collectives(program(ring.gathered(), line(4), gradient=True)))
    floats = [(name, x.dtype.name) for name, x, _ in both if x.dtype != jnp.int32]
    assert sorted(floats) == [("all_gather", "bfloat16")] * 2 + [("reduce_scatter", "float32")]


def test_saved_names_spare_the_second_ring():
    saved = jax.checkpoint_policies.save_only_these_names(*ring.NAMES)
    for policy, again in ((None, 1), (saved, 0)):
        wrap = functools.partial(jax.checkpoint, policy=policy)
        jaxpr = program(ring.ring(), line(4), gradient=True, wrap=wrap)
        assert count(jaxpr, "ppermute") == 3 + 7 + 3 * again


@pytest.mark.parametrize("way", WAYS)
def test_what_is_kept_for_the_backward_pass_is_the_piece_itself(way):
    """As many numbers on eight devices together as on one."""

    def kept(parts):
        attend = on_mesh(WAYS[way](), line(parts))
        q, k = (jnp.zeros((1, LENGTH, n, DIM)) for n in (8, 8))
        where = jnp.zeros((1, LENGTH), jnp.int32)

        def apply(q, k, v):
            return attend(q, k, v, Mask(where, where, where, where), scale=SCALE)

        pull = jax.eval_shape(lambda q, k: jax.vjp(apply, q, k, k)[1], q, k)
        arrays = [x for x in jax.tree.leaves(pull) if x.size > 8]  # not a number a device
        if way == "ulysses":  # it looks at whole rows, and needs their positions and segments
            arrays = [x for x in arrays if x.dtype == jnp.float32]
        return sum(x.size for x in arrays)

    assert kept(8) == kept(1) > 4 * LENGTH * 8 * DIM  # q, k, v, out, lse


def temporaries(way, parts, length=8192, chunk=128, dim=64):
    """Bytes beside operands and results of a compiled backward pass, on each device."""
    spread = NamedSharding(line(parts), PartitionSpec(None, "seq"))
    x = jax.ShapeDtypeStruct((1, length, 1, dim), jnp.float32, sharding=spread)
    where = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=spread)
    run = value_and_gradients(on_mesh(WAYS[way](kernel=kernels.xla(chunk)), line(parts)), None)
    compiled = run.lower(x, x, x, x, where, where, None).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_a_ring_falls_with_the_number_of_devices():
    """At most 14 arrays of a piece's size: those of queries, and keys in flight."""
    piece = 8192 * 64 * 4
    few, many = temporaries("ring", 4), temporaries("ring", 8)
    assert many < 14 * piece / 8 and few < 14 * piece / 4
    assert many < 0.6 * few
    assert many < 0.6 * temporaries("gathered", 8)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("parts", [2, 8])
def test_bytes_on_the_wire_are_those_of_the_program(way, parts):
    shares = {"ppermute": 1, "all_gather": parts - 1, "all_to_all": (parts - 1) / parts}
    jaxpr = program(WAYS[way](), line(parts), heads=8, kv_heads=2)
    sent = sum(
        shares[name] * times * x.size * x.dtype.itemsize for name, x, times in collectives(jaxpr)
    )
    assert sent == ring.wire_bytes(way, ROWS * LENGTH, 8, 2, DIM, parts, 2)


# Orders and errors


@pytest.mark.parametrize("layout", ORDERS)
@pytest.mark.parametrize("length, parts", [(32, 4), (29, 4), (3, 8), (1, 1)])
def test_orders_are_permutations_and_pad(layout, length, parts):
    to = layout(length, parts)
    assert len(to.order) % parts == 0 and 0 <= len(to.order) - length < 2 * parts
    assert sorted(to.order) == list(range(len(to.order)))
    row = np.arange(1, length + 1)[None]
    placed = to.place(row)
    assert sorted(placed[0][placed[0] > 0]) == list(row[0])
    np.testing.assert_array_equal(to.restore(placed), row)
    np.testing.assert_array_equal(to.restore(to.place(jnp.asarray(row.T), axis=0), axis=0), row.T)


def test_stripes_and_zigzags_share_the_work_evenly():
    np.testing.assert_array_equal(orders.striped(8, 2).order, [0, 2, 4, 6, 1, 3, 5, 7])
    np.testing.assert_array_equal(orders.zigzag(8, 2).order, [0, 1, 6, 7, 2, 3, 4, 5])

    def work(to, parts):
        """Keys seen by the queries of each rank, of one document."""
        return (to.order + 1).reshape(parts, -1).sum(axis=1)

    assert len(set(work(orders.zigzag(64, 4), 4))) == 1
    striped = work(orders.striped(64, 4), 4)
    assert striped.max() - striped.min() == 3 * 64 // 4  # a key a query
    contiguous = work(orders.contiguous(64, 4), 4)
    assert contiguous.max() > 6 * contiguous.min()


def test_what_cannot_be_split_is_named():
    with pytest.raises(ValueError, match=r"6 query heads .* 4 devices of mesh axis 'seq'"):
        program(ring.ulysses(), line(4), heads=6)
    with pytest.raises(ValueError, match=r"unknown mesh axis 'context'; expected one of \['seq'\]"):
        on_mesh(ring.ring("context"), line(2), axis="context")
    with pytest.raises(ValueError, match="variant is 'rings'"):
        ring.wire_bytes("rings", 8, 4, 2, 4, 2, 2)


@pytest.mark.parametrize("attend", [f(kernel=kernels.xla(128)) for f in (ring.ring, ring.gathered)])
def test_a_loop_over_layers_keeps_nothing_of_two_lengths(attend):
    """Masks are the same for all layers; before the loop they would be all there at once."""
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("seq",))
    over = on_mesh(attend, one)

    def temporaries(length):
        q, k = (jax.ShapeDtypeStruct((1, length, n, 8), jnp.float32) for n in (2, 1))
        ints = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(q, k, v, position, segment):
            mask = Mask(position, segment, position, segment)
            layer = lambda x, _: (over(x, k, v, mask, scale=0.3), None)  # noqa: E731
            return jax.lax.scan(layer, q, None, length=2)[0].sum()

        run = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, ints, ints)
        return run.compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(1024), temporaries(4096)
    assert long < 4.5 * short
