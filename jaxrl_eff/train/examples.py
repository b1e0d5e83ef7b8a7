"""Examples of a config's data section, and the functions that tokenize them."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxrl_eff.data import borders, encode, fates, needles, source_files, sources, toys
from jaxrl_eff.data.tokenizer import Tokenizer
from jaxrl_eff.train.settings import DataSettings, StageSettings

_BORDERS = 16  # examples whose prompts are compared with the training text

# Format -> kind of batch, and encoder. Chat formats write their own special tokens.
FORMATS: dict[str, tuple[str, Callable]] = {
    "text": ("sft", encode.encode_text),
    "completion": ("sft", encode.encode_prompt_completion),
    "messages": ("sft", encode.encode_messages),
    "preference": ("preference", encode.encode_preference),
    "prompt": ("prompts", encode.encode_prompt),
    "chat_prompt": ("prompts", encode.encode_chat_prompt),
}


def check(what: str, fn: Callable, source: Any) -> None:
    """Applies a function to the first example, to detect early that it always fails."""
    if not len(source):
        name = getattr(source, "name", "the source")
        raise ValueError(f"{what}: there are no examples in {name}.")
    _try(what, fn, source, 0)


def try_all(what: str, fn: Callable, source: Any, seconds: float = math.inf) -> tuple[str, ...]:
    """Applies a function to every example, to detect early those for which it fails.

    Args:
        what: description of the function.
        seconds: time limit; the remaining examples are not tried.

    Returns:
        A note with the number of examples tried, if some were not.

    Raises:
        ValueError: there are no examples, or the function raised for one; the message names it.
    """
    check(what, fn, source)
    until = time.monotonic() + seconds
    for i in range(1, len(source)):
        if time.monotonic() > until:
            return (f"{what} was tried on {i:,} of {len(source):,} examples, in {seconds:g} s",)
        _try(what, fn, source, i)
    return ()


def _try(what: str, fn: Callable, source: Any, i: int) -> None:
    try:
        fn(source[i])
    except Exception as error:
        raise ValueError(f"{what} fails for {sources.error_message(source, i, error)}") from None


def source(data: DataSettings, seed: int) -> tuple[Any, Any]:
    """Returns training and held-out examples."""
    if data.source == "needles":
        return _needles(data)
    if data.source in toys.TASKS:
        for field, unused in (("path", ""), ("held_out", 0), ("template", "{prompt}")):
            if getattr(data, field) != unused:
                raise ValueError(
                    f"data.{field} is {getattr(data, field)!r}, but the toy {data.source!r} makes "
                    "its own examples; see data.options."
                )
        options = dict(data.options)
        wrong = {k: options.pop(k) for k in ("wrong",) if k in options}
        keep_length = {k: options.pop(k) for k in ("keep_length",) if k in options}
        known = ("digits", "train", "held_out", "seed")
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(
                f"data.options: unknown field {unknown[0]!r}; expected one of "
                f"{[*known, 'wrong', 'keep_length']}."
            )
        _check_types("data.options", options, int)
        _check_types("data.options", wrong, float, int)
        for given, reader in ((wrong, "completion"), (keep_length, "preference")):
            if given and data.format != reader:
                raise ValueError(
                    f"data.options has {given}, which only the format {reader!r} reads; it is "
                    f"{data.format!r}."
                )
        _check_types("data.options", keep_length, bool)
        make = {"reverse": toys.reverse_digits, "sort": toys.sort_digits}[data.source]
        task = make(**options)
        held_out = toys.prompts(task, "held_out")
        if data.format == "preference":
            return toys.preferences(task, seed=seed, **keep_length), held_out
        if data.format == "completion":
            return toys.completions(task, seed=seed, **wrong), held_out
        return toys.prompts(task), held_out
    if data.source == "inline":
        given = data.options.get("examples", ())
        if set(data.options) - {"examples"} or not all(isinstance(e, dict) for e in given):
            raise ValueError("data.options of an inline source is examples, a tuple of dicts.")
        return _parted(templated(sources.python_source(list(given)), data), data, seed)
    readers = {"jsonl": source_files.jsonl, "parquet": source_files.parquet}
    if data.source not in readers:
        raise ValueError(
            f"unknown data.source {data.source!r}; expected one of "
            f"{[*readers, 'inline', 'needles', *toys.TASKS]}."
        )
    if not data.path:
        raise ValueError(f"data.path is empty; {data.source} needs a file.")
    return _parted(templated(readers[data.source](data.path), data), data, seed)


def _parted(found: Any, data: DataSettings, seed: int) -> tuple[Any, Any]:
    """Splits one source into training and held-out examples."""
    if not data.held_out:
        return found, None
    if data.held_out >= len(found) > 0:
        raise ValueError(
            f"data.held_out is {data.held_out}, but {found.name} has {len(found)} examples, and at "
            "least one must be left to train on."
        )
    return sources.holdout(found, min(data.held_out, len(found)), seed=seed)


def _check_types(path: str, options: Mapping[str, Any], *types: type) -> None:
    for name, value in options.items():
        if type(value) not in types:
            wanted = " or ".join(t.__name__ for t in types)
            raise ValueError(f"{path}.{name} is {value!r:.200}, but must be {wanted}.")


def _needles(data: DataSettings) -> tuple[Any, Any]:
    known = ("shortest", "longest", "long_share", "train", "held_out", "seed")
    if unknown := sorted(set(data.options) - set(known)):
        raise ValueError(f"data.options: unknown field {unknown[0]!r}; expected one of {[*known]}.")
    if data.format not in ("completion", "prompt"):
        raise ValueError(f"data.format is {data.format!r}; needles are 'completion' or 'prompt'.")
    options = {"train": 4096, "held_out": 128, **data.options}
    share = {k: options[k] for k in ("long_share",) if k in options}
    _check_types("data.options", {k: v for k, v in options.items() if k not in share}, int)
    _check_types("data.options", share, float, int)
    counts = {k: options.pop(k) for k in ("train", "held_out")}
    return tuple(needles.examples(n, split=k, **options) for k, n in counts.items())


def templated(source: Any, data: DataSettings) -> Any:
    """Returns examples with the section's template applied to their prompt."""
    if "{prompt}" not in data.template:
        raise ValueError(f"data.template {data.template!r} has no {{prompt}} in it.")
    if data.template == "{prompt}":
        return source
    field = data.fields.get("prompt") or data.fields.get("field") or "prompt"

    def wrap(example: Mapping[str, Any]) -> dict[str, Any]:
        text = encode.read(dict(example), field)
        return {**example, field: data.template.replace("{prompt}", text)}

    return sources.mapped(source, wrap)


