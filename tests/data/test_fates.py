"""What is dropped, cut or empty is counted before anything is trained."""

import numpy as np
import pytest

from jaxrl_eff.data import fates, loader

LENGTH = 8


def masked(n, learned=True):
    mask = np.full(n, float(learned), np.float32)
    mask[:1] = 0
    return np.arange(n, dtype=np.int32), mask


ENCODE = {
    "sft": lambda e: masked(e["n"], e.get("learned", True)),
    "preference": lambda e: (masked(e["n"] // 2), masked(e["n"] - e["n"] // 2)),
    "prompts": lambda e: masked(e["n"])[0],
}


def load(kind, source, **options):
    size = {"prompt_length": LENGTH} if kind == "prompts" else {"length": LENGTH}
    return loader.batches(
        source, encode=ENCODE[kind], batch=2, kind=kind, seed=0, **size, **options
    )


@pytest.mark.parametrize("kind", ENCODE)
def test_a_survey_counts_what_the_loader_will_count(kind):
    source = [{"n": n} for n in (4, 8, 9, 20, 0, 6, 30)]
    batches = load(kind, source, epochs=1, remainder="pad", threads=0)
    found = batches.survey()
    assert (found.size, found.seen, found.longest, found.length) == (7, 7, 30, LENGTH)
    assert found.fates == {"kept": 3, "overlong": 3, "empty": 1}
    assert batches.state()["drawn"] == 0 and batches.stats()["dropped"] == 0
    list(batches)
    stats = batches.stats()
    assert (stats["examples"], stats["overlong"], stats["empty"]) == (3, 3, 1)


def test_notes_say_how_many_and_why():
    source = [{"n": 20}, {"n": 4, "learned": False}, *[{"n": 4}] * 8]
    assert load("sft", source).survey().notes("data.length", "sft") == [
        "1 of 10 examples are dropped: longer than data.length=8 (up to 20 tokens)",
        "1 of 10 examples are dropped: without anything to learn",
    ]
    cut = load("sft", source, overlong="truncate").survey()
    assert cut.notes("data.length", "sft")[0] == (
        "1 of 10 examples are truncated: longer than data.length=8 (up to 20 tokens)"
    )
    prompts = load("prompts", [{"n": 0}, {"n": 3}]).survey()
    assert prompts.notes("data.prompt_length", "prompts") == [
        "1 of 2 examples are dropped: without a token"
    ]
    assert load("sft", [{"n": 8}] * 5).survey().notes("data.length", "sft") == []


def test_of_a_large_source_a_part_from_everywhere_is_looked_at():
    source = [{"n": 9 if i % 5 == 0 else 8} for i in range(50_000)]
    found = load("sft", source).survey(count=640)
    assert found.seen == 640 and found.size == 50_000
    assert 0.15 < found.fates["overlong"] / found.seen < 0.25
    assert "of 640 examples looked at (there are 50,000)" in found.notes("length", "sft")[0]
    assert {i // 5000 for i in fates._spread(50_000, 640)} == set(range(10))
    assert sorted(fates._spread(100, 1024)) == list(range(100))


@pytest.mark.parametrize("kind", ENCODE)
def test_a_source_without_a_usable_example_is_refused_before_training(kind):
    with pytest.raises(ValueError, match="none of 5 examples can be used: 3 have more than 8"):
        load(kind, [{"n": 0}, {"n": 9}, {"n": 9}, {"n": 0}, {"n": 99}]).survey()


def test_a_usable_example_is_found_wherever_it_is():
    source = [{"n": 9}] * 3000 + [{"n": 4}] + [{"n": 9}] * 3000
    found = load("sft", source).survey(count=32)
    assert found.fates == {"overlong": 32}


def test_what_cannot_be_encoded_or_is_too_long_to_be_an_error_is_found_by_the_survey():
    source = [{"n": 4}] * 9 + [{"m": 4}]
    with pytest.raises(ValueError, match="example 9: KeyError: 'n'"):
        load("sft", source).survey()
    with pytest.raises(ValueError, match="example 9: it has 9 tokens, but at most 8 fit"):
        load("sft", [*source[:9], {"n": 9}], overlong="error").survey()


def test_a_survey_ends_after_its_time(monkeypatch):
    monkeypatch.setattr(fates, "_SECONDS", 0.0)
    assert load("sft", [{"n": 4}] * 100).survey().seen == 1
