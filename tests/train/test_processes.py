"""Several processes compute what one computes; only the first one speaks."""

import re
import signal
import socket
import time

import launch
import numpy as np
import pytest
from launch import cache  # noqa: F401 (fixture)

# What Gloo prints of every rank, in pieces: its threads may write between each other's.
GLOO = re.compile(
    r"\[Gloo\] Rank | is connected to | peer ranks\. "
    r"|Expected number of connected peer ranks is : |\d+"
)
LOSSES = ("actor_train/loss", "actor_train/grad_norm", "advantage/score")


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def together(cache, *arguments, processes=2, timeout=300, kill="", victim=0, own=()):  # noqa: F811
    """Output, errors and exit code of every process of one run.

    `kill` is of the victim; `own` are further arguments of each process.
    """
    port, started = free_port(), []
    try:
        for i in range(processes):
            mine = (f"--coordinator=localhost:{port}", f"--processes={processes}", f"--process={i}")
            mine = (*mine, "--wait=240", *(own[i] if own else ()))  # tests share their cores
            how = {"kill": kill if i == victim else ""}
            started.append(launch.start([*arguments, *mine], cache, **how))
        return [(*p.communicate(timeout=timeout), p.returncode) for p in started]
    finally:
        for p in started:
            p.kill()


def alone(cache, spec, workdir):  # noqa: F811
    code, out, err = launch.command(
        f"--config={spec},devices=8", f"--workdir={workdir}", cache=cache
    )
    assert code == 0, out + err


SFT = f"{launch.TINY}:algorithm=sft,first=8,every=1,steps=6"
GRPO = f"{launch.TINY}:algorithm=grpo,first=8,every=1,steps=2,evaluate=True"
SPLIT = f"{launch.TINY}:algorithm=grpo,steps=2,every=1,evaluate=True"


@pytest.mark.parametrize("plan", ["across", pytest.param("apart", marks=pytest.mark.slow)])
def test_a_plan_may_split_the_processes(plan, cache, tmp_path, grpo):  # noqa: F811
    """Sampling on two devices of each process, training on the others; or on a process each.

    Weights go as changes, and held-out problems are sampled where the training problems are.
    """
    spec = (f"--config={SPLIT},devices=4,plan={plan}", "--config.grpo.sync.name=changes")
    done = together(cache, *spec, f"--workdir={tmp_path}")
    for out, err, code in done:
        assert code == 0, out + err
    assert not GLOO.sub("", done[1][0]).strip() and "PASS" in done[0][0]
    assert "8 x cpu, 2 processes" in done[0][0]
    check_equal(tmp_path, grpo)
    results = [launch.document(d, "result")["results"] for d in (tmp_path, grpo)]
    assert results[0] == results[1] and len(results[0]) == 2


# The reference on the second process alone, training over both, sampling on half of each.
MESHES = (
    "{'default': {'devices': [0, 1, 4, 5], 'seq': 2}, "
    "'ref_inf': {'devices': [4, 5, 6, 7], 'seq': 2}, "
    "'actor_train': {'devices': [0, 1, 2, 3, 4, 5, 6, 7], 'seq': 2}}"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "room"),
    [(MESHES, 8), (MESHES, 0), ("apart", 8), ("{'default': {'seq': 2}}", 8)],
    ids=["meshes", "room", "apart", "one mesh"],
)
def test_sampled_rows_are_packed_on_two_processes(plan, room, cache, tmp_path, grpo):  # noqa: F811
    schedule = f"--config.grpo.schedule={{'name': 'skrull', 'room': {room}, 'shapes': 2}}"
    config, spec = f"--config={SPLIT},devices=4", (schedule,)
    if plan == "apart":
        config += ",plan=apart"
    else:
        spec += (f"--config.grpo.plan={plan}",)
    done = together(cache, config, *spec, f"--workdir={tmp_path}")
    for out, err, code in done:
        assert code == 0, out + err
    for _, _, values in launch.numbers(tmp_path):
        if "actor_train/loss" in values:  # the first process knows what is computed on it
            assert ("schedule/padding" in values) == (plan != "apart")
            assert ("schedule/measured_seconds" in values) == (plan != "apart")
    check_equal(tmp_path, grpo)
    results = [launch.document(d, "result")["results"] for d in (tmp_path, grpo)]
    assert results[0] == results[1] and len(results[0]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("plan", ["apart", "across", "overlap", "small"])
@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "remax"])
def test_every_split_gives_the_same_parameters(algorithm, plan, processes, cache, tmp_path):  # noqa: F811
    spec = f"{launch.TINY}:algorithm={algorithm},optim=sgd,steps=2"
    one = tmp_path / "one"
    alone(cache, f"{spec},first=1", one)
    spread = f"{spec},plan={plan},devices={8 // processes}"
    done = together(
        cache, f"--config={spread}", f"--workdir={tmp_path / 'many'}", processes=processes
    )
    for out, err, code in done:
        assert code == 0, out + err
    a, b = (launch.tensors(d) for d in (tmp_path / "many", one))
    for name in b:
        assert np.linalg.norm(a[name] - b[name]) <= 1e-6 * np.linalg.norm(b[name]), name