def check_format(s: StageSettings, kind: str) -> None:
    """Checks that a format gives batches of a kind.

    Raises:
        ValueError: the format is unknown or of another kind.
    """
    name = s.data.format
    if name not in FORMATS:
        raise ValueError(f"unknown data.format {name!r}; expected one of {[*FORMATS]}.")
    if FORMATS[name][0] != kind:
        fit = [f for f, (k, _) in FORMATS.items() if k == kind]
        raise ValueError(f"data.format is {name!r}; {s.algorithm} needs one of {fit}.")


def encoder(s: StageSettings, kind: str, tokenizer: Tokenizer) -> Callable:
    """Returns the function that tokenizes an example, for batches of a kind.

    Raises:
        ValueError: the format is unknown, of another kind, or lacks a field.
    """
    check_format(s, kind)
    data = s.data
    _, make = FORMATS[data.format]
    options: dict[str, Any] = dict(data.fields)
    if data.format in ("text", "completion", "preference"):
        options |= {"bos": data.bos, "eos": data.eos}
    elif data.format == "prompt":
        options |= {"bos": data.bos}
    try:
        return make(tokenizer, **options)
    except TypeError as error:
        raise ValueError(f"data.fields {data.fields}: {error}.") from None


def notes(
    s: StageSettings, kind: str, source: Any, tokenizer: Tokenizer, survey: fates.Survey
) -> tuple[str, ...]:
    """Returns notes on a stage's examples for the user before training, one line each.

    Examples that are dropped or truncated, prompts whose tokens are not a prefix of the training
    text, and prompts that contain their completions.
    """
    field = "data.prompt_length" if kind == "prompts" else "data.length"
    return (*survey.notes(field, kind), *_border_notes(s.data, source, tokenizer))


