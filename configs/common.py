"""What configs share: reading the argument after the colon, and small tables."""

from typing import Any


def parse_arg(arg: str | None, **defaults: Any) -> dict[str, Any]:
    """`"model=DIR,steps=5,fast"` -> a dict with the types of the defaults.

    A name without "=" is a switch. Raises ValueError for a name without a default.
    """
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        name, given, value = part.partition("=")
        if name not in defaults:
            raise ValueError(f"unknown argument {name!r}; expected one of {sorted(defaults)}.")
        kind = type(defaults[name])
        if not given and kind is not bool:
            raise ValueError(f"the argument {name!r} needs a value: {name}=...")
        try:
            values[name] = (
                value.lower() not in ("0", "false", "no") if kind is bool else kind(value)
            )
        except ValueError:
            raise ValueError(f"{name}={value!r} is not {kind.__name__}.") from None
    return values


def tiny_model() -> dict[str, Any]:
    """A character-level Llama of 186k parameters that learns the digit toys on a CPU."""
    return dict(
        shape=dict(
            layers=3,
            width=64,
            heads=4,
            kv_heads=2,
            head_dim=16,
            ffn=256,
            tie=True,
            max_length=32,
        ),
    )


def digits(**options: Any) -> dict[str, Any]:
    """Three digits to write backwards: 800 numbers to train on, 200 held out."""
    return dict(
        source="reverse",
        length=72,
        prompt_length=5,
        options=dict(digits=3, train=800, held_out=200, **options),
    )


def digits_accuracy() -> dict[str, Any]:
    """Share of right answers to held-out numbers, sampled as the policy would answer."""
    return dict(problems=200, max_tokens=5, temperature=1.0, reward=dict(name="gold"))


def digits_sft(**changes: Any) -> dict[str, Any]:
    """Supervised learning of the digits; half of its labels are wrong, so RL has work left."""
    stage = dict(
        algorithm="sft",
        steps=150,
        batch=24,
        data=dict(digits(wrong=0.5), format="completion"),
        optim=dict(actor=dict(lr=3e-3, schedule="cosine", warmup=10)),
        evaluate=digits_accuracy(),
    )
    return stage | changes


def digits_rl(algorithm: str, **changes: Any) -> dict[str, Any]:
    """Reinforcement learning on the digits with a reward for every right position."""
    stage = dict(
        algorithm=algorithm,
        steps=60,
        batch=32,
        data=dict(digits(), format="prompt"),
        models=dict(actor="sft"),
        optim=dict(actor=dict(lr=1e-3, warmup=3)),
        sampling=dict(max_tokens=5, samples=8),
        reward=dict(name="digit_share"),
        evaluate=digits_accuracy(),
        samples_every=20,
    )
    return stage | changes


def digits_run(*stages: str) -> Any:
    """The frame of a run on the digits; the caller adds the stages' sections."""
    from ml_collections import ConfigDict

    c = ConfigDict()
    c.seed = 0
    c.tokenizer = "chars:0123456789>"
    c.model = tiny_model()
    c.stages = stages
    return c