@pytest.fixture(scope="module")
def sft(cache, tmp_path_factory):  # noqa: F811
    workdir = tmp_path_factory.mktemp("sft")
    alone(cache, SFT, workdir)
    return workdir


@pytest.fixture(scope="module")
def grpo(cache, tmp_path_factory):  # noqa: F811
    workdir = tmp_path_factory.mktemp("grpo")
    alone(cache, GRPO, workdir)
    return workdir


def check_equal(two, one):
    ours, theirs = launch.numbers(two), launch.numbers(one)
    assert [r[:2] for r in ours] == [r[:2] for r in theirs]
    for (_, _, a), (_, _, b) in zip(ours, theirs, strict=True):
        told = {k for k in a if "/sync_" not in k and not k.startswith("schedule/")}
        assert told == b.keys()
        for name in LOSSES:
            if name in b:
                np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-6, err_msg=name)
    a, b = (launch.tensors(d) for d in (two, one))
    for name in b:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [SFT, GRPO], ids=["sft", "grpo"])
def test_two_processes_of_four_devices_equal_one_of_eight(spec, cache, tmp_path, request):  # noqa: F811
    one = request.getfixturevalue("sft" if spec == SFT else "grpo")
    done = together(cache, f"--config={spec},devices=4", f"--workdir={tmp_path}")
    for out, err, code in done:
        assert code == 0, out + err
    check_equal(tmp_path, one)
    assert not GLOO.sub("", done[1][0]).strip() and "PASS" in done[0][0]
    assert "8 x cpu, 2 processes" in done[0][0]


@pytest.mark.slow
def test_asked_to_stop_two_processes_agree_and_one_may_continue(cache, sft, tmp_path):  # noqa: F811
    moment = "jaxrl_eff.train.writer:Writer.step:after:step=1:TERM"
    spec = (f"--config={SFT},devices=4", f"--workdir={tmp_path}")
    done = together(cache, *spec, kill=moment)
    for out, err, code in done:
        assert code == 0, out + err
    assert "the same command continues" in done[0][0]
    assert 1 < len(launch.numbers(tmp_path)) < 6
    alone(cache, SFT, tmp_path)
    check_equal(tmp_path, sft)


@pytest.mark.slow
def test_asked_in_a_later_stage_two_processes_stop_at_the_same_step(cache, tmp_path):  # noqa: F811
    """Steps begin anew with every stage, what the processes agree on does not."""
    config = f"--config={launch.TINY}:algorithm=three,steps=3,every=1,first=4,devices=2"
    moment = "jaxrl_eff.train.writer:Writer.step:after:step=4:TERM"
    done = together(cache, config, f"--workdir={tmp_path}", kill=moment, timeout=900)
    for out, err, code in done:
        assert code == 0, out + err
    assert re.search(r"stopped at stage rm, step \d of 3; the same command continues", done[0][0])
    done = together(cache, config, f"--workdir={tmp_path}", timeout=900)
    for out, err, code in done:
        assert code == 0, out + err
    assert [step for step, _, values in launch.numbers(tmp_path) if len(values) > 1] == [
        *range(1, 10)
    ]


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_other_and_one_may_continue(victim, cache, sft, tmp_path):  # noqa: F811
    moment = "jaxrl_eff.checkpoints.run:Checkpoints.save:after:3:KILL"
    spec = (f"--config={SFT},devices=4", f"--workdir={tmp_path}")
    done = together(cache, *spec, kill=moment, victim=victim)
    out, err, code = done[1 - victim]
    assert done[victim][2] == -signal.SIGKILL and code == 2, out + err
    lines = [line for line in err.splitlines() if line.strip()]
    assert lines[-1] == f"error: process {victim} ended without a word"
    if victim:  # without process 0 JAX's client says more
        assert [line for line in lines if "rror" in line] == lines[-1:]
    else:
        alone(cache, SFT, tmp_path)
        check_equal(tmp_path, sft)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            [["--config.sft.optim.actor.lr=0.5"], []],
            "config.sft.optim.actor.lr is 0.5 on process 0 and 0.003 on process 1",
        ),
        (
            [[], ["--accept_changes"]],
            "--accept_changes is False on process 0 and True on process 1",
        ),
    ],
)
def test_processes_that_were_started_otherwise_stop_before_anything_is_written(
    own,
    message,
    cache,  # noqa: F811
    tmp_path,
):
    workdir = tmp_path / "run"
    done = together(cache, f"--config={SFT},devices=4", f"--workdir={workdir}", own=own)
    said = f"error: the processes of this run differ: {message}."
    assert [(err.strip(), code) for _, err, code in done] == [(said, 2)] * 2
    assert not workdir.exists()