def _border_notes(data: DataSettings, source: Any, tokenizer: Tokenizer) -> list[str]:
    few = [source[i] for i in range(min(_BORDERS, len(source)))]
    fields = {k: data.fields.get(k, k) for k in ("prompt", "completion", "chosen")}
    if data.format == "messages":
        talks = (encode.read(e, data.fields.get("field", "messages"), list) for e in few)
        found = (borders.of_chat(tokenizer, talk) for talk in talks)
        return [note for note in found if note][:1]
    if data.format not in ("completion", "preference"):
        return []
    prompt, answer = fields["prompt"], fields["chosen"]
    if data.format == "completion":
        answer = fields["completion"]
    found = (borders.of_completion(tokenizer, e[prompt], e[answer]) for e in few)
    out = [note for note in found if note][:1]
    holding = sum(borders.holds_completion(e, prompt, answer) for e in few)
    if holding == len(few) > 3:
        out.append(
            f"all of the first {len(few)} prompts (field {prompt!r}) end with their completions "
            f"(field {answer!r}), which a prompt should not hold"
        )
    return out


def prompt_encoder(data: DataSettings, tokenizer: Tokenizer, *, own_rows: bool) -> Callable:
    """Returns the function that makes a held-out example's prompt, for a stage of any format.

    Args:
        data: the stage's section.
        tokenizer: the run's.
        own_rows: True if the rows are held out from the stage's data, False if from another file.

    Raises:
        ValueError: the prompt would be the whole text that other examples are trained on.
    """
    field = data.fields.get("prompt") or data.fields.get("field")
    if data.format == "text" and own_rows and field:
        raise ValueError(
            f"data.format is 'text', so the prompt would be all that is learned, field {field!r}; "
            "give evaluate.data, a file with prompts."
        )
    fields = {"field": field} if field else {}
    if data.format in ("messages", "chat_prompt"):
        return encode.encode_chat_prompt(tokenizer, **fields)
    return encode.encode_prompt(tokenizer, bos=data.bos, **fields)


def asked(
    held_out: Any, encoder: Callable, problems: int, data: DataSettings
) -> tuple[sources.Examples, tuple[str, ...]]:
    """Selects the examples among the first `problems` whose prompts can be given to the model.

    Args:
        held_out: examples.
        encoder: example -> prompt ids.
        problems: number of examples.
        data: the stage's section; `overlong` "error" rejects prompts that do not fit.

    Returns:
        The examples, and a note with the number left out, if any were.

    Raises:
        ValueError: a prompt cannot be made, is too long although none can be dropped, or no prompt
            fits.
    """
    limit, lengths = data.prompt_length, []
    for i in range(problems):
        try:
            lengths.append(len(encoder(held_out[i])))
        except Exception as error:
            message = sources.error_message(held_out, i, error)
            raise ValueError(f"the prompt of a held-out problem fails for {message}") from None
    fit = [i for i, n in enumerate(lengths) if 1 <= n <= limit]
    if len(fit) == problems:
        return sources.subset(held_out, fit), ()
    reasons = (
        (sum(n > limit for n in lengths), f"longer than data.prompt_length={limit}, up to "
         f"{max(lengths):,} tokens"),
        (lengths.count(0), "without a token"),
    )  # fmt: skip
    why = "; ".join(f"{n:,} {reason}" for n, reason in reasons if n)
    what = f"{problems - len(fit):,} of {problems:,} held-out problems cannot be asked ({why})"
    if not fit:
        raise ValueError(f"{what}: nothing is left to be asked.")
    if data.overlong == "error":
        raise ValueError(f"{what}, and data.overlong is 'error'.")
    return sources.subset(held_out, fit), (f"{what}: left out of the mean",)
