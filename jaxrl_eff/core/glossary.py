"""The glossary: name, shape, dtype, unit and meaning of every array passed between calls.

One convention removes the off-by-one shifts that fill RLHF code: **index t describes the choice of
token t**. So `logp[b, t]` is the log-probability of `tokens[b, t]` given the tokens before it, and
`value[b, t]` is the critic's estimate before that token is chosen. Both are 0 at the first token of
a sequence, which is given rather than chosen.
"""

from typing import NamedTuple

import jax


class Edge(NamedTuple):
    """Expected axes and dtype of an array, and its meaning."""

    axes: str  # letters of jaxrl_eff.types; equal letters mean equal sizes within one call
    dtype: str
    meaning: str


EDGES = {
    "prompt": Edge("P T", "int32", "prompt tokens, left-aligned, padding after the end"),
    "prompt_length": Edge("P", "int32", "tokens of each prompt"),
    "prompt_example": Edge("P", "int32", "index of the prompt's example in the data source"),
    "tokens": Edge("B T", "int32", "packed sequences, or prompt then response, padding after"),
    "segment": Edge("B T", "int32", "packed sequence id within the row; 0 is padding"),
    "position": Edge("B T", "int32", "index within the segment"),
    "mask": Edge("B T", "float32", "1 where the token is learned, or was chosen by the policy"),
    "logp": Edge("B T", "float32", "nats, log pi(token t | tokens before t) of the sampler"),
    "ref_logp": Edge("B T", "float32", "nats, the same under the reference model"),
    "value": Edge("B T", "float32", "reward units, estimate before token t is chosen"),
    "score": Edge("B", "float32", "reward of the whole response"),
    "baseline": Edge("B", "float32", "reward of the greedy response to the same prompt"),
    "group": Edge("B", "int32", "which prompt of the batch a row answers"),
    "example": Edge("B", "int32", "index of the row's example in the data source"),
    "reward": Edge("B T", "float32", "reward for choosing token t"),
    "adv": Edge("B T", "float32", "advantage of choosing token t"),
    "ret": Edge("B T", "float32", "reward units, value target of token t"),
}


def check(call: str, arrays: dict) -> None:
    """Checks arrays against the glossary. Names outside it belong to the caller and are skipped.

    Args:
        call: name of the call that writes or reads the arrays, for the message.
        arrays: name -> anything with `shape` and `dtype`.

    Raises:
        ValueError: an array's rank, dtype or size differs from the glossary.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, array in arrays.items():
        base = name.removeprefix("greedy_")
        if base not in EDGES:
            continue
        edge = EDGES[base]
        letters = edge.axes.split()
        if len(array.shape) != len(letters) or str(array.dtype) != edge.dtype:
            raise ValueError(
                f"{call}: '{name}' is {array.dtype}{list(array.shape)}, but it should be "
                f"{edge.dtype}[{', '.join(letters)}]: {edge.meaning}."
            )
        for letter, n in zip(letters, array.shape, strict=True):
            key = letter if base == name else f"greedy {letter}"
            seen, owner = sizes.setdefault(key, (n, name))
            if seen != n:
                raise ValueError(
                    f"{call}: '{name}' has {n} along {letter}, but '{owner}' has {seen}."
                )


def shapes(writes: tuple[str, ...], reads: dict) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays a host call must write, given the sizes of those it reads.

    Args:
        writes: names; those outside the glossary are float32, one number per row.
        reads: name -> anything with `shape`.
    """
    sizes = {}
    for name, array in reads.items():
        if name in EDGES:
            sizes |= zip(EDGES[name].axes.split(), array.shape, strict=True)
    rows = next(iter(reads.values())).shape[0]
    out = {}
    for name in writes:
        edge = EDGES.get(name, Edge("B", "float32", ""))
        shape = tuple(sizes.get(letter, rows) for letter in edge.axes.split())
        out[name] = jax.ShapeDtypeStruct(shape, edge.dtype)
    return out
