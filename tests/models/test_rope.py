import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_eff.models.config import Rope
from jaxrl_eff.models.rope import frequencies, rotate, table

# Angular frequencies and vector lengths as transformers 5 computes them, head dimension 16.
GOLDEN = {
    "linear": (
        Rope(kind="linear", factor=4.0),
        [0.25, 0.079056941, 0.0250000004, 0.00790569466, 0.00249999994, 0.000790569466,
         0.000250000012, 7.90569466e-05],
        1.0,
    ),
    "llama3": (
        Rope(kind="llama3", theta=500.0, factor=8.0, original_length=64),
        [1.0, 0.459863275, 0.0976166278, 0.0121561559, 0.00559017016, 0.0025707141, 0.00118217699,
         0.000543639821],
        1.0,
    ),
    "yarn": (
        Rope(kind="yarn", factor=4.0, original_length=64),
        [1.0, 0.237170815, 0.049999997, 0.00790569466, 0.00249999994, 0.000790569466,
         0.000250000012, 7.90569466e-05],
        1.138629436111989,
    ),
    "yarn with every option": (
        Rope(kind="yarn", theta=1000.0, factor=8.0, original_length=32, beta_fast=4.0,
             truncate=False, mscale=0.7, mscale_all_dim=1.2),
        [1.0, 0.256166548, 0.0222284924, 0.00937367696, 0.00395284733, 0.00166690187,
         0.000702926656, 0.000296421727],
        0.9167912505456107,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_scalings_are_those_of_transformers(name):
    rope, expected, length = GOLDEN[name]
    w, factor = frequencies(rope, 16)
    np.testing.assert_allclose(w, expected, rtol=1e-6)
    assert factor == pytest.approx(length, rel=1e-12)


def test_rotation_turns_pairs_half_a_head_apart():
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    cos, sin = table(Rope(theta=100.0), 4, jnp.asarray([[3]]))
    a, b = 3.0, 0.3  # angles of the two pairs
    expected = [
        1 * np.cos(a) - 3 * np.sin(a),
        2 * np.cos(b) - 4 * np.sin(b),
        3 * np.cos(a) + 1 * np.sin(a),
        4 * np.cos(b) + 2 * np.sin(b),
    ]
    np.testing.assert_allclose(rotate(x, cos, sin).ravel(), expected, atol=1e-6)


def test_scores_depend_on_the_distance_alone(key):
    q, k = jax.random.normal(key, (2, 1, 1, 1, 8))
    score = []
    for at in (3, 20):
        cos, sin = table(Rope(), 8, jnp.asarray([[at, at + 4]]))
        both = rotate(jnp.concatenate([q, k], axis=1), cos, sin)
        score.append((both[0, 0] * both[0, 1]).sum())
    np.testing.assert_allclose(score[0], score[1], atol=1e-5)
