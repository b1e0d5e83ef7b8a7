r"""Attention and micro-steps on one GPU: rates of kernels, and the constants of a schedule's cost.

  python experiments/long_context/gpu.py --work attention hop micro --out gpu.jsonl

Random numbers and weights. TFLOP/s count what is needed alone: 4 N H FLOP for every pair of a query
and a key that it sees, forward, and five halves of that backward. Every line is a JSON object;
rates stand beside the products and copies that were measured in the same process.

- attention: rows of one document and packed rows; the kernel of distributed attention on whole
  rows, the one of `attention.choose`, cuDNN without documents, and chunks in XLA.
- hop: what one of 8 devices does while one piece of a ring is at hand, for 131,072 tokens in
  stripes; and that four pieces met one after the other give what all keys at once do.
- errors: of results and gradients of the kernel on a small packed row, heads of many sizes.
- tiles: milliseconds of the three kernels by how they divide their work, on one document of 16,384
  tokens and on 32 of 512; `--sizes=all` tries all of 33.
- met: how many tiles of 64 tokens the kernels meet on packed rows, and how many hold what is seen.
- micro: seconds of training micro-steps over tokens and lengths, and `Cost`'s constants fitted to
  half of them, which predict the other half; constants: fitted again to the rows in `--out`.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jaxrl_eff.algorithms import sft
from jaxrl_eff.core import Packing, Placement, Spec, compile
from jaxrl_eff.data import packing
from jaxrl_eff.data.balance import skrull
from jaxrl_eff.data.balance.assignment import Assignment, Shape
from jaxrl_eff.data.balance.cost import Cost, refit
from jaxrl_eff.models import LMConfig, attention, logical_axes, params
from jaxrl_eff.parallel import devices
from jaxrl_eff.parallel.attention import (
    blockwise,
    flash,
    flash_gpu,
    kernels,
    ring,
    sequence,
)
from jaxrl_eff.parallel.attention.blockwise import Queries, Where
from jaxrl_eff.parallel.attention.context import Mask
from jaxrl_eff.parallel.attention.on_mesh import on_mesh
from jaxrl_eff.parallel.mesh import mesh
from jaxrl_eff.planner.packed_rows import cost_of

HEADS = {"0.5b": (14, 2, 64), "7b": (28, 4, 128)}
COMMON = {"vocab": 151_936, "qkv_bias": True, "dtype": "bfloat16", "max_length": 131_072}
MODELS = {
    "0.5b": LMConfig(
        **COMMON, layers=24, width=896, heads=14, kv_heads=2, head_dim=64, ffn=4864, tie=True,
        remat="outputs",
    ),
    # Four of 28 layers: weights, gradients and activations of all do not fit one GPU.
    "7b": LMConfig(
        **COMMON, layers=4, width=3584, heads=28, kv_heads=4, head_dim=128, ffn=18_944, tie=True,
        param_dtype="bfloat16", remat="outputs",
    ),
    "tiny": LMConfig(vocab=64, layers=2, width=64, heads=4, kv_heads=2, head_dim=16, ffn=128),
}  # fmt: skip
ROWS = ((16, 2_048), (4, 8_192), (1, 32_768), (1, 131_072))
MOST_MASKED = 32_768  # tokens of a row whose mask of all pairs still fits


def seconds(fn: Any, *args: Any, repeat: int = 3) -> float:
    jax.block_until_ready(fn(*args))
    found = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(repeat):
            out = fn(*args)
        jax.block_until_ready(out)
        found.append((time.perf_counter() - began) / repeat)
    return float(np.median(found))


def documents(rows: int, length: int, mean: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segments of rows full of documents of exponential lengths; 0: one a row."""
    rng = np.random.default_rng(seed)
    position, segment = np.zeros((2, rows, length), np.int32)
    for r in range(rows):
        at, n = 0, 1
        while at < length:
            size = min(int(np.ceil(rng.exponential(mean))) if mean else length, length - at)
            position[r, at : at + size], segment[r, at : at + size] = np.arange(size), n
            at, n = at + size, n + 1
    return position, segment


def without_documents(q, k, v, mask, *, scale):
    del mask
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, implementation="cudnn"
    )


