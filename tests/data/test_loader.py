import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxrl_eff.core import glossary
from jaxrl_eff.data import loader, packing, toys
from jaxrl_eff.data.encode import encode_preference, encode_prompt, encode_prompt_completion
from jaxrl_eff.data.tokenizer import CharTokenizer

N, LENGTH = 23, 16
KINDS = ("sft", "preference", "prompts")


def rows():
    """Example i is made of ids that say i, so that it is recognized wherever it lands."""
    sizes = np.random.default_rng(0).integers(2, 9, N)
    return [{"ids": [100 * (i + 1) + j for j in range(n)]} for i, n in enumerate(sizes)]


def masked(ids):
    mask = np.ones(len(ids), np.float32)
    mask[:1] = 0
    return np.array(ids, np.int32), mask


ENCODE = {
    "sft": lambda e: masked(e["ids"]),
    "preference": lambda e: (masked(e["ids"]), masked([i + 5000 for i in e["ids"][:3]])),
    "prompts": lambda e: np.array(e["ids"], np.int32),
}


def load(kind, source=None, **options):
    size = {"prompt_length": LENGTH} if kind == "prompts" else {"length": LENGTH}
    defaults = {"encode": ENCODE[kind], "batch": 4, "seed": 1, "kind": kind, "prefetch": 4} | size
    return loader.batches(rows() if source is None else source, **(defaults | options))


def take(batches, n=None):
    out = list(itertools.islice(batches, n))
    batches.close()
    return out


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name].dtype == y[name].dtype
            np.testing.assert_array_equal(x[name], y[name])


def examples_in(kind, batch):
    if kind == "prompts":
        return [i for i in batch["prompt_example"].tolist() if i >= 0]
    segments = packing.unpack(batch)[:: 2 if kind == "preference" else 1]
    return [int(ids[0]) // 100 - 1 for ids, _ in segments]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_static_and_obey_the_glossary(kind):
    out = take(load(kind), 8)
    for batch in out:
        glossary.check(kind, batch)
        assert {x.shape[0] for x in batch.values()} == {4}
        assert {x.shape[1] for x in batch.values() if x.ndim == 2} == {LENGTH}
    assert set(out[0]) == (
        {"prompt", "prompt_length", "prompt_example"}
        if kind == "prompts"
        else {"tokens", "segment", "position", "mask"}
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_holds_every_example_once(kind, packed):
    batches = load(kind, epochs=1, remainder="pad", packed=packed)
    seen = [i for batch in take(batches) for i in examples_in(kind, batch)]
    assert sorted(seen) == list(range(N))
    assert seen != sorted(seen)
    stats = batches.stats()
    assert stats["examples"] == N and stats["epochs"] == 1.0 and stats["dropped"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_no_example_waits_for_ever(kind):
    seen = Counter(i for b in take(load(kind), 40) for i in examples_in(kind, b))
    assert len(seen) == N and max(seen.values()) - min(seen.values()) <= 2


def test_a_short_example_does_not_wait_behind_ever_new_long_ones():
    source = [{"ids": [100 * (i + 1)] * (6 if i == 0 else 11)} for i in range(40)]
    batches = take(load("sft", source, shuffle=False, batch=2, epochs=1), 3)
    assert [0 in examples_in("sft", batch) for batch in batches] == [False, True, False]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [0, 1, 5, 11])
def test_resume_gives_the_same_batches(kind, at):
    whole = load(kind)
    expected = take(whole, 16)  # several epochs
    first = load(kind)
    for _ in range(at):
        next(first)
    state = json.loads(json.dumps(first.state()))
    first.close()
    second = load(kind, threads=0)  # nor does the thread change anything
    second.restore(state)
    same(take(second, 16 - at), expected[at:])
    assert second.stats() == whole.stats() and second.state() == whole.state()


def test_a_loader_can_be_restored_in_place():
    batches = load("sft")
    next(batches)
    state = batches.state()
    ahead = [next(batches) for _ in range(6)]
    batches.restore(state)
    same(take(batches, 6), ahead)


def test_resume_after_the_last_batch_stays_at_the_end():
    batches = load("sft", epochs=1)
    take(batches)
    again = load("sft", epochs=1)
    again.restore(batches.state())
    assert take(again) == []
    longer = load("sft", epochs=2)
    longer.restore(batches.state())
    assert sorted(i for b in take(longer) for i in examples_in("sft", b)) == list(range(N))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 4])
