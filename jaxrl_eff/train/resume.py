"""The position at which a run resumes: that of its newest checkpoint, if it has one.

Accepted changes of a config can make that position invalid: a stage was removed, fewer steps are
configured than were taken, arrays have other shapes. Such a run is rejected, since starting from
the beginning would overwrite trained models.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxrl_eff.parallel import Route
from jaxrl_eff.train import state


@dataclasses.dataclass
class Position:
    """The current position of a run; mutable.

    Attributes:
        index: of the stage.
        step: steps taken in this stage.
        offset: steps of all earlier stages.
        results: "stage/eval" and "stage/eval_before" -> mean held-out reward.
        evaluated: True if `results` has the evaluation due after `step`, if any.
        withheld: "stage/call" -> number of steps whose update was skipped as non-finite.
        counts: finished stage -> counts of its examples, see `progress.COUNTED`.
    """

    index: int = 0
    step: int = 0
    offset: int = 0
    results: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluated: bool = True
    withheld: dict[str, int] = dataclasses.field(default_factory=dict)
    counts: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


def place(stages: Sequence[Any], record: dict[str, Any]) -> tuple[int, int]:
    """Returns the index of a record's stage in a run, and the steps of all stages before it.

    Raises:
        ValueError: the run has no such stage, or it has fewer steps than were taken.
    """
    names, (name, step) = [s.name for s in stages], (record["stage"], record["step"])
    if name not in names:
        raise ValueError(
            f"the run of the workdir is in stage {name!r}, but config.stages is {tuple(names)}; "
            "name it there, or give this run its own --workdir."
        )
    index = names.index(name)
    if step > (steps := stages[index].settings.steps):
        raise ValueError(
            f"config.{name}.steps is {steps}, but the run of the workdir has taken {step} steps of "
            "that stage; it cannot be less."
        )
    return index, sum(s.settings.steps for s in stages[:index])


def restored(assembled: Any, out: Any) -> tuple[state.Models | None, state.Shelf, Position]:
    """Returns models, shelf and position of the newest good checkpoint; no models without one.

    Raises:
        ValueError: a checkpoint of this run is intact but does not fit the config: see `place`, or
            steps of earlier stages or arrays differ.
    """
    stages, checkpoints = assembled.stages, out.checkpoints

    def saved(record: dict[str, Any]) -> Any:
        return state.shared_layout(state.abstract(assembled, place(stages, record)[0]))

    found = checkpoints.restore(saved, partial=True)
    if checkpoints.unfit:
        raise ValueError(
            f"{checkpoints.unfit[0]} To start from another would overwrite it: undo what changed, "
            "give this run its own --workdir, or remove that checkpoint."
        )
    for message in checkpoints.messages:
        out.console.warn(message)
    if found is None:
        return None, {}, Position()
    record = found.record
    index, offset = place(stages, record)
    if found.step != offset + record["step"]:
        raise ValueError(
            f"the run of the workdir took {found.step - record['step']} steps before stage "
            f"{record['stage']!r}, but by config.STAGE.steps it would be {offset}; steps of stages "
            "that are done cannot change."
        )
    home = Route(found.state, state.abstract(assembled, index), donate=True)(found.state)
    at = Position(
        index=index,
        step=record["step"],
        offset=offset,
        results=dict(record["results"]),
        evaluated=record["evaluated"],
        withheld=dict(record["withheld"]),
        counts=dict(record["counts"]),
    )
    _restore_data(stages[index], record["data"], out)
    out.console.line(f"resumed at stage {record['stage']}, step {record['step']}")
    return home["models"], home["shelf"], at


def _restore_data(stage: Any, position: dict[str, Any], out: Any) -> None:
    """Restores a stage's data position; after accepted changes, restarts the data if needed.

    Raises:
        ValueError: the position does not fit the data, and no change was accepted.
    """
    try:
        stage.loader.restore(position)
    except ValueError as error:
        if not out.changed:
            raise ValueError(f"config.{stage.name}.data: {error}") from None
        out.console.warn(f"{stage.name}: the data are read from their beginning again: {error}")


def written(record: dict[str, Any] | None, stages: Sequence[Any]) -> dict[str, Any]:
    """Returns arguments for `writer.Writer` to keep the lines up to this record's checkpoint.

    Raises:
        ValueError: see `place`.
    """
    if record is None:
        return {"resume_step": 0, "resume_stage": "", "evaluated": True}
    offset = place(stages, record)[1]
    return {
        "resume_step": offset + record["step"],
        "resume_stage": record["stage"],
        "evaluated": record["evaluated"],
    }