def compared(limit: dict[str, float], lengths: tuple) -> Any:
    """All programs are compiled at once, before the first is timed."""
    kinds = {
        "kernel": sequence.attend(Placement((0,))),
        "fused": attention.fused,
        "cudnn": without_documents,
        "xla": on_mesh(ring.ring(), mesh(Placement((0,)))),
    }
    cases = [
        (shape, rows, length, mean, [n for n in kinds if _takes(n, shape, length, mean)])
        for shape in HEADS
        for rows, length in lengths
        for mean in (0, 512, 4096)
        if mean * 4 <= length
    ]
    with ThreadPoolExecutor(12) as pool:
        started = {}
        for shape, rows, length, _, names in cases:
            for name in names:
                key = shape, rows, length, name
                if key not in started:
                    one = _lowered(kinds[name], shape, rows, length)
                    started[key] = [pool.submit(_compiled, x) for x in one]
        programs = {key: [x.result() for x in both] for key, both in started.items()}
    for shape, rows, length, mean, names in cases:
        heads, _, dim = HEADS[shape]
        position, segment = documents(rows, length, mean)
        where = jnp.asarray(position), jnp.asarray(segment)
        numbers = [
            jax.random.normal(jax.random.key(i), x.shape, x.dtype)
            for i, x in enumerate(_numbers(shape, rows, length))
        ]
        flop = 4.0 * heads * dim * float((position + 1.0).sum())
        row = {
            "work": "attention", "shape": shape, "rows": rows, "length": length,
            "documents": mean or length,
        }  # fmt: skip
        for name in names:
            forward, both = programs[shape, rows, length, name]
            if isinstance(both, str):  # what a kernel refuses is a result as well
                row[name] = both
                continue
            ahead, taken = seconds(forward, *numbers, *where), seconds(both, *numbers, *where)
            row[name] = {
                "forward_ms": 1e3 * ahead, "both_ms": 1e3 * taken,
                "forward_tflops": flop / ahead / 1e12, "both_tflops": 3.5 * flop / taken / 1e12,
                "of_products": 3.5 * flop / taken / 1e12 / limit["matmul_tflops"],
                "temporary_mb": both.memory_analysis().temp_size_in_bytes / 1e6,
            }  # fmt: skip
        yield row


def _takes(name: str, shape: str, length: int, mean: int) -> bool:
    if name == "cudnn":
        return not mean  # it would attend to other documents
    if name == "fused":
        return length <= MOST_MASKED
    return name == "kernel" or (length <= 8_192 and shape == "0.5b")


def _numbers(shape: str, rows: int, length: int) -> list[jax.ShapeDtypeStruct]:
    heads, kv_heads, dim = HEADS[shape]
    return [
        jax.ShapeDtypeStruct((rows, length, n, dim), jnp.bfloat16)
        for n in (heads, kv_heads, kv_heads, heads)
    ]


def _lowered(fn: Any, shape: str, rows: int, length: int) -> list[Any]:
    """Forward, and forward and backward, of (q, k, v, gradient, position, segment)."""

    def run(q, k, v, g, position, segment):
        del g
        mask = Mask(position, segment, position, segment)
        return fn(q, k, v, mask, scale=q.shape[-1] ** -0.5)

    def both(q, k, v, g, *where):
        return jax.vjp(lambda *x: run(*x, g, *where), q, k, v)[1](g)

    at = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    args = *_numbers(shape, rows, length), at, at
    found = []
    for f in (run, both):
        try:
            found.append(jax.jit(f).lower(*args))
        except Exception as error:
            found.append(f"{type(error).__name__}: {str(error)[:200]}")
    return found


def _compiled(lowered: Any) -> Any:
    if isinstance(lowered, str):
        return lowered
    try:
        return lowered.compile()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


def errors() -> Any:
    for dim in (16, 64, 128, 256):
        for length in (256, 1024):
            wrong = kernels.error_of(kernels.TRITON, length, dim)
            yield {"work": "errors", "head_dim": dim, "length": length, "error": wrong}


TILES = {64: ((64, 64, 4, 3), (64, 64, 4, 2), (128, 128, 8, 3)),
         128: ((64, 64, 4, 2), (128, 128, 8, 3), (128, 64, 8, 4))}  # fmt: skip
