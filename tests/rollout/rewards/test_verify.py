from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from jaxrl_eff.core import glossary
from jaxrl_eff.data import source_files, toys
from jaxrl_eff.data.text import said
from jaxrl_eff.data.tokenizer import CharTokenizer, load_tokenizer
from jaxrl_eff.rollout.rewards import verify
from jaxrl_eff.train import parts
from jaxrl_eff.train.settings import RewardSettings

SHARED = Path(__file__).parents[3] / "../shared/data"


def test_numeric_compares_numbers_not_text():
    reward = verify.numeric()
    assert reward({"answer": "steps <<1+1=2>>2\n#### 1,000"}, "it is $1000.00.") == 1.0
    assert reward({"answer": 0.1}, "0.10") == 1.0
    assert reward({"answer": 3}, "3.0001") == 0.0
    assert reward({"answer": "3"}, "no idea") == 0.0
    assert verify.numeric(field="y", anywhere=False)({"y": "3"}, "3") == 0.0
    with pytest.raises(ValueError, match="field 'answer' holds no number: 'none'"):
        reward({"answer": "none"}, "3")


@pytest.mark.parametrize(
    ("truth", "response"),
    [
        (72, "so 72."),
        (0.1, "0.10"),
        (-3.0, "- 3"),
        (Decimal("1.50"), r"\boxed{\frac32}"),
        (np.float32(0.1), "1/10"),
        (np.int64(7), "7"),
        (r"\frac{-1}{2}", "-0.5"),
        ("- 3", "−3"),
        (r"5\text{ cm}^2", "5"),
        ("1e5", "100,000"),
        (r"so $x=7$.\n\[\boxed{7}\]", "7"),
    ],
)
def test_truths_are_numbers_or_texts_of_one(truth, response):
    assert verify.numeric()({"answer": truth}, response) == 1.0


def test_a_truth_may_have_more_digits_than_python_prints():
    assert verify.numeric()({"answer": 10**5000}, "72") == 0.0


@pytest.mark.parametrize(
    "truth",
    [
        *(None, True, [72], {"a": 1}, float("nan"), float("inf"), 1j, b"72", Decimal("NaN")),
        *("", "none", "nan", "inf", r"3\sqrt{13}", "6 - 5i", "3, 5, 7", "2k+2", "4210_{5}"),
        *(r"\text{June 20}", "Saturday", r"\boxed{x}", "#### 3 or 4", r"\boxed{7", "0.333..."),
    ],
)
def test_a_truth_without_a_number_is_an_error_for_any_response(truth):
    for response in ("0", "", r"\boxed{20}"):
        with pytest.raises(ValueError, match="field 'answer' holds no number: "):
            verify.numeric()({"answer": truth}, response)


@pytest.mark.parametrize("truth", [None, True, ["a"], {}])
def test_exact_is_for_text_and_numbers(truth):
    assert verify.exact()({"answer": 5}, "5") == 1.0
    with pytest.raises(ValueError, match="neither text nor a number"):
        verify.exact()({"answer": truth}, str(truth))


def test_exact():
    assert verify.exact()({"answer": "Paris"}, " Paris\n") == 1.0
    assert verify.exact(strip=False)({"answer": "Paris"}, " Paris") == 0.0
    assert verify.exact(field="truth")({"truth": "a"}, "b") == 0.0
    with pytest.raises(ValueError, match=r"unknown field 'answer'; expected one of \['truth'\]"):
        verify.exact()({"truth": "a"}, "b")


@pytest.mark.parametrize("example", [{}, {"truth": 21}, {"truth": None}])
def test_the_rewards_of_toys_need_a_text(example):
    for reward in (toys.gold, toys.digit_share):
        with pytest.raises(ValueError, match=r"field 'truth' is .* but must be text"):
            reward(example, "21")


def test_format():
    assert verify.matches(r"<think>.*</think>\d+")({}, "<think>a\nb</think>7") == 1.0
    assert verify.matches(r"\d+")({}, "7 ") == 0.0
    reward = verify.tagged("think", "answer")
    good = "<think>\na\n</think>\n<answer>7</answer>\n"
    assert reward({}, good) == 1.0
    for bad in (
        good + "more",
        "first " + good,
        good.replace("</think>\n", "</think> then "),
        good.replace("</answer>", ""),
        good + "<think>",
        "<answer>7</answer><think>a</think>",
        "<think>a<answer>7</think></answer>",
        "",
    ):
        assert reward({}, bad) == 0.0, bad


def test_words():
    share = verify.word_share(["happy", "Don't"])
    assert share({}, "Happy, HAPPY! unhappy don't") == 0.75
    assert share({}, "...") == 0.0
    assert verify.contains(["cat", "dog"])({}, "A dog.") == 1.0
    assert verify.contains(["cat", "dog"], every=True)({}, "A dog.") == 0.0
    assert verify.contains(["cat"])({}, "concatenate") == 0.0
    with pytest.raises(ValueError, match="'ice cream' is not one word"):
        verify.word_share(["ice cream"])
    with pytest.raises(ValueError, match="words is the text 'cat'"):
        verify.contains("cat")