def test_processes_split_the_rows_of_the_same_batches(kind, count):
    whole = take(load(kind), 9)
    parts = [take(load(kind, process=(i, count)), 9) for i in range(count)]
    joined = [
        {k: np.concatenate([part[k] for part in step]) for k in step[0]}
        for step in zip(*parts, strict=True)
    ]
    same(joined, whole)


def test_a_state_serves_any_number_of_processes():
    first = load("sft", process=(1, 2))
    take(first, 3)
    second = load("sft")
    second.restore(first.state())
    same(take(second, 4), take(load("sft"), 7)[3:])


@pytest.mark.parametrize(
    "change", [{"seed": 2}, {"batch": 8}, {"source": rows()[:-1]}, {"shuffle": False}]
)
def test_a_state_of_another_loader_is_refused(change):
    batches = load("sft")
    take(batches, 1)
    with pytest.raises(ValueError, match=r"the state was saved with \w+ = .*, but here it is"):
        load("sft", **change).restore(batches.state())


def test_without_shuffling_examples_come_in_order_every_epoch():
    batches = take(load("prompts", shuffle=False, batch=1), 2 * N)
    assert [int(b["prompt_example"][0]) for b in batches] == 2 * list(range(N))


def test_epochs_differ_and_seeds_differ():
    def order(seed):
        return [
            int(b["prompt_example"][0]) for b in take(load("prompts", batch=1, seed=seed), 2 * N)
        ]

    first = order(1)
    assert first[:N] != first[N:] and sorted(first[:N]) == sorted(first[N:]) == list(range(N))
    assert order(2) != first and order(1) == first


@pytest.mark.parametrize("kind", KINDS)
def test_overlong_and_empty_examples_are_dropped_and_counted(kind):
    source = [*rows(), {"ids": list(range(40))}, {"ids": []}]
    batches = load(kind, source, epochs=1, remainder="pad")
    seen = [i for b in take(batches) for i in examples_in(kind, b)]
    stats = batches.stats()
    assert len(seen) == N == stats["examples"]
    assert (stats["overlong"], stats["empty"], stats["dropped"]) == (1, 1, 2)


def test_truncation_keeps_the_start_and_is_counted():
    batches = load("sft", [{"ids": list(range(10, 50))}], epochs=1, overlong="truncate")
    (batch,) = take(batches)
    np.testing.assert_array_equal(batch["tokens"][0], np.arange(10, 10 + LENGTH))
    assert batches.stats()["truncated"] == 1 and batches.stats()["dropped"] == 0


def test_a_truncated_pair_keeps_both_sides():
    source = [{"ids": list(range(10, 50))}]
    (batch,) = take(load("preference", source, epochs=1, overlong="truncate"))
    assert Counter(batch["segment"][0].tolist()) == {1: LENGTH - 3, 2: 3}


def test_overlong_is_an_error_on_request_and_names_the_example():
    for kind in KINDS:
        batches = load(kind, [*rows(), {"ids": list(range(1, 40))}], overlong="error", threads=0)
        with pytest.raises(ValueError, match=r"example 23: it has \d+ tokens, but at most 16 fit"):
            take(batches, 20)


def test_an_example_that_cannot_be_encoded_is_named():
    batches = load("sft", [{"ids": [1, 2]}, {"id": [1]}], shuffle=False)
    with pytest.raises(ValueError, match=r"example 1: KeyError: 'ids'"):
        next(batches)
    batches.close()
    learned_first = load("sft", encode=lambda e: (np.array([1, 2]), np.ones(2, np.float32)))
    with pytest.raises(ValueError, match="nothing precedes a first token"):
        next(learned_first)
    learned_first.close()


def test_a_source_without_a_usable_example_is_an_error_not_a_hang():
    batches = load("sft", [{"ids": [1] * 40}] * 3)
    with pytest.raises(ValueError, match="the last 3 examples were all dropped"):
        next(batches)
    batches.close()