EVERY = tuple(
    (own, met, warps, stages)
    for own in (64, 128) for met in (32, 64, 128) for warps in (4, 8) for stages in (2, 3, 4)
    if (own, met, warps) != (64, 128, 8)
)  # fmt: skip


def tiles(sizes: str, length: int = 16_384) -> Any:
    """All programs of a row are compiled at once; what does not fit is told, not timed."""
    for shape, (heads, kv_heads, dim) in HEADS.items():
        q, kv, g = _pieces(length, heads, kv_heads, dim)
        for each in (length, 512):
            position = jnp.tile(jnp.arange(each, dtype=jnp.int32), length // each)[None]
            segment = jnp.repeat(jnp.arange(1, length // each + 1), each)[None]
            where = blockwise.fold_where(position, segment, flash_gpu.CHUNK)
            out, lse = jax.jit(_forward)(q, kv, where, where)
            delta = (out * g.astype(jnp.float32)).sum(-1)
            operands = q, kv, g, lse, delta, where, where
            started = []
            with ThreadPoolExecutor(12) as pool:
                for size in EVERY if sizes == "all" else TILES[dim]:
                    for name, fn, args in (
                        ("forward", _forward, (q, kv, where, where)),
                        ("dq", lambda *a: _backward(*a)[0], operands),
                        ("dk and dv", lambda *a: _backward(*a)[1], operands),
                    ):
                        lowered = _divided(flash_gpu.Tile(*size), fn, args)
                        started.append((name, size, args, pool.submit(_compiled, lowered)))
            for name, size, args, program in started:
                program = program.result()
                told = program if isinstance(program, str) else 1e3 * seconds(program, *args)
                yield {
                    "work": "tiles", "shape": shape, "documents": each, "kernel": name,
                    "tile": size, "ms": told,
                }  # fmt: skip


def _divided(tile: flash_gpu.Tile, fn: Any, args: tuple) -> Any:
    """Traced by a function of its own, or JAX would take what it knows of other tiles."""
    every = flash_gpu.Tiles(tile, tile, tile)
    with mock.patch.object(flash_gpu, "tiles", lambda *_: every):
        return jax.jit(lambda *a: fn(*a)).lower(*args)


def _forward(q, kv, q_where, k_where):
    where = Where(q_where, k_where)
    return flash.forward(flash_gpu.DEVICE, blockwise.nothing(q), q, kv, where, None)


def _backward(q, kv, g, lse, delta, q_where, k_where):
    zero = jnp.zeros(q.shape, jnp.float32)
    queries, where = Queries(q, g, lse, delta), Where(q_where, k_where)
    return flash.backward(flash_gpu.DEVICE, zero, queries, kv, where, None)


def met(size: int = 64) -> Any:
    for rows, length in ROWS:
        for mean in (0, 512, 4096):
            if mean * 4 <= length:
                position, segment = map(jnp.asarray, documents(rows, length, mean))
                where = blockwise.fold_where(position, segment, size)
                low, high, first, end = flash.bounds(Where(where, where)).of_queries
                yield {
                    "work": "met", "rows": rows, "length": length, "documents": mean or length,
                    "met": int((high - low).sum()), "without_mask": int((end - first).sum()),
                    "needed": round(float((position + 1.0).sum()) / size**2),
                }  # fmt: skip


def hop(limit: dict[str, float], tokens: int = 131_072, parts: int = 8) -> Any:
    """One hop of a striped ring; then all hops of a shorter row against no ring."""
    for shape, (heads, kv_heads, dim) in HEADS.items():
        piece = tokens // parts
        q, kv, g = _pieces(piece, heads, kv_heads, dim)
        mine, theirs = (_stripe(piece, parts, r) for r in (3, 5))
        forward, backward = jax.jit(_forward), jax.jit(_backward)
        out, lse = forward(q, kv, mine, theirs)
        delta = (out * g.astype(jnp.float32)).sum(-1)
        flop = 4.0 * heads * dim * piece**2 / 2
        ahead = seconds(forward, q, kv, mine, theirs)
        back = seconds(backward, q, kv, g, lse, delta, mine, theirs)
        yield {
            "work": "hop", "shape": shape, "tokens": tokens, "parts": parts,
            "forward_ms": 1e3 * ahead, "backward_ms": 1e3 * back,
            "forward_tflops": flop / ahead / 1e12, "backward_tflops": 2.5 * flop / back / 1e12,
            "of_products": 3.5 * flop / (ahead + back) / 1e12 / limit["matmul_tflops"],
            # What a link must carry in that time: keys and values, and in float32 their gradients.
            "hides_gb_per_s": 4 * piece * kv_heads * dim / ahead / 1e9,
            "hides_gb_per_s_backward": 12 * piece * kv_heads * dim / back / 1e9,
        } | _ring_error(heads, kv_heads, dim)  # fmt: skip


def _pieces(length: int, heads: int, kv_heads: int, dim: int, seed: int = 0) -> list[jax.Array]:
    numbers = (
        jax.random.normal(jax.random.key(seed + i), (1, length, n, dim), jnp.bfloat16)
        for i, n in enumerate((heads, kv_heads, kv_heads, heads))
    )
    q, k, v, g = (blockwise.fold(x, kv_heads, flash_gpu.CHUNK) for x in numbers)
    return [q * jnp.asarray(dim**-0.5, q.dtype), jnp.stack([k, v], axis=1), g]


def _stripe(piece: int, parts: int, rank: int) -> jax.Array:
    position = jnp.arange(piece, dtype=jnp.int32)[None] * parts + rank
    return blockwise.fold_where(position, jnp.ones_like(position), flash_gpu.CHUNK)


def _ring_error(heads: int, kv_heads: int, dim: int, length: int = 4096, parts: int = 4) -> dict:
    """Four devices' hops, one after the other, on packed rows: against float32 without a ring."""
    position, segment = documents(1, length, 700)
    numbers = [
        np.asarray(jax.random.normal(jax.random.key(9 + i), (1, length, n, dim)))
        for i, n in enumerate((heads, kv_heads, kv_heads, heads))
    ]
    chunk = flash_gpu.CHUNK

    def at(x, rank):
        return jnp.asarray(x[:, rank::parts])

    def folded(x, rank):
        return blockwise.fold(at(x, rank).astype(jnp.bfloat16), kv_heads, chunk)

    ranks = range(parts)
    where = [blockwise.fold_where(at(position, r), at(segment, r), chunk) for r in ranks]
    qs = [folded(numbers[0], r) * jnp.bfloat16(dim**-0.5) for r in ranks]
    kvs = [jnp.stack([folded(x, r) for x in numbers[1:3]], axis=1) for r in ranks]
    gs, outs, grads = [folded(numbers[3], r) for r in ranks], [], []
    forward = jax.jit(functools.partial(kernels.TRITON.forward, softcap=None))
    backward = jax.jit(functools.partial(kernels.TRITON.backward, softcap=None))
    dkvs = [jnp.zeros(kv.shape, jnp.float32) for kv in kvs]
    for r in ranks:
        met = blockwise.nothing(qs[r])
        for hop in ranks:
            s = (r - hop) % parts
            met = forward(met, qs[r], kvs[s], Where(where[r], where[s]))
        out, lse = met
        delta, dq = (out * gs[r].astype(jnp.float32)).sum(-1), jnp.zeros_like(out)
        queries = Queries(qs[r], gs[r], lse, delta)
        for hop in ranks:
            s = (r - hop) % parts
            dq, dkv = backward(dq, queries, kvs[s], Where(where[r], where[s]))
            dkvs[s] = dkvs[s] + dkv
        outs.append(out)
        grads.append(dq)

    def whole(x):
        stripes = np.stack([blockwise.unfold(y, length // parts, chunk) for y in x], axis=2)
        return stripes.reshape(1, length, *stripes.shape[3:])

    keys = [whole([kv[:, i] for kv in dkvs]) for i in (0, 1)]
    got = [whole(outs), whole(grads) * dim**-0.5, *keys]
    mask = Mask(*map(jnp.asarray, (position, segment) * 2))

    def plain(q, k, v):
        return attention.plain(q, k, v, mask, scale=dim**-0.5)

    with jax.default_matmul_precision("highest"):
        out, pull = jax.vjp(plain, *map(jnp.asarray, numbers[:3]))
        want = [out, *pull(jnp.asarray(numbers[3]))]
    apart = [
        float(np.linalg.norm(x - np.asarray(y)) / np.linalg.norm(np.asarray(y)))
        for x, y in zip(got, want, strict=True)
    ]
    return {"ring_error": max(apart)}


def micro(model: str, longest: int) -> Any:
    """Steps of one micro-step over documents of many lengths, and of four.

    Documents of one length are padded rows of that length, which a step packs.
    """
    lm, cost = MODELS[model], _cost(model)
    start = jax.jit(lambda k: params.init(lm, k))(jax.random.key(0))
    models, rows, built, planned = None, [], 0.0, 0.0
    for each, cases in _cases(longest).items():
        count = max(size * repeat // each for size, repeat in cases)
        began = time.perf_counter()
        step = _packed_step(lm, cost, [size for size, _ in cases], (count, each))
        built += time.perf_counter() - began
        planned = max(planned, *(v["bytes"] for v in step.analysis().values()))
        models = models or {"actor": step.init("actor", start)}
        for size, repeat in cases:
            schedule, found = _full(cost, size, each, repeat), []
            batch = _rows(lm, len(schedule.lengths), (count, each))
            with mock.patch.object(skrull, "plan", lambda *_, now=schedule, **how: now):
                for number in range(4):
                    began = time.perf_counter()
                    models, _, m = step(models, batch, np.array([0, number], np.uint32))
                    jax.block_until_ready(m)
                    found.append(time.perf_counter() - began)
            taken, tokens = float(np.median(found[1:])), size * repeat
            of = cost_of(lm, flops_per_s=1, bytes_per_s=1, attention_share=1)
            needed = tokens // each * of.perfect(np.array([each]), 1)  # FLOP
            rows.append({
                "work": "micro", "model": model, "tokens": size, "documents": each,
                "micro_steps": repeat, "seconds": taken, "tokens_per_s": tokens / taken,
                "tflops": needed / taken / 1e12,
            })  # fmt: skip
            yield rows[-1]
    yield constants(model, rows) | {
        "compiled_s": built,
        "planned_gb": planned / 1e9,
        "peak_gb": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9,
    }


def _cases(longest: int) -> dict[int, list[tuple[int, int]]]:
    """Returns tokens of a document -> (tokens of a micro-step, micro-steps) to measure."""
    sizes = [n for n in (512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
             if n <= longest]  # fmt: skip
    out: dict[int, list[tuple[int, int]]] = {}
    for size in sizes:
        for each in sorted({size, min(size, 512), min(size, 4096)}):
            for repeat in (1, 4) if size <= 4096 else (1,):
                out.setdefault(each, []).append((size, repeat))
    return out


def _packed_step(lm: LMConfig, cost: Cost, sizes: list[int], padded: tuple[int, int]) -> Any:
    """Returns a compiled step for micro-batches of these sizes, from padded rows."""
    graph = sft.graph(sft.SFTConfig(), {"actor": lm})
    spec = Spec(params.abstract(lm), logical_axes(lm), optax.sgd(0.0))
    step = compile(graph, {"actor_train": Placement((0,))}, {"actor": spec}, pack=1)
    batch = _rows(lm, 0, padded)
    shapes = *(Shape(n, 0) for n in sorted({*sizes})), Shape(0, max(sizes))  # the last one must be
    return step.check(batch).scheduled(Packing(shapes, max(sizes), cost)).build(batch)


def _rows(lm: LMConfig, full: int, padded: tuple[int, int]) -> dict[str, np.ndarray]:
    """Returns padded rows: the first ones full of random tokens, the others empty."""
    rng, (count, length) = np.random.default_rng(0), padded
    tokens = rng.integers(4, lm.vocab, (full, length)).astype(np.int32)
    units = [((ids, np.ones(length, np.float32)),) for ids in tokens]
    return packing.lay_out([*units, *[()] * (count - full)], length=length)


def _cost(model: str) -> Cost:
    peak = devices.peak_flops_per_s(jax.devices()[0].device_kind, "bfloat16") or 1e15
    lm = MODELS[model]
    return cost_of(lm, flops_per_s=0.3 * peak, bytes_per_s=1e11, attention_half=1350)


def _full(cost: Cost, size: int, each: int, repeat: int) -> Assignment:
    """Micro-steps of one device, full of documents of one length."""
    lengths = np.full(repeat * (size // each), each)
    at, one = np.repeat(np.arange(repeat), size // each), np.zeros(len(lengths), int)
    shapes = (Shape(size, 0),) * repeat
    return Assignment(lengths, 1, 1, size, cost, shapes, at, one, one, 0.0, "", {})


def constants(model: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """`Cost`'s, fitted to half of the rows of `micro`, and by how much they miss the other half.

    On one device neither number of tokens at which a rate is half can be told from what else is
    paid a micro-step or a token: that of products is 0 here, that of attention as the kernel alone
    shows it.
    """
    cost = dataclasses.replace(_cost(model), half=0)
    made = [
        (_full(cost, r["tokens"], r["documents"], r["micro_steps"]), r["seconds"])
        for r in (rows[i] for i in np.random.default_rng(0).permutation(len(rows)))
    ]
    one = refit(cost, [(s.terms(), t) for s, t in made[::2]], trust=1e-3)
    errors = np.abs([_predicted(s, one) / t - 1 for s, t in made])
    return {
        "work": "constants", "model": model, "attention_half": one.attention_half,
        "products_tflops": one.flops_per_s / 1e12, "attention_tflops": one.attention_per_s / 1e12,
        "micro_ms": 1e3 * one.micro_seconds, "step_ms": 1e3 * one.step_seconds,
        "error_fitted": float(errors[::2].mean()), "error_others": float(errors[1::2].mean()),
        "error_most": float(errors[1::2].max()),
    }  # fmt: skip


def fitted_again(models: list[str], file: Path) -> Any:
    known = [json.loads(line) for line in file.read_text().splitlines()]
    for model in models:
        rows = [r for r in known if r["work"] == "micro" and r["model"] == model]
        if rows:
            yield constants(model, rows)


def _predicted(schedule: Assignment, cost: Cost) -> float:
    again = dataclasses.replace(schedule, cost=cost)
    return float(again.rank_seconds().max((1, 2)).sum()) + cost.step_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    works = ("attention", "hop", "errors", "tiles", "met", "micro", "constants")
    parser.add_argument("--work", nargs="+", default=["attention", "hop", "micro"], choices=works)
    parser.add_argument("--models", nargs="+", default=["0.5b", "7b"], choices=list(MODELS))
    parser.add_argument("--longest", type=int, default=131_072, help="tokens of a micro-step")
    parser.add_argument("--sizes", default="few", choices=["few", "all"], help="of tiles")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    limit = {}
    if not {*args.work} <= {"met", "constants"}:  # which ask no device
        limit = limits()
        _tell(args.out, limit)
    rows = {
        "attention": lambda: compared(limit, tuple(x for x in ROWS if x[1] <= args.longest)),
        "hop": lambda: hop(limit),
        "errors": errors,
        "tiles": lambda: tiles(args.sizes),
        "met": met,
        "micro": lambda: (row for m in args.models for row in micro(m, args.longest)),
        "constants": lambda: fitted_again(args.models, args.out),
    }
    for work in args.work:
        for row in rows[work]():
            _tell(args.out, row)


def limits() -> dict[str, Any]:
    began = time.perf_counter()
    return {
        "work": "limits", "device": jax.devices()[0].device_kind, "jax": jax.__version__,
        "kernel": kernels.best().name, "checked_s": time.perf_counter() - began,
        "matmul_tflops": devices.measure_matmul("bfloat16") / 1e12,
        "copy_tb_per_s": devices.measure_copy() / 1e12,
    }  # fmt: skip


def _tell(out: Path | None, row: dict[str, Any]) -> None:
    def rounded(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: rounded(v) for k, v in x.items()}
        return float(f"{x:.4g}") if isinstance(x, float) else x

    text = json.dumps(rounded(row))
    print(text, flush=True)
    if out is not None:
        with out.open("a") as f:
            f.write(text + "\n")


if __name__ == "__main__":
    main()
