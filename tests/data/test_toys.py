import numpy as np
import pytest

from jaxrl_eff.data import toys


def shown(source):
    return [e["prompt"] for e in source]


def test_the_truth_by_hand():
    assert toys.reverse_digits().truth("1230") == "0321"
    assert toys.sort_digits().truth("3120") == "0123"
    example = toys.prompts(toys.reverse_digits())[0]
    assert example["truth"] == example["prompt"][-2::-1] and example["prompt"].endswith(">")
    assert set(example["prompt"]) <= set(toys.ALPHABET)


@pytest.mark.parametrize("digits", [1, 2, 4, 9])
def test_splits_are_disjoint_and_fixed_by_the_seed(digits):
    task = toys.reverse_digits(digits)
    train, held = shown(toys.prompts(task)), shown(toys.prompts(task, "held_out"))
    assert len(train) == task.train and len(held) == task.held_out
    assert len({*train, *held}) == len(train) + len(held)
    assert all(len(p) == digits + 1 for p in train + held)
    assert shown(toys.prompts(toys.reverse_digits(digits, seed=1))) != train


def test_held_out_numbers_do_not_depend_on_how_many_train():
    held = [
        shown(toys.prompts(toys.sort_digits(4, train=n, held_out=64), "held_out"))
        for n in (10, 5000)
    ]
    assert held[0] == held[1]


def test_an_exact_share_of_completions_is_wrong_and_always_the_same():
    source = toys.completions(toys.reverse_digits(train=200), wrong=0.25, seed=5)
    wrong = [not toys.gold(e, e["completion"]) for e in source]
    assert sum(wrong) == 50
    assert [e["completion"] for e in source] == [e["completion"] for e in source]
    assert all(toys.gold(e, e["completion"]) for e in toys.completions(toys.sort_digits(train=50)))


@pytest.mark.parametrize("keep_length", [True, False])
def test_rejected_answers_are_wrong(keep_length):
    source = toys.preferences(toys.sort_digits(train=200), keep_length=keep_length)
    assert all(toys.gold(e, e["chosen"]) and not toys.gold(e, e["rejected"]) for e in source)
    lengths = {len(e["rejected"]) for e in source}
    assert lengths == ({4} if keep_length else {3, 4, 5})


def test_even_equal_digits_can_be_corrupted():
    rng = np.random.default_rng(0)
    assert all(toys.corrupt("1111", rng) != "1111" for _ in range(20))
    assert all(toys.corrupt("7", rng, keep_length=False) != "7" for _ in range(20))


def test_digit_share_by_hand():
    example = {"truth": "4321"}
    shares = {"4321": 1.0, "4311": 0.75, "43": 0.5, "": 0.0, "43214321": 0.5, "1234": 0.0}
    assert {r: toys.digit_share(example, r) for r in shares} == shares


def test_impossible_tasks_are_refused():
    with pytest.raises(ValueError, match="do not split the 100 numbers of 2 digits"):
        toys.reverse_digits(2, train=90, held_out=20)
    with pytest.raises(ValueError, match="digits is 0"):
        toys.reverse_digits(0)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        toys.prompts(toys.reverse_digits(), "test")
    with pytest.raises(ValueError, match="a share lies between 0 and 1"):
        toys.completions(toys.reverse_digits(), wrong=20)
