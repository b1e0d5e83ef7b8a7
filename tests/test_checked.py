"""Calls with types or shapes that a signature does not allow are errors in every test."""

import dataclasses

import jax.numpy as jnp
import pytest
from beartype import beartype
from checked import decorate

from jaxrl_eff import masked
from jaxrl_eff.types import Array, Float, Int, PyTree

checked = decorate(typechecker=beartype)


def test_the_package_is_checked():
    x = jnp.ones((2, 3))
    assert float(masked.mean(x, x)) == 1
    with pytest.raises(Exception, match="violates type hint"):
        masked.mean([1.0], x)


def test_arrays_of_one_signature_agree_in_their_axes():
    @checked
    def rows(x: Float[Array, "B T"], n: Int[Array, "B"]) -> Float[Array, "B"]:
        return x[:, 0] if n.sum() == 0 else x[0]

    x = jnp.ones((2, 3))
    assert rows(x, jnp.zeros(2, jnp.int32)).shape == (2,)
    for wrong in ((x, jnp.zeros(3, jnp.int32)), (x, jnp.zeros(2)), (x[0], jnp.zeros(2, jnp.int32))):
        with pytest.raises(Exception, match="violates type hint"):
            rows(*wrong)
    with pytest.raises(Exception, match="violates type hint"):  # what it returns has an axis T
        rows(x, jnp.ones(2, jnp.int32))


def test_names_of_axes_are_of_one_call():
    @checked
    def inner(x: Float[Array, "T"]) -> int:
        return len(x)

    @checked
    def outer(x: Float[Array, "T"], tree: PyTree[Array]) -> int:
        return inner(x[1:]) + len(tree)

    assert outer(jnp.ones(4), {"a": jnp.ones(2)}) == 4


def test_what_has_no_arrays_is_checked_too():
    @checked
    def twice(n: int) -> str:
        return "ab" if n else n

    @checked
    @dataclasses.dataclass(frozen=True)
    class Pair:
        a: int
        b: "tuple[str, ...]" = ()

        @classmethod
        @checked
        def of(cls, text: str) -> "Pair":
            return cls(len(text), (text,))

    assert twice(1) == "ab" and Pair.of("x") == Pair(1, ("x",))
    for wrong in (lambda: twice("1"), lambda: twice(0), lambda: Pair("1"), lambda: Pair(1, (2,))):
        with pytest.raises(Exception, match="violates type hint"):
            wrong()