def test_rewards_that_would_say_nothing_are_refused_when_they_are_made():
    for make, message in (
        (lambda: verify.matches("("), r"pattern is '\(', no regular expression"),
        (lambda: verify.matches("a{99999999999}"), "pattern is 'a{9+}', no regular"),
        (lambda: verify.tagged(), r"names is \(\)"),
        (lambda: verify.tagged("a", "a"), "none twice"),
        (lambda: verify.tagged("<a>"), "'<a>' is no name of a tag"),
        (lambda: verify.tagged(""), "'' is no name of a tag"),
        (lambda: verify.contains([]), "words is empty"),
        (lambda: verify.weighted((float("nan"), verify.exact())), "a weight is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    one = parts.reward_fn(RewardSettings(name="tagged", options=dict(names="think")))
    assert one({}, "<think>a</think>") == 1.0 and one({}, "<t>a</t>") == 0.0


def test_length_penalty_by_hand():
    penalty = verify.length_penalty(soft=4, hard=8)
    assert [penalty({}, "x" * n) for n in (0, 4, 5, 6, 8, 50)] == [0, 0, -0.25, -0.5, -1, -1]
    assert verify.length_penalty(soft=1, hard=3, unit="words")({}, "two words") == -0.5
    with pytest.raises(ValueError, match="soft is 8 and hard 8"):
        verify.length_penalty(soft=8, hard=8)


def test_weighted_is_the_weighted_sum():
    reward = verify.weighted(
        (2.0, verify.exact()), (0.5, verify.length_penalty(soft=0, hard=4)), (1, toys.digit_share)
    )
    assert reward({"answer": "12", "truth": "13"}, "12") == 2.0 - 0.25 + 0.5


def batch_of(tokenizer, responses, examples, prompt="1>"):
    """Rows as a generate call writes them: prompt, response, padding."""
    width = 48
    tokens = np.zeros((len(responses), width), np.int32)
    mask = np.zeros((len(responses), width), np.float32)
    for row, ids in enumerate(responses):
        shown = tokenizer.encode(prompt)
        tokens[row, : len(shown) + len(ids)] = shown + ids
        mask[row, len(shown) : len(shown) + len(ids)] = 1
    return {"tokens": tokens, "mask": mask, "example": np.array(examples, np.int32)}


def test_host_reward_decodes_what_the_policy_chose():
    tokenizer = CharTokenizer(toys.ALPHABET)
    source = toys.prompts(toys.reverse_digits(train=8))
    right = tokenizer.encode(source[5]["truth"])
    heard = []

    def reward(example, response):
        heard.append(response)
        return toys.gold(example, response)

    call = verify.host_reward(reward, source, tokenizer)
    responses = [[*right, tokenizer.eos], right, right[:-1], [tokenizer.eos], right]
    batch = batch_of(tokenizer, responses, [5, 5, 5, 5, -1])
    out = call(batch, None)
    np.testing.assert_array_equal(out["score"], np.array([1, 1, 0, 0, 0], np.float32))
    truth = source[5]["truth"]
    assert heard == [truth, truth, truth[:-1], ""]
    glossary.check("rew", {**out, "tokens": batch["tokens"]})
    greedy = verify.host_reward(reward, source, tokenizer, prefix="greedy_", writes="baseline")
    renamed = greedy({f"greedy_{k}": v for k, v in batch.items()}, None)
    np.testing.assert_array_equal(renamed["baseline"], out["score"])


def test_a_failing_reward_names_example_and_response():
    tokenizer = CharTokenizer(toys.ALPHABET)
    batch = batch_of(tokenizer, [tokenizer.encode("42")], [1])
    fails = verify.host_reward(lambda e, r: e["none"], [{}, {}], tokenizer)
    with pytest.raises(ValueError, match=r"reward of example 1 for the response '42' raised Key"):
        fails(batch, None)
    infinite = verify.host_reward(lambda e, r: float("nan"), [{}, {}], tokenizer)
    with pytest.raises(ValueError, match="'42' is nan, not a finite number"):
        infinite(batch, None)


def test_a_reward_that_float32_cannot_hold_is_refused_by_name():
    tokenizer = CharTokenizer(toys.ALPHABET)
    batch = batch_of(tokenizer, [tokenizer.encode("42")], [0])
    for value in (1e39, -1e39, float("inf"), 10**400):

        def huge(example, response, value=value):
            return value

        with pytest.raises(ValueError, match=r"the reward 'huge' of example 0 for .*'42'"):
            verify.host_reward(huge, [{}], tokenizer)(batch)
    largest = float(np.finfo(np.float32).max)
    kept = verify.host_reward(lambda e, r: largest, [{}], tokenizer)(batch)["score"]
    assert kept[0] == largest
    with pytest.raises(ValueError, match="but float32 ends at"):
        verify.score(lambda e, r: 1e39, {}, "example 0", "")


def test_tags_that_are_special_tokens_reach_the_reward(tmp_path):
    tokenizer = tagged_tokenizer(tmp_path)
    form = verify.tagged("think", "answer")
    call = verify.host_reward(form, [{}], tokenizer)
    good = tokenizer.encode("<think>a</think><answer>5</answer>")
    for ids, score in (
        ([*good, tokenizer.eos], 1),
        (good, 1),
        ([tokenizer.eos, *good, tokenizer.eos], 0),
        ([*good[:-2], tokenizer.eos, *good[-2:]], 1),
        (good[:-1], 0),
    ):
        assert call(batch_of(tokenizer, [ids], [0], prompt="1"))["score"][0] == score
    assert verify.numeric()({"answer": "57"}, said(tokenizer, good)) == 0


def tagged_tokenizer(directory):
    """A tokenizer of bytes whose special tokens are the end and the tags of R1's format."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(letters)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["</s>", "<think>", "</think>", "<answer>", "</answer>"])
    inner.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return load_tokenizer(directory)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data that lies beside the repository")
def test_every_real_solution_answers_itself():
    reward = verify.numeric()
    for split in ("test", "train"):
        for example in source_files.jsonl(SHARED / f"gsm8k/{split}.jsonl"):
            final = example["answer"].rpartition("####")[2].strip()
            assert reward(example, example["answer"]) == 1.0
            assert reward(example, rf"so it is \boxed{{{final}}}.") == 1.0
            assert reward(example, f"The answer is ${final}.") == 1.0
            assert reward(example, f"{final}1") == 0.0