def test_the_last_prompts_are_dropped_or_padded_with_marked_repeats():
    kept = load("prompts", epochs=1)
    assert len(take(kept)) == 5 and kept.stats()["remainder"] == 3
    last = take(load("prompts", epochs=1, remainder="pad"))[-1]
    assert last["prompt_example"].tolist()[3:] == [-1]
    np.testing.assert_array_equal(last["prompt"][3], last["prompt"][0])
    assert last["prompt_length"][3] == last["prompt_length"][0]
    halves = [
        take(load("prompts", epochs=1, remainder="pad", process=(i, 2)))[-1] for i in range(2)
    ]
    same([{k: np.concatenate([h[k] for h in halves]) for k in last}], [last])


def test_padding_share_is_of_all_positions():
    batches = load("sft", epochs=1)
    out = take(batches)
    empty = np.mean([b["segment"] == 0 for b in out])
    learned = sum(b["mask"].sum() for b in out) / sum((b["segment"] > 0).sum() for b in out)
    assert batches.stats()["padding"] == pytest.approx(empty)
    assert batches.stats()["learned"] == pytest.approx(learned)
    unpacked = load("sft", epochs=1, packed=False)
    take(unpacked)
    assert unpacked.stats()["padding"] > batches.stats()["padding"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "rl"}, r"unknown kind 'rl'; expected one of \['sft', 'preference', 'prompts'\]"),
        ({"length": None}, "needs length, at least 1; it is None"),
        ({"batch": 3, "process": (0, 2)}, "3 rows cannot be split over 2 processes"),
        ({"process": (2, 2)}, "process 2 of 2 does not exist"),
        ({"seed": -1}, "seed is -1"),
        ({"epochs": 0}, "epochs is 0"),
        (
            {"overlong": "cut"},
            r"unknown overlong 'cut'; expected one of \['drop', 'truncate', 'error'\]",
        ),
        ({"remainder": "keep"}, "unknown remainder 'keep'"),
        ({"source": []}, "the source has no examples"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    kind = options.pop("kind", "sft")
    with pytest.raises(ValueError, match=message):
        loader.batches(
            options.pop("source", rows()),
            **({"encode": masked, "batch": 4, "seed": 0, "length": 8, "kind": kind} | options),
        )


def test_the_toys_go_through_every_kind():
    tokenizer, task = CharTokenizer(toys.ALPHABET), toys.reverse_digits(train=64)
    encoders = {
        "sft": (toys.completions(task), encode_prompt_completion(tokenizer, bos=True)),
        "preference": (toys.preferences(task), encode_preference(tokenizer, bos=True)),
        "prompts": (toys.prompts(task), encode_prompt(tokenizer, bos=True)),
    }
    for kind, (source, encode) in encoders.items():
        size = {"prompt_length": 8} if kind == "prompts" else {"length": 48}
        batches = loader.batches(source, encode=encode, batch=4, kind=kind, seed=0, **size)
        (batch,) = take(batches, 1)
        if kind == "prompts":
            example = source[int(batch["prompt_example"][2])]
            ids = batch["prompt"][2, : batch["prompt_length"][2]]
            assert tokenizer.decode(ids.tolist()) == example["prompt"]
        else:
            for ids, mask in packing.unpack(batch):
                shown, answer = tokenizer.decode(ids.tolist()).split(">")
                assert tokenizer.decode(ids[mask > 0].tolist()) == answer and len(answer) == 4
                assert ids[0] == tokenizer.bos and ids[-1] == tokenizer.eos and mask[-1] == 1
                assert kind == "preference" or answer == shown[::-1]


def test_importing_the_loader_does_not_import_grain_or_jax():
    code = """
import sys, jaxrl_eff.data.loader, jaxrl_eff.rollout.rewards.verify
print([name for name in ("grain", "jax") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "[]"


def test_grain_is_imported_by_the_thread_that_makes_a_loader_and_nothing_after_it():
    """Grain's imports replace `builtins.__import__` for all threads while they run."""
    code = """
import sys, threading
from jaxrl_eff.data import loader
import numpy as np
assert "grain" not in sys.modules
batches = loader.batches(
    [{"ids": [1, 2]}] * 9, encode=lambda e: (np.array(e["ids"]), np.array([0.0, 1.0])), batch=2,
    kind="sft", seed=0, length=8,
)
before = set(sys.modules)
print("grain" in before)

def body():
    batches.prepare()
    next(batches)
    batches.close()

thread = threading.Thread(target=body)
thread.start()
thread.join()
print(sorted(set(sys.modules) - before), batches.stats()["batches"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.split("\n")[:2] == ["True", "[] 1"]
