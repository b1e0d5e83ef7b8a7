"""Files next to `tokenizer.json` that affect tokens, read as by transformers or refused by name.

`tokenizer.json` defines how text is split, and overrides the settings wherever both define the
same. The settings add tokens and mark them as special. Where two files contradict each other and
transformers' versions disagree on which one counts, an error names both and nothing is loaded.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxrl_eff import fields
from jaxrl_eff.data import known_fields

CONFIG = "tokenizer_config.json"
_LARGEST = 2**31 - 1  # largest id


def settings_of(directory: Path, ignore: Collection[str] = ()) -> dict[str, Any]:
    """Fields of `tokenizer_config.json`, with those of `special_tokens_map.json` where
    transformers reads it: where no tokens are listed by their ids.

    Args:
        ignore: names of fields that are treated as absent.

    Raises:
        ValueError: a file cannot be read, or an unknown field has a value that matters.
    """
    settings = fields.without(optional(directory / CONFIG), ignore)
    if "added_tokens_decoder" not in settings:
        settings |= fields.without(optional(directory / "special_tokens_map.json"), ignore)
    where = str(directory / CONFIG)
    told = {k: v for k, v in settings.items() if not _names_token(k, v)}
    fields.warn(
        where,
        fields.checked(
            where, told, known_fields.READ | known_fields.HARMLESS, only=known_fields.ONLY
        ),
    )
    return settings


def optional(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if the file does not exist."""
    return fields.read_json(path) if path.exists() else {}


def _names_token(name: str, value: Any) -> bool:
    return name.endswith("_token") and not name.startswith("add_") and isinstance(value, str)


