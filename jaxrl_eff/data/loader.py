"""Batches of static shape in an order fixed by a seed, resumable from a few integers.

Grain shuffles the indices of a source in each epoch and encodes examples ahead in a thread; the
rest is a pool. Each batch draws examples until the pool would fill its rows, packs the pool, and
keeps what did not fit, which is placed first next time. So a loader's whole state is the number of
examples drawn and which of them are still in the pool.

Every process draws and encodes every example, and takes its own block of rows: packing needs all
lengths, and batches do not depend on the number of processes. Left out: worker processes
(tokenizing text is far cheaper than training on it), and mixing several sources.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from jaxrl_eff.data import fates, packing
from jaxrl_eff.data.fates import Item
from jaxrl_eff.data.sources import Source, error_message

KINDS = ("sft", "preference", "prompts")
Batch = dict[str, np.ndarray]
_COUNTS = (
    "batches", "examples", "overlong", "empty", "remainder", "truncated",
    "positions", "tokens", "learned",
)  # fmt: skip


def batches(
    source: Source,
    *,
    encode: Callable[[dict[str, Any]], Any],
    batch: int,
    kind: str,
    seed: int,
    length: int | None = None,
    prompt_length: int | None = None,
    shuffle: bool = True,
    epochs: int | None = None,
    process: tuple[int, int] = (0, 1),
    overlong: str = "drop",
    packed: bool = True,
    remainder: str | None = None,
    pad: int = 0,
    threads: int = 1,
    prefetch: int = 256,
) -> "Loader":
    """Makes an iterator over batches.

    | kind | `encode(example)` returns | a batch holds |
    |---|---|---|
    | sft | (ids, mask) | tokens segment position mask, each [B, T] |
    | preference | (ids, mask) chosen, (ids, mask) rejected | the same, pairs whole |
    | prompts | ids | prompt [P, Tp], prompt_length [P], prompt_example [P] |

    All are int32 except mask, which is float32. An example with nothing to learn (an empty mask, in
    either response of a pair; a prompt without tokens) is dropped and counted.

    Args:
        source: examples by index.
        encode: a pure function; see `jaxrl_eff.data.encode`.
        batch: rows B (prompts P) of the global batch, over all processes.
        kind: "sft", "preference" or "prompts".
        seed: of the order, 0 <= seed < 2**32.
        length: T of sft and preference.
        prompt_length: Tp of prompts.
        shuffle: draws in a new order each epoch; otherwise in the source's.
        epochs: passes over the source; unlimited by default.
        process: (index, count). All other arguments must be equal on all processes; process i gets
            the i-th of `count` equal blocks of rows.
        overlong: "drop", "truncate" (the end of a sequence; not for prompts) or "error", for
            examples longer than a row. Dropped and truncated ones are counted in `stats`.
        packed: False puts one example into each row (sft, preference).
        remainder: of the last batch, when examples no longer fill its rows: "pad" leaves rows
            empty, and fills up prompts with repeats whose `prompt_example` is -1; "drop" ends
            before it. By default prompts are dropped and the others padded.
        pad: token id at padding.
        threads: number of encoding threads; 0 encodes when a batch is requested.
        prefetch: examples encoded ahead.

    Raises:
        ValueError: an argument is out of range; or, from `next`, an example cannot be encoded, is
            too long while `overlong` is "error", or no example of the source is usable.

    Example:
        >>> from jaxrl_eff import CharTokenizer, batches, encode_prompt_completion
        >>> source = [{"prompt": "12>", "completion": "21"}, {"prompt": "3>", "completion": "3"}]
        >>> encode = encode_prompt_completion(CharTokenizer("0123456789>"), bos=True)
        >>> order = dict(seed=0, shuffle=False, epochs=1)
        >>> loader = batches(source=source, encode=encode, batch=1, kind="sft", length=12, **order)
        >>> batch = next(loader)
        >>> batch["tokens"].tolist()
        [[1, 4, 5, 13, 5, 4, 2, 1, 6, 13, 6, 2]]
        >>> batch["segment"].tolist()
        [[1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]]
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; expected one of {[*KINDS]}.")
    needed, size = ("prompt_length", prompt_length) if kind == "prompts" else ("length", length)
    if size is None or size < 1:
        raise ValueError(f"kind {kind!r} needs {needed}, at least 1; it is {size}.")
    allowed = ("drop", "error") if kind == "prompts" else ("drop", "truncate", "error")
    if overlong not in allowed:
        raise ValueError(f"unknown overlong {overlong!r}; expected one of {[*allowed]}.")
    if remainder not in (None, "pad", "drop"):
        raise ValueError(f"unknown remainder {remainder!r}; expected one of ['pad', 'drop'].")
    index, count = process
    if not 0 <= index < count:
        raise ValueError(f"process {index} of {count} does not exist.")
    if batch < 1 or batch % count:
        raise ValueError(f"a batch of {batch} rows cannot be split over {count} processes.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; it must be at least 0 and below 2**32.")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs is {epochs}; it must be at least 1, or None for no end.")
    if len(source) < 1:
        raise ValueError("the source has no examples.")
    # Takes about a second. Imported here, by the thread that makes loaders: while grain is being
    # imported, `builtins.__import__` is replaced for all threads, and their imports fail.
    import grain  # noqa: F401

    return Loader(
        source=source,
        encode=encode,
        layout={
            "kind": kind,
            "batch": batch,
            needed: size,
            "packed": packed and kind != "prompts",
            "overlong": overlong,
            "pad": pad,
            "remainder": remainder or ("drop" if kind == "prompts" else "pad"),
        },
        order={"examples": len(source), "seed": seed, "shuffle": shuffle},
        epochs=epochs,
        process=process,
        reading=(threads, prefetch),
    )


