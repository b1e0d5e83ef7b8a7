"""Needles by depth and length, and loss by position."""

import jax
import jax.numpy as jnp
import launch
import numpy as np
import pytest

from jaxrl_eff import checkpoints, models
from jaxrl_eff.cli import needle
from jaxrl_eff.cli.pages import needle_page
from jaxrl_eff.data import needles
from jaxrl_eff.data.tokenizer import CharTokenizer
from jaxrl_eff.models import LMConfig, heads

TOKENIZER = CharTokenizer(needles.ALPHABET)
LM = LMConfig(
    vocab=TOKENIZER.vocab, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=16, unroll=1,
    init_std=0.5, bos=1, eos=(2,), pad=0, max_length=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return models.init(LM, jax.random.key(0))


def test_rows_hide_a_digit_where_they_say():
    source = needles.examples(40, shortest=8, longest=64, long_share=0.5)
    lengths = set()
    for i in range(len(source)):
        e = source[i]
        lengths.add(e["length"])
        assert len(e["prompt"]) == e["length"] and e["prompt"].endswith("?")
        at = e["prompt"].index("=")
        assert e["prompt"][at + 1] == e["truth"] and at == round(e["depth"] * (e["length"] - 3))
    assert min(lengths) < 16 and max(lengths) > 32
    assert source[3] == needles.examples(40, shortest=8, longest=64, long_share=0.5)[3]
    other = needles.examples(40, split="held_out", shortest=8, longest=64, long_share=0.5)
    assert other[3] != source[3]
    with pytest.raises(ValueError, match="shortest is 9, longest 8"):
        needles.examples(1, shortest=9, longest=8)


def test_a_needle_is_found_if_greedy_words_are_the_answer(params):
    all_cases = needle.cases(TOKENIZER, [12, 20], depths=3, samples=6, text="", seed=0)
    assert {(c.length, c.depth) for c in all_cases} == {
        (n, d) for n in (12, 20) for d in (0, 0.5, 1)
    }
    said, asked = [], []
    for i, case in enumerate(all_cases):
        assert len(case.tokens) == case.length and case.answer == 1
        row = jnp.asarray([case.tokens[:-1]], jnp.int32)
        at = jnp.arange(row.shape[1], dtype=jnp.int32)[None]
        hidden, _ = models.apply(LM, params, row, at, jnp.ones_like(row))
        best = int(models.unembed(LM, params, hidden[0, -1]).argmax())
        answer = best if i % 3 else (best + 1) % LM.vocab
        asked.append(case._replace(tokens=[*case.tokens[:-1], answer]))
        said.append(answer == best)
    assert [needle.found(LM, params, c) for c in asked] == said
    share = needle.grid(LM, params, asked)
    assert sum(share.values()) * 6 == pytest.approx(sum(said))
    drawn = needle_page.page("a", share, [(1.0, 2.0), (5.0, 1.0)])
    assert drawn.count("<rect") >= 6 and "Loss by position" in drawn


@pytest.mark.parametrize("whole", [2048, 8])
def test_loss_by_position_is_that_of_the_tokens(params, whole, monkeypatch):
    monkeypatch.setattr(needle, "_WHOLE", whole)
    needle._read.clear_cache()
    ids = np.random.default_rng(0).integers(0, LM.vocab, 130)
    got = needle.by_position(LM, params, ids.tolist(), 32)
    rows = jnp.asarray(ids[:128].reshape(4, 32), jnp.int32)
    at = jnp.tile(jnp.arange(32, dtype=jnp.int32)[None], (4, 1))
    logp, _ = heads.token_logprobs(LM, params, rows, at, jnp.ones_like(rows))
    loss = -np.asarray(logp).mean(0)
    assert [at for at, _ in got][:3] == [1.5, 2.5, 3.5]
    np.testing.assert_allclose([v for _, v in got][:3], loss[1:4], rtol=1e-5)
    with pytest.raises(ValueError, match="has 130 tokens; the longest of --lengths is 256"):
        needle.by_position(LM, params, ids.tolist(), 256)


def test_the_command_measures_and_draws(params, tmp_path, capsys):
    checkpoints.save_hf(tmp_path / "m", LM, params, tokenizer_from=TOKENIZER)
    page = tmp_path / "page.html"
    call = (f"--model={tmp_path / 'm'}", "--lengths=10,16", "--depths=2", "--samples=2")
    code, out, err = launch.called(needle.main, capsys, *call, f"--page={page}")
    assert code == 0 and "written" in out and page.read_text().count("<svg") == 1 and not err
    for bad, message in (
        ("--lengths=a", "--lengths: 'a' should be numbers separated by commas"),
        ("--lengths=4", "--lengths has 4; a needle needs 6 or more"),
        ("--depths=0", "--depths: is 0, but must be at least 1"),
        (f"--model={tmp_path}", "neither a config.json nor an export/"),
    ):
        code, _, err = launch.called(needle.main, capsys, *call, bad)
        assert code == 2 and message in " ".join(err.split())