def special_tokens(where: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """Text of the special tokens by role ("eos_token").

    Raises:
        ValueError: a token is neither a text nor an object with one.
    """
    found = {}
    for name, value in settings.items():
        roles = name in known_fields.READ and not name.startswith("add_")
        if not name.endswith("_token") or not (roles or _names_token(name, value)):
            continue
        if value is not None:
            found[name] = _text(where, name, value)
    named = settings.get("extra_special_tokens")
    if isinstance(named, dict):
        found |= {k: _text(where, f"extra_special_tokens.{k}", v) for k, v in named.items()}
    return found


def _text(where: str, name: str, value: Any) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text:
        raise ValueError(
            f"{where}: {name}={fields.short(value)}, but it should be a text, or an object with "
            "its 'content'."
        )
    return text


def backend(path: Path, settings: Mapping[str, Any]) -> Any:
    """The `tokenizers.Tokenizer` of a `tokenizer.json`, with the tokens that the settings add.

    Raises:
        ValueError: the file cannot be read, or contradicts the settings.
        ImportError: the `tokenizers` library is missing.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "reading tokenizer.json needs the tokenizers library: pip install 'jaxrl_eff[hf]'."
        ) from error
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
        # The file can store a training run's truncation and padding, which must not apply here.
        inner.no_truncation()
        inner.no_padding()
        _add(tokenizers.AddedToken, path.parent, inner, settings)
        # Some options fail only on text.
        inner.decode(inner.encode("a b").ids)
    except (ValueError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and Rust panics
        raise ValueError(f"{path} cannot be read: {error}") from error
    if getattr(inner.model, "dropout", None):
        raise ValueError(f"{path}: model.dropout={inner.model.dropout} draws tokens at random.")
    where = str(path.with_name(CONFIG))
    if settings.get("split_special_tokens") is not None:
        split = settings["split_special_tokens"]
        inner.encode_special_tokens = fields.switch(where, "split_special_tokens", split)
    _check_prefix(where, inner, settings)
    _check_ends(where, inner, settings)
    return inner


def _add(kind: Any, directory: Path, inner: Any, settings: Mapping[str, Any]) -> None:
    """Adds tokens in transformers' order: those with an id, special ones, the rest."""
    where = str(directory / CONFIG)
    special = special_tokens(where, settings)
    extra = [*special.items(), *_extra(where, settings)]
    roles = {text for _, text in extra}
    listed, tokens = _listed(directory, inner, settings), []
    for _, flags in sorted(listed.items()):
        token = kind(**flags)
        token.special = token.special or token.content in roles
        tokens.append(token)
    there = {t.content for t in inner.get_added_tokens_decoder().values()}
    there |= {t.content for t in tokens}
    for name, text in extra:
        if inner.token_to_id(text) is None and text not in there:
            raise ValueError(f"{name}={text!r} of {directory} is not in its vocabulary.")
        if text not in there:
            there.add(text)
            tokens.append(kind(text, special=True))
    if tokens:
        inner.add_tokens(tokens)
    for index, flags in listed.items():
        if inner.token_to_id(flags["content"]) != index:
            raise ValueError(
                f"{where}: added_tokens_decoder.{index} is {flags['content']!r}, whose id is "
                f"{inner.token_to_id(flags['content'])} by tokenizer.json."
            )


def _extra(where: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields special tokens without a role, as (field, text)."""
    name = "extra_special_tokens"
    if not settings.get(name):
        name = "additional_special_tokens"
    value = settings.get(name) or []
    if isinstance(value, dict):  # by role, see `special_tokens`
        return
    if not isinstance(value, list):
        raise ValueError(f"{where}: {name}={fields.short(value)}, but it should be a list.")
    for i, token in enumerate(value):
        yield f"{name}[{i}]", _text(where, f"{name}[{i}]", token)


def _listed(directory: Path, inner: Any, settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Tokens that the files list by id, as id -> flags; older files list them separately."""
    where, name = str(directory / CONFIG), "added_tokens_decoder"
    if name in settings:
        given = fields.mapping(where, name, settings[name])
        return {_id(where, name, k): _flags(where, f"{name}.{k}", v) for k, v in given.items()}
    old = directory / "added_tokens.json"
    special = set(special_tokens(where, settings).values())
    special |= {text for _, text in _extra(where, settings)}
    found, own = {}, inner.get_added_tokens_decoder()
    for text, index in optional(old).items():
        fields.integer(str(old), text, index, 0, _LARGEST)
        if index not in own:
            role = text in special
            found[index] = {"content": text, "normalized": not role, "special": role}
    return found


def _id(where: str, name: str, key: str) -> int:
    if not key.isdecimal() or int(key) > _LARGEST:
        raise ValueError(f"{where}: {name} has {fields.short(key)}, but its names should be ids.")
    return int(key)


def _flags(where: str, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {name}={fields.short(value)}, but it should be an object.")
    fields.checked(where, value, known_fields.TOKEN, prefix=f"{name}.")
    flags = {"content": _text(where, name, value)}
    for flag in known_fields.TOKEN - {"content", "__type"}:
        if flag in value:
            flags[flag] = fields.switch(where, f"{name}.{flag}", value[flag])
    return flags


def _check_prefix(where: str, inner: Any, settings: Mapping[str, Any]) -> None:
    """Raises ValueError if only one of the two files adds a space before the text."""
    asked = settings.get("add_prefix_space")
    if asked is None:
        return
    fields.switch(where, "add_prefix_space", asked)
    found = []
    for part in (inner.normalizer, inner.pre_tokenizer):
        for step in _steps(part):
            if step.get("type") == "ByteLevel" and "add_prefix_space" in step:
                found.append(step["add_prefix_space"])
            elif step.get("type") == "Metaspace":
                scheme = step.get("prepend_scheme", "always")
                found.append(scheme != "never" and step.get("add_prefix_space", True))
            elif step.get("type") == "Prepend":
                found.append(True)
    if any(here != asked for here in found) or (asked and not found):
        raise ValueError(
            f"{where}: add_prefix_space={asked}, but tokenizer.json says otherwise. "
            "ignore=('add_prefix_space',) follows tokenizer.json."
        )


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """Yields the steps of a normalizer or pre-tokenizer, including those inside sequences."""
    waiting = [json.loads(part.__getstate__())] if part is not None else []
    while waiting:
        step = waiting.pop()
        yield step
        for name in ("normalizers", "pretokenizers"):
            waiting += step.get(name, [])


def _check_ends(where: str, inner: Any, settings: Mapping[str, Any]) -> None:
    """Raises ValueError if only one of the two files adds bos or eos around the text."""
    special = special_tokens(where, settings)
    around = inner.encode("a", add_special_tokens=True)
    for end, at in (("bos", 0), ("eos", -1)):
        asked, text = settings.get(f"add_{end}_token"), special.get(f"{end}_token")
        if asked is None or text is None:
            continue
        fields.switch(where, f"add_{end}_token", asked)
        added = bool(around.ids) and around.special_tokens_mask[at] == 1
        here = added and around.ids[at] == inner.token_to_id(text)
        if asked != here:
            raise ValueError(
                f"{where}: add_{end}_token={asked}, but tokenizer.json "
                f"{'adds' if here else 'does not add'} {text!r}. "
                f"ignore=('add_{end}_token',) follows tokenizer.json."
            )


def saved(settings: Mapping[str, Any], special: Mapping[str, str]) -> dict[str, Any]:
    """The settings in a form that transformers reads back: tokens by their text alone, since their
    flags are in `tokenizer.json`.
    """
    out = {k: special.get(k, v) for k, v in settings.items()}
    for name in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(out.get(name), list):
            out[name] = [t["content"] if isinstance(t, dict) else t for t in out[name]]
    return out


def chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template: from separate files first, then the settings; of named ones, "default".

    Raises:
        ValueError: there are only other names, or a template is not a text.
    """
    named: dict[str, Any] = {}
    if (path := directory / "chat_template.jinja").is_file():
        named["default"] = read_text(path)
    others = directory / "additional_chat_templates"
    for path in sorted(others.glob("*.jinja")) if others.is_dir() else ():
        named[path.stem] = read_text(path)
    where = str(directory / CONFIG)
    if not named:
        template = settings.get("chat_template")
        if template is None:
            template = optional(directory / "chat_template.json").get("chat_template")
        if template is None:
            return None
        named = _named(where, template)
    if "default" not in named:
        raise ValueError(f"{directory} has chat templates {sorted(named)}, but no 'default'.")
    if not isinstance(named["default"], str):
        raise ValueError(
            f"{where}: chat_template={fields.short(named['default'])}, but it should be a text."
        )
    return named["default"]


def _named(where: str, template: Any) -> dict[str, Any]:
    if isinstance(template, dict):
        return template
    if not isinstance(template, list):
        return {"default": template}
    for entry in template:
        entry = entry if isinstance(entry, dict) else {}
        if not all(isinstance(entry.get(k), str) for k in ("name", "template")):
            raise ValueError(
                f"{where}: chat_template should be a text, or a list of objects with 'name' and "
                "'template'."
            )
    return {entry["name"]: entry["template"] for entry in template}


def read_text(path: Path) -> str:
    """Reads a text file.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}.") from None


def ids_of(path: Path, raw: Mapping[str, Any], name: str) -> list[int]:
    """Token ids of a field that holds one, several or none (null, or -1).

    Raises:
        ValueError: the field holds something else.
    """
    value = raw.get(name)
    if value is None:
        return []
    listed = value if isinstance(value, list) else [value]
    return [i for i in (fields.integer(str(path), name, x, -1, _LARGEST) for x in listed) if i >= 0]