class Loader:
    """Iterator that `batches` returns: dicts of numpy arrays; `state` and `restore` resume it.

    Example:
        >>> from jaxrl_eff.data import CharTokenizer, batches, encode_prompt
        >>> source = [{"prompt": digit} for digit in "01234567"]
        >>> encode = encode_prompt(CharTokenizer("01234567"), bos=False)
        >>> settings = dict(batch=2, kind="prompts", seed=0, prompt_length=1)
        >>> first, second = (batches(source=source, encode=encode, **settings) for _ in range(2))
        >>> _ = next(first)
        >>> second.restore(first.state())
        >>> bool((next(first)["prompt"] == next(second)["prompt"]).all())
        True
    """

    def __init__(self, *, source, encode, layout, order, epochs, process, reading):
        self._source, self._encode = source, encode
        self._layout, self._order, self._epochs = layout, order, epochs
        self._process, self._reading = process, reading
        self._length = layout.get("length") or layout["prompt_length"]
        self._drawn = 0
        self._pool: list[Item] = []
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._dataset = self._items = None  # grain's, made on first use

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rows = self._next_rows()
        index, count = self._process
        share = len(rows) // count
        return self._arrays(rows, slice(index * share, (index + 1) * share))

    def items(self) -> list[Item]:
        """Returns the next batch's examples, of all processes, before they are laid out in rows."""
        return [item for row in self._next_rows() for item in row]

    def _next_rows(self) -> list[list[Item]]:
        carried = len(self._pool)
        self._fill_pool()
        rows, left = self._choose_rows(carried)
        used = [item for row in rows for item in row]
        self._pool = [self._pool[i] for i in left]
        if not used:
            raise StopIteration
        if self._layout["remainder"] == "drop" and not all(rows):
            self._counts["remainder"] += len(used)
            return self._next_rows()
        self._count(used)
        return rows

    def share(self, process: tuple[int, int]) -> None:
        """Selects the block of process (index, count) for the next batches; (0, 1) is all rows."""
        self._process = process

    def prepare(self) -> None:
        """Makes the order of examples, ahead of the first batch."""
        self._indices()

    def survey(self, count: int = fates.SURVEYED) -> fates.Survey:
        """Counts the fates of some examples over the whole source; see `fates.survey`."""
        return fates.survey(self._read, len(self._source), length=self._length, count=count)

    def state(self) -> dict[str, Any]:
        """Position of the loader after the batches so far: small and JSON-serializable.

        It holds numbers of examples, not tokens. The state of any process restores every process,
        for any number of processes.
        """
        return {
            "drawn": self._drawn,
            "waiting": [item.at for item in self._pool],
            "counts": dict(self._counts),
            "layout": dict(self._layout),
            "order": {**self._order, "starts": self._first_indices()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the batch that `state` followed; the next batches are bit-identical.

        Raises:
            ValueError: the state is from a loader with other data, another order or layout.
        """
        here = self.state()
        for part in ("order", "layout"):
            for name in sorted(here[part] | state[part]):
                was, now = state[part].get(name), here[part].get(name)
                if was != now:
                    raise ValueError(
                        f"the state was saved with {name} = {was!r}, but here it is {now!r}."
                    )
        self.close()
        self._drawn, self._counts = state["drawn"], dict(state["counts"])
        self._pool = [replace(self._read(self._indices()[at]), at=at) for at in state["waiting"]]

    def stats(self, state: dict[str, Any] | None = None) -> dict[str, float]:
        """Statistics of all batches so far, over all processes; or up to an earlier `state`.

        Returns:
            `padding`, share of positions without a token; `learned`, share of tokens whose mask is
            1; `epochs`, passes over the source, with a fraction; and counts: `batches`, `examples`
            used, `dropped` (= `overlong` + `empty` + `remainder`), `truncated`.
        """
        c, drawn = self._counts, self._drawn
        if state is not None:
            c, drawn = state["counts"], state["drawn"]
        counts = {k: c[k] for k in ("batches", "examples", "overlong", "empty", "remainder")}
        return {
            "padding": 1.0 - c["tokens"] / max(c["positions"], 1),
            "learned": c["learned"] / max(c["tokens"], 1),
            "epochs": drawn / self._order["examples"],
            "dropped": c["overlong"] + c["empty"] + c["remainder"],
            "truncated": c["truncated"],
            **counts,
        }

    def close(self) -> None:
        """Ends the thread that encodes ahead. `next` starts another."""
        if self._items is not None:
            self._items.close()
            self._items = None

    def _fill_pool(self) -> None:
        """Draws until the pool would fill a batch, or the epochs are over."""
        batch, wasted = self._layout["batch"], 0
        wanted = batch * self._length if self._layout["packed"] else batch
        have = sum(item.tokens if self._layout["packed"] else 1 for item in self._pool)
        while have < wanted and (item := self._draw_next()) is not None:
            if item.fate in ("overlong", "empty"):
                self._counts[item.fate] += 1
                wasted += 1
                if wasted >= len(self._source):
                    raise ValueError(
                        f"the last {wasted} examples were all dropped, the last one as "
                        f"{item.fate} with {item.tokens} tokens; rows hold {self._length}."
                    )
                continue
            self._counts["truncated"] += item.fate == "truncated"
            self._pool.append(item)
            have, wasted = have + (item.tokens if self._layout["packed"] else 1), 0

    def _choose_rows(self, carried: int) -> tuple[list[list[Item]], list[int]]:
        """The items of each row of the global batch, and the pool indices that remain."""
        batch = self._layout["batch"]
        if self._layout["packed"]:
            lengths = [item.tokens for item in self._pool]
            plan, left = packing.fit(lengths, length=self._length, rows=batch, first=carried)
            return [[self._pool[i] for i in row] for row in plan], left
        rows = [[item] for item in self._pool[:batch]]
        left = list(range(len(rows), len(self._pool)))
        return rows + [[] for _ in range(batch - len(rows))], left

    def _arrays(self, rows: list[list[Item]], block: slice) -> Batch:
        if self._layout["kind"] != "prompts":
            segments = [[s for item in row for s in item.segments] for row in rows[block]]
            return packing.lay_out(segments, length=self._length, pad=self._layout["pad"])
        # Generation needs at least one prompt token, so an empty row repeats the first.
        items = [row[0] if row else rows[0][0] for row in rows[block]]
        laid = packing.lay_out(
            [item.segments for item in items], length=self._length, pad=self._layout["pad"]
        )
        examples = [row[0].index if row else -1 for row in rows[block]]
        return {
            "prompt": laid["tokens"],
            "prompt_length": np.array([item.tokens for item in items], np.int32),
            "prompt_example": np.array(examples, np.int32),
        }

    def _count(self, used: list[Item]) -> None:
        c = self._counts
        c["batches"] += 1
        c["examples"] += len(used)
        c["positions"] += self._layout["batch"] * self._length
        c["tokens"] += sum(item.tokens for item in used)
        c["learned"] += int(sum(mask.sum() for item in used for _, mask in item.segments))

    def _draw_next(self) -> Item | None:
        if self._items is None:
            import grain

            threads, prefetch = self._reading
            options = grain.ReadOptions(
                num_threads=threads, prefetch_buffer_size=prefetch if threads else 0
            )
            self._items = iter(self._indices().map(self._read).to_iter_dataset(options))
            self._items.set_state({"next_index": self._drawn})
        try:
            item = next(self._items)
        except StopIteration:
            return None
        item = replace(item, at=self._drawn)
        self._drawn += 1
        return item

    def _read(self, index: int) -> Item:
        """Encodes one example. Runs in grain's threads, so it changes no state."""
        try:
            encoded = self._encode(self._source[int(index)])
            return fates.item(int(index), encoded, self._layout, self._length)
        except Exception as error:
            raise ValueError(error_message(self._source, int(index), error)) from error

    def _indices(self):
        """Grain's dataset of indices in the source, epoch after epoch."""
        if self._dataset is None:
            import grain

            n = self._order["examples"]
            indices = grain.MapDataset.range(n).seed(self._order["seed"])
            if self._order["shuffle"]:
                indices = indices.shuffle()
            self._dataset = indices.repeat(self._epochs)
        return self._dataset

    def _first_indices(self) -> list[int]:
        """First indices of the order, stored in the state to detect a change of grain's shuffle."""
        return [int(self._indices()[at]) for at in range(min(4, self._order["examples"]))]