@pytest.mark.slow
def test_a_process_that_dies_during_assembly_ends_the_other(cache, tmp_path):  # noqa: F811
    moment = "jaxrl_eff.train.identity:identify:before:1:KILL"
    spec = (f"--config={SFT},devices=4", f"--workdir={tmp_path}")
    out, err, code = together(cache, *spec, kill=moment, victim=1)[0]
    assert code == 2 and "error: process 1 ended without a word" in err, out + err


def test_nobody_at_the_coordinator_s_address_is_told_in_time(cache, tmp_path):  # noqa: F811
    began = time.monotonic()
    spec = (f"--config={launch.TINY}", f"--workdir={tmp_path}", "--processes=2", "--wait=3")
    at = f"--coordinator=localhost:{free_port()}"
    code, out, err = launch.command(*spec, at, "--process=1", cache=cache)
    assert code == 2 and time.monotonic() - began < 60, out + err
    waiting, error = err.strip().splitlines()
    assert waiting == f"waiting for {at}, up to 3 s"
    assert error.startswith(f"error: no answer from {at} after 3 s: Connection refused")


SCHEDULED = "{'name': 'skrull', 'shapes': 2, 'room': 0}"


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["sft", "dpo", "rm"])
def test_schedules_of_two_processes_are_one(algorithm, cache, tmp_path):  # noqa: F811
    """Each measures its own times and rates; the first one's count, and the model is the same."""
    spec = f"{launch.TINY}:algorithm={algorithm},first=8,steps=6,every=3"
    changes = [f"--config.{algorithm}.schedule={SCHEDULED}"]
    changes.append(f"--config.{algorithm}.plan={{'default': {{'seq': 2}}}}")
    done = together(cache, f"--config={spec},devices=4", *changes, f"--workdir={tmp_path / 'two'}")
    for out, err, code in done:
        assert code == 0, out + err
    one = tmp_path / "one"
    code, out, err = launch.command(
        f"--config={spec},devices=8", *changes, f"--workdir={one}", cache=cache
    )
    assert code == 0, out + err
    a, b = (launch.tensors(d) for d in (tmp_path / "two", one))
    for name in b:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_processes_may_share_rows(cache, tmp_path, sft):  # noqa: F811
    """One device each and tensor=2 over both: each process brings whole batches."""
    shared = "--config.sft.plan={'default': {'tensor': 2}}"
    done = together(cache, f"--config={SFT},devices=1", shared, f"--workdir={tmp_path}")
    for out, err, code in done:
        assert code == 0, out + err
    check_equal(tmp_path, sft)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes=2"], "belong together; no ['--coordinator', '--process']"),
        (["--coordinator=localhost:1", "--processes=2", "--process=2"], "--process=2 is not below"),
        (["--coordinator=here", "--processes=2", "--process=1"], "here is not host:port"),
    ],
)
def test_flags_that_do_not_fit_are_named(flags, message, cache, tmp_path):  # noqa: F811
    run = f"--config={launch.TINY}"
    code, out, err = launch.command(run, f"--workdir={tmp_path}", *flags, cache=cache)
    assert code == 2 and message in err and "Traceback" not in out + err
