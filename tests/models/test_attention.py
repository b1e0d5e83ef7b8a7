import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_eff.models import LMConfig, attention
from jaxrl_eff.models.attention import Mask


def loops(q, k, v, q_position, k_position, q_segment, k_segment, window, softcap, scale):
    """Attention one query, one head, one key at a time."""
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        head = n // (q.shape[2] // k.shape[2])
        scores = []
        for s in range(k.shape[1]):
            back = q_position[b, t] - k_position[b, s]
            same = q_segment[b, t] == k_segment[b, s] > 0
            if same and back >= 0 and (window is None or back < window):
                x = scale * np.dot(q[b, t, n], k[b, s, head])
                scores.append((s, softcap * np.tanh(x / softcap) if softcap else x))
        weight = np.exp([x for _, x in scores])
        for (s, _), w in zip(scores, weight, strict=True):
            out[b, t, n] += w / weight.sum() * v[b, s, head]
    return out


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("attend", [attention.plain, attention.blocked])
def test_attention_equals_loops(attend, window, softcap, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 2)
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 8, 4, 6)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 8, 2, 6)).astype(np.float32)
    segment = np.asarray([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 0, 0]], np.int32)
    position = np.asarray([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 0, 0]], np.int32)
    expected = loops(q, k, v, position, position, segment, segment, window, softcap, scale=0.3)
    position, segment = jnp.asarray(position), jnp.asarray(segment)
    mask = Mask(position, segment, position, segment, window)
    got = attend(*map(jnp.asarray, (q, k, v)), mask, scale=0.3, softcap=softcap)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert (np.asarray(got)[np.asarray(segment) == 0] == 0).all()


def test_blocks_of_queries_have_the_gradient_of_plain(key, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 4)
    q, k, v, g = jax.random.normal(key, (4, 1, 16, 2, 4))
    position = jnp.arange(16)[None]
    segment = jnp.where(position < 13, 1, 0)

    def loss(attend, qkv):
        out = attend(*qkv, Mask(position, segment, position, segment), scale=0.5)
        return (out * g).sum()

    gradient = jax.jit(jax.grad(loss, 1), static_argnums=0)
    grads = [gradient(a, (q, k, v)) for a in (attention.plain, attention.blocked)]
    for x, y in zip(*grads, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("cached", [0, 5])
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("window", [None, 2])
def test_what_the_fused_kernel_is_told_is_plain(window, queries, cached, key, monkeypatch):
    """The kernel runs on GPUs alone; here XLA's own attention takes the same mask."""
    monkeypatch.setattr(attention, "KERNEL", "xla")
    monkeypatch.setattr(attention, "FEW", 2)
    q, k, v = jax.random.normal(key, (3, 2, queries + cached, 2, 4))
    q = jnp.concatenate([q, 2 * q], axis=2)[:, cached:]  # two query heads a key head
    segment = jnp.asarray([[1] * 5 + [2] * 6 + [0], [1] * 10 + [0] * 2])[:, : queries + cached]
    position = jnp.asarray([[*range(5), *range(6), 0], [*range(10), 0, 0]])[:, : queries + cached]
    mask = Mask(position[:, cached:], segment[:, cached:], position, segment, window)
    outs = [attend(q, k, v, mask, scale=0.5) for attend in (attention.plain, attention.fused)]
    np.testing.assert_allclose(*outs, atol=1e-5)


def test_fused_attention_is_chosen_only_where_it_applies():
    sizes = dict(vocab=11, layers=1, width=8, heads=1, kv_heads=1, head_dim=8, ffn=8)
    half = LMConfig(**sizes, dtype="bfloat16")
    assert attention.choose(half, "gpu") is attention.fused
    assert attention.choose(half.replace(dtype="float32"), "gpu") is attention.plain
    assert attention.choose(half.replace(attn_softcap=5.0), "gpu") is attention.plain
    assert attention.choose(half, "tpu") is attention.plain
    assert attention.choose(half, "cpu") is attention.blocked
