import pytest

from jaxrl_eff.data import sources


def test_an_index_outside_the_source_is_an_error_that_says_how_many_there_are():
    source = sources.python_source([{"a": 1}])
    for index in (-1, 1):
        with pytest.raises(IndexError, match=f"has 1 examples, so there is no {index}"):
            source[index]


def test_python_source_takes_a_sequence_or_a_function():
    for rows in ([{"a": i} for i in range(3)], lambda: ({"a": i} for i in range(3))):
        source = sources.python_source(rows)
        assert isinstance(source, sources.Source)
        assert list(source) == [{"a": 0}, {"a": 1}, {"a": 2}]


def test_holdout_is_disjoint_complete_and_fixed_by_the_seed():
    rows = [{"n": i} for i in range(50)]

    def numbers(source):
        return [e["n"] for e in source]

    rest, held = sources.holdout(rows, 7, seed=3)
    assert len(held) == 7 and len(rest) == 43
    assert sorted(numbers(rest) + numbers(held)) == list(range(50))
    assert numbers(held) == sorted(numbers(held))
    assert numbers(sources.holdout(rows, 7, seed=3)[1]) == numbers(held)
    assert numbers(sources.holdout(rows, 7, seed=4)[1]) != numbers(held)
    with pytest.raises(ValueError, match="cannot hold out 51 of 50"):
        sources.holdout(rows, 51, seed=0)


def test_views_compose():
    source = sources.mapped([{"n": i} for i in range(9)], lambda e: {"m": e["n"] * 10})
    assert list(sources.subset(source, [4, 0])) == [{"m": 40}, {"m": 0}]
    with pytest.raises(ValueError, match=r"a subset of 9 examples cannot hold 0\.\.9"):
        sources.subset(source, [0, 9])
