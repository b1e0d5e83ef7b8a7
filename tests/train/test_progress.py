"""Figures of a step count what was computed; numbers that are not finite are told truthfully."""

import types

import launch
import numpy as np
import pytest

from jaxrl_eff.models import params
from jaxrl_eff.train import assembly, progress


class Outlets:
    """Collects warnings."""

    def __init__(self):
        self.said = []
        self.console = types.SimpleNamespace(warn=self.said.append)


def log(algorithm, *changes, nonfinite="stop"):
    stage = assembly.assemble(launch.config(f"algorithm={algorithm}", *changes)).stages[0]
    out = Outlets()
    return progress.StepLog(stage, out, 0, nonfinite, None), stage, out


def figures(of, stage, lengths, values):
    done = types.SimpleNamespace(lengths=np.array(lengths))
    volumes = of._volumes(done, values)
    return volumes, progress._tokens(stage, volumes), of._flops(volumes)


def test_lengths_of_packed_rows():
    rows = {"segment": np.array([[1, 1, 1, 2, 0], [1, 2, 2, 3, 3], [0, 0, 0, 0, 0]])}
    assert sorted(progress.lengths(rows)) == [1, 1, 2, 2, 3]
    prompts = {"prompt_length": np.array([3, 4], np.int32)}
    assert list(progress.lengths(prompts)) == [3, 4]


def test_useful_work_is_that_of_documents_not_of_rows():
    of, stage, _ = log("sft")
    _, tokens, flops = figures(of, stage, [6, 2], {})
    lm = stage.lms["actor"]
    # Token i of a document sees i keys: in all 6 * 6 / 2 + 2 * 2 / 2, half a key less a token.
    by_hand = 3 * 8 * params.flops_per_token(lm, (36 + 4) / 2 / 8)
    assert tokens == 8 and flops == pytest.approx(by_hand)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo", "remax", "raft"])
def test_what_was_sampled_is_counted(algorithm):
    of, stage, _ = log(algorithm)
    metric = "best_of/length" if algorithm == "raft" else "advantage/length"
    samples = stage.sampling.samples
    volumes, tokens, _ = figures(of, stage, [3, 5], {metric: 4.0, "best_of/kept": 0.5})
    greedy = 16 if algorithm == "remax" else 0
    assert tokens == samples * (3 + 5 + 2 * 4) + greedy
    assert volumes["actor_gen"].tokens == samples * 16
    if algorithm == "raft":  # one winner for every other prompt
        assert volumes["actor_train"].tokens == 0.5 * 16
    else:
        assert volumes["actor_train"].tokens == samples * 16


def test_an_update_that_was_made_is_not_called_withheld():
    of, _, _ = log("sft")
    with pytest.raises(progress.NonFinite, match=r"score of advantage is inf .* was made"):
        of._check(1, {"actor_train/finite": 1.0, "advantage/score": float("inf")})
    with pytest.raises(
        progress.NonFinite, match=r"grad_norm of actor_train is nan .* was withheld"
    ):
        of._check(1, {"actor_train/finite": 0.0})
    assert of.withheld == {"actor_train": 1}


def test_a_figure_of_the_schedule_stops_nothing():
    of, _, out = log("sft")
    of._check(1, {"actor_train/finite": 1.0, "schedule/balance": float("nan")})
    assert out.said == ["schedule/balance is nan at step 1; no update depends on it"]


def test_steps_that_were_withheld_before_are_remembered():
    _, stage, out = log("sft")
    of = progress.StepLog(stage, out, 0, "skip", None, withheld={"actor_train": 3})
    of._check(4, {"actor_train/finite": 0.0})
    assert of.withheld == {"actor_train": 4} and "skipped" in out.said[0]
