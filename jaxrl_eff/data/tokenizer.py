"""Tokenizers: text <-> token ids.

There are two, with the same attributes: `CharTokenizer`, one id per character, for toy tasks; and
`FileTokenizer`, a checkpoint's own `tokenizer.json` run by the `tokenizers` library. Both save
themselves as files that transformers reads, and `load_tokenizer` reads both back, the first without
that library.

Left out: sentencepiece's `tokenizer.model` and the old `vocab.json` + `merges.txt`; transformers
converts either into a `tokenizer.json`.
"""

import dataclasses
import json
import re
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxrl_eff import fields
from jaxrl_eff.data import tokenizer_files as files
from jaxrl_eff.files import replacing, write

_SPECIAL = ("<pad>", "<bos>", "<eos>")


@runtime_checkable
class Tokenizer(Protocol):
    """The interface of a tokenizer that the rest of the package uses.

    Attributes:
        vocab: number of ids, special ones included.
        bos, eos, pad: special ids, None where the tokenizer has none.
        stop: every id that ends a response, including `eos`.
        chat_template: Jinja source, or None.
        special: text of the special tokens by role (`bos_token`, `eos_token`, ...).
        origin: where it was loaded from, for messages.

    Example:
        >>> from jaxrl_eff.data import CharTokenizer, Tokenizer
        >>> isinstance(CharTokenizer("ab"), Tokenizer)
        True
    """

    vocab: int
    bos: int | None
    eos: int | None
    pad: int | None
    stop: tuple[int, ...]
    chat_template: str | None
    special: Mapping[str, str]
    origin: str

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of the text; `special` adds the tokens that the model expects around it, e.g. bos."""

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids without additions, and the characters [start, end) that each covers."""

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of the ids; special tokens are shown only if `special`."""

    def save(self, directory: str | PathLike[str]) -> None:
        """Writes the files that transformers and `load_tokenizer` read."""


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """Character tokenizer: ids 0, 1, 2 are <pad>, <bos>, <eos>, then one per alphabet character.

    Raises:
        ValueError: a character appears twice in the alphabet.

    Example:
        >>> from jaxrl_eff import CharTokenizer
        >>> tokenizer = CharTokenizer("0123456789>")
        >>> tokenizer.encode("12>", special=True), tokenizer.decode([1, 4, 5, 13, 2])
        ([1, 4, 5, 13], '12>')
    """

    alphabet: str
    chat_template: str | None = None

    bos = 1
    eos = 2
    pad = 0
    stop = (2,)
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    origin = "CharTokenizer"

    def __post_init__(self) -> None:
        twice = sorted({c for c in self.alphabet if self.alphabet.count(c) > 1})
        if twice:
            raise ValueError(f"the alphabet has {twice} more than once.")

    @property
    def vocab(self) -> int:
        return len(_SPECIAL) + len(self.alphabet)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate((*_SPECIAL, *self.alphabet))}

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of the characters, after <bos> if `special`.

        Raises:
            ValueError: a character is not in the alphabet.
        """
        return [self.bos] * special + self.encode_spans(text)[0]

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the characters [start, end) that each covers; `<eos>` and its like are one."""
        ids, spans = [], []
        for found in re.finditer(r"<(?:pad|bos|eos)>|.", text, re.DOTALL):
            if found.group() not in self._ids:
                raise ValueError(
                    f"{found.group()!r} at {found.start()} of {text[:40]!r} is not in the "
                    f"alphabet {self.alphabet!r}."
                )
            ids.append(self._ids[found.group()])
            spans.append(found.span())
        return ids, spans

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The characters of the ids; ids outside the vocabulary raise ValueError."""
        text = []
        for i in map(int, ids):
            if not 0 <= i < self.vocab:
                raise ValueError(f"id {i} is outside the vocabulary of {self.vocab}.")
            if i >= len(_SPECIAL):
                text.append(self.alphabet[i - len(_SPECIAL)])
            elif special:
                text.append(_SPECIAL[i])
        return "".join(text)

    def save(self, directory: str | PathLike[str]) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`."""
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
        text = {"Sequence": {"id": "A", "type_id": 0}}
        more = {"Sequence": {"id": "B", "type_id": 0}}
        model = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": token, **flags, "special": True}
                for i, token in enumerate(_SPECIAL)
            ],
            "normalizer": None,
            "pre_tokenizer": None,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [bos, text],
                "pair": [bos, text, more],
                "special_tokens": {
                    "<bos>": {"id": "<bos>", "ids": [self.bos], "tokens": ["<bos>"]}
                },
            },
            "decoder": {"type": "Fuse"},
            # Byte-pair encoding without merges gives one token per character.
            "model": {"type": "BPE", "vocab": self._ids, "merges": []},
        }
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "alphabet": self.alphabet,
            **self.special,
        }
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        _write_json(Path(directory) / "tokenizer.json", model)
        _write_json(Path(directory) / "tokenizer_config.json", settings)


@dataclasses.dataclass(frozen=True, eq=False)
class FileTokenizer:
    """A tokenizer from `tokenizer.json` and the settings files next to it; see `load_tokenizer`.

    Attributes:
        inner: the `tokenizers.Tokenizer`.
        settings: the content of `tokenizer_config.json`, written back by `save`.
    """

    inner: Any
    bos: int | None
    eos: int | None
    pad: int | None
    stop: tuple[int, ...]
    chat_template: str | None
    special: Mapping[str, str]
    origin: str
    settings: Mapping[str, Any]

    @property
    def vocab(self) -> int:
        return self.inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of the text, with bos and other tokens that the model expects if `special`."""
        return self.inner.encode(text, add_special_tokens=special).ids

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the characters [start, end) of the text that each covers."""
        encoding = self.inner.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of the ids; incomplete characters decode to U+FFFD."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=not special)

    def save(self, directory: str | PathLike[str]) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, the chat template in the latter."""
        settings = files.saved(self.settings, self.special)
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        Path(directory).mkdir(parents=True, exist_ok=True)
        with replacing(Path(directory) / "tokenizer.json") as partial:
            self.inner.save(str(partial))
        _write_json(Path(directory) / "tokenizer_config.json", settings)


def load_tokenizer(
    directory: str | PathLike[str], *, ignore: Collection[str] = ()
) -> CharTokenizer | FileTokenizer:
    """Loads the tokenizer of a Hugging Face directory.

    `tokenizer_config.json` names the special tokens, and `config.json` those that it does not.
    `stop` also includes the end tokens of `generation_config.json` (or else `config.json`).

    Args:
        ignore: names of fields of these files that are treated as absent.

    Raises:
        FileNotFoundError: there is no `tokenizer.json`.
        ValueError: a file cannot be read; a special token is not in the vocabulary; an unknown
            field has a value that matters; or two files contradict each other.
        ImportError: the `tokenizers` library is missing and needed.

    Example:
        >>> from pathlib import Path
        >>> from jaxrl_eff import CharTokenizer, load_tokenizer
        >>> Path("chars").mkdir()
        >>> CharTokenizer("ab").save("chars")
        >>> load_tokenizer("chars").encode("ba")
        [4, 3]
    """
    directory = Path(directory)
    path = directory / "tokenizer.json"
    if not path.is_file():
        others = [n for n in ("tokenizer.model", "vocab.json") if (directory / n).exists()]
        hint = f" (only {', '.join(others)}, which is not read)" if others else ""
        raise FileNotFoundError(f"there is no tokenizer.json in {directory}{hint}.")
    settings = files.settings_of(directory, ignore)
    template = files.chat_template(directory, settings)
    if isinstance(settings.get("alphabet"), str):
        return CharTokenizer(settings["alphabet"], template)
    inner = files.backend(path, settings)
    special = files.special_tokens(str(directory / files.CONFIG), settings)
    places = [directory / n for n in ("config.json", "generation_config.json")]
    model, generation = ((place, fields.without(files.optional(place), ignore)) for place in places)
    ids = {}
    for role in ("bos", "eos", "pad"):
        text = special.get(f"{role}_token")
        ids[role] = inner.token_to_id(text) if text is not None else None
        if text is None and (found := files.ids_of(*model, f"{role}_token_id")):
            ids[role] = found[0]
    ends = files.ids_of(*generation, "eos_token_id") or files.ids_of(*model, "eos_token_id")
    if ids["eos"] is not None:
        ends = [*ends, ids["eos"]]
    return FileTokenizer(
        inner=inner,
        **ids,
        stop=tuple(dict.fromkeys(ends)),
        chat_template=template,
        special=special,
        origin=str(directory),
        settings=settings,
    )


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
