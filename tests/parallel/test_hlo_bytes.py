"""Bytes counted on compiled programs."""

import functools

import hlo_bytes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

N, G = 8, 4
GROUPS = [[0, 1, 2, 3], [4, 5, 6, 7]]
B = 16 * 8 * 4  # bytes of a shard


def compiled(fn):
    mesh = Mesh(np.array(jax.devices()), ("d",))
    fn = jax.shard_map(fn, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False)
    return jax.jit(fn).lower(jnp.zeros((16 * N, 8), jnp.float32)).compile()


@pytest.mark.parametrize(
    ("kind", "fn", "received"),
    [
        ("all-gather", functools.partial(lax.all_gather, axis_index_groups=GROUPS), (G - 1) * B),
        ("all-reduce", functools.partial(lax.psum, axis_index_groups=GROUPS), 2 * B * (G - 1) / G),
        ("reduce-scatter", functools.partial(lax.psum_scatter, tiled=True), B * (N - 1) / N),
    ],
)
def test_bytes_of_one_collective(kind, fn, received):
    (one,) = hlo_bytes.collectives(compiled(lambda x: fn(x, "d")))
    assert (one.kind, one.received, one.times) == (kind, N * received, 1)
    assert one.dtype == "f32"


def test_all_to_all_and_permutes_count_what_others_sent():
    (one,) = hlo_bytes.collectives(compiled(lambda x: lax.all_to_all(x, "d", 0, 1, tiled=True)))
    assert one.received == N * B * (N - 1) / N
    pairs = [(0, 1), (1, 0), (2, 2), (3, 5)]
    (one,) = hlo_bytes.collectives(compiled(lambda x: lax.ppermute(x, "d", pairs)))
    assert one.received == 3 * B


def test_loops_count_as_often_as_they_run():
    def fn(x):
        return lax.fori_loop(0, 5, lambda _, y: lax.ppermute(y, "d", [(0, 1)]), x)

    program = compiled(fn)
    assert hlo_bytes.received(program) == 5 * B
    assert hlo_bytes.count([program, program]) == {"collective-permute": 10}
    assert hlo_bytes.largest(program) >= B


@pytest.mark.parametrize(
    ("line", "received"),
    [
        ("%a = f32[8]{0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}", 8 * 24),
        (
            "%a = (bf16[2]{0}, bf16[8]{0}) all-gather-start(%x), "
            "replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}",
            8 * 12,
        ),
        (
            "%a = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), "
            "source_target_pairs={{0,1},{1,0}}",
            2 * 16,
        ),
        (
            "%a = f32[8]{0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add",
            8 * 2 * 24,
        ),
        ("%a = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add", 8 * 2 * 28),
        ("%a = f8e4m3fn[8]{0} all-gather(%x), replica_groups={{0,1}}, dimensions={0}", 8 * 4),
    ],
)
def test_other_ways_to_write_a_collective(line, received):
    text = f"HloModule m, num_partitions=8\n\nENTRY %main (x: f32[8]) -> f32[8] {{\n  {line}\n}}\n"
    assert hlo_bytes.received(text) == received


def test_a_loop_without_a_count_is_refused():
    text = (
        "HloModule m, num_partitions=2\n\n%body (x: f32[8]) -> f32[8] {\n"
        "  %a = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add\n}\n\n"
        "ENTRY %main (x: f32[8]) -> f32[8] {\n"
        "  %w = f32[8]{0} while(%x), condition=%cond, body=%body\n}\n"
    )
    with pytest.raises(ValueError, match="no known number of trips"):
        hlo_bytes.collectives(text)
