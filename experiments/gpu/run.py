r"""SFT, GRPO and decoding of Qwen-shaped models on one GPU, against its measured limits.

  python experiments/gpu/run.py --work attention sft grpo decode --shape qwen2.5-0.5b

Weights are random (a timing does not depend on them, and nothing is downloaded); text is random
letters. Every line of results is a JSON object, also appended to `--out`. A rate is given beside
the limit that was measured in the same process: matrix products in bfloat16 of random numbers, and
a copy through the GPU's memory, bytes read and written both counted.
"""

import argparse
import collections
import functools
import json
import random
import string
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_eff import core
from jaxrl_eff.models import LMConfig, attention, heads, params
from jaxrl_eff.parallel import devices
from jaxrl_eff.parallel.attention import sequence
from jaxrl_eff.rollout import Sampling, sample
from jaxrl_eff.train import assembly, settings, state
from jaxrl_eff.train import loop as train

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": dict(
        vocab=151936, layers=24, width=896, heads=14, kv_heads=2, head_dim=64, ffn=4864,
        qkv_bias=True, tie=True,
    ),
    "qwen2.5-1.5b": dict(
        vocab=151936, layers=28, width=1536, heads=12, kv_heads=2, head_dim=128, ffn=8960,
        qkv_bias=True, tie=True,
    ),
    "tiny": dict(
        vocab=512, layers=2, width=64, heads=4, kv_heads=2, head_dim=16, ffn=128, qkv_bias=True,
        tie=True,
    ),
}  # fmt: skip
COMMON = dict(dtype="bfloat16", eos=(), pad=0, max_length=8192)
LETTERS = string.ascii_lowercase + " "


def texts(n: int, low: int, high: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS, k=rng.randint(low, high))) for _ in range(n)]


def alphabet(vocab: int) -> str:
    """As many characters as a model of this vocabulary may draw, special tokens apart."""
    return LETTERS + "".join(chr(0x10000 + i) for i in range(vocab - 3 - len(LETTERS)))


def config(args: argparse.Namespace, work: str) -> dict[str, Any]:
    shape = dict(SHAPES[args.shape], **COMMON)
    if work == "sft":
        rows = [{"text": t} for t in texts(4 * args.rows, args.length // 8, args.length // 2, 0)]
        data = dict(source="inline", format="text", length=args.length, eos=False, bos=False)
        stage = dict(algorithm="sft", batch=args.rows)
    else:
        rows = [{"prompt": t} for t in texts(64, args.prompt - 1, args.prompt - 1, 0)]
        data = dict(source="inline", format="prompt", prompt_length=args.prompt, bos=False)
        stage = dict(algorithm="grpo", batch=args.prompts, loss=dict(beta=0.04))
        stage["sampling"] = dict(max_tokens=args.new, samples=args.samples)
        stage["reward"] = dict(name="contains", options=dict(words=("e",)))
        stage["plan"] = dict(default=dict(), actor_train=dict(microbatches=args.microbatches))
    stage["data"] = dict(data, options=dict(examples=rows))
    stage["optim"] = dict(actor=dict(name="adamw", lr=1e-5))
    model = dict(shape=shape, remat=args.remat)
    return dict(
        model=model, tokenizer=f"chars:{alphabet(shape['vocab'])}", stages=("bench",),
        bench=stage | dict(steps=args.steps, samples_every=0),
    )  # fmt: skip


def limits() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "matmul_tflops": devices.measure_matmul("bfloat16") / 1e12,
        "copy_tb_per_s": devices.measure_copy() / 1e12,
    }


def loop(args: argparse.Namespace, work: str, limit: dict[str, Any]) -> dict[str, Any]:
    """Steps as `train.fit` takes them: seconds a step, useful FLOPs, peak memory."""
    began = time.perf_counter()
    assembled = assembly.assemble(settings.run(config(args, work)))
    stage = assembled.stages[0]
    with train.getting_ready(stage):
        models = state.initial(assembled, stage, {})
    ready = time.perf_counter() - began
    seconds, calls, rows = [], [], []
    for t in range(args.steps):
        batch = next(stage.loader)
        start = time.perf_counter()
        models, _, metrics = stage.step(models, batch, assembly.words(0, "bench", t))
        metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
        seconds.append(time.perf_counter() - start)
        calls.append(stage.step.timeline.seconds())
        rows.append(batch)
    lm = stage.lms["actor"]
    median = float(np.median(seconds[2:]))
    split = {k: float(np.median([c[k] for c in calls[2:]])) for k in calls[-1]}
    out = {
        "work": work, "attention": _attention(lm), "ready_s": ready,
        "first_step_s": seconds[0], "step_s": median, "calls_s": split,
        "planned_gib": max(a["bytes"] for a in stage.step.analysis().values()) / 2**30,
        "memory_gib": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30,
        "metrics": metrics,
    }  # fmt: skip
    if work == "sft":
        tokens = float(np.mean([(b["segment"] > 0).sum() for b in rows[2:]]))
        # A token of a packed document sees on average half of that document.
        seen = float(np.mean([b["position"][b["segment"] > 0].mean() for b in rows[2:]]))
        flops = 3 * tokens * params.flops_per_token(lm, seen)
        out |= {"tokens_per_s": tokens / median} | _share(flops, median, limit)
    else:
        count = args.prompts * args.samples
        length = args.prompt + args.new
        forward = count * length * params.flops_per_token(lm, length / 2)
        out["train"] = _share(3 * forward, split["actor_train"], limit)
        out["ref"] = _share(forward, split["ref_inf"], limit)
        out["decode"] = _decode(lm, args, split["actor_gen"], limit)
        out["tokens_per_s"] = count * args.new / median
    if args.profile:

        def once() -> None:
            new = stage.step(models, batch, assembly.words(0, "bench", 0))
            jax.block_until_ready(new)

        out["kernels"] = profiled(once, args.profile)
    return out


def _attention(lm: LMConfig) -> str:
    """Of whole rows."""
    kernel = sequence.for_whole_rows() and sequence.fits_whole_rows(lm.head_dim, lm.dtype)
    return sequence.kernel().name if kernel else attention.choose(lm).__name__


def _share(flops: float, seconds: float, limit: dict[str, Any]) -> dict[str, float]:
    rate = flops / seconds / 1e12
    return {"tflops": rate, "mfu_of_measured": rate / limit["matmul_tflops"]}


def _decode(lm: LMConfig, args: Any, seconds: float, limit: dict[str, Any]) -> dict[str, float]:
    """Bytes that must be read: the weights once a token, and the cache of what stands before it."""
    rows = args.prompts * args.samples
    weights = 2 * params.count(lm)
    slot = 2 * 2 * lm.layers * lm.kv_heads * lm.head_dim
    cache = rows * slot * (args.prompt + args.new / 2)
    rate = args.new * (weights + cache) / seconds / 1e12
    return {
        "tokens_per_s": rows * args.new / seconds,
        "ms_per_token": 1e3 * seconds / args.new,
        "tb_per_s": rate,
        "of_measured_copy": rate / limit["copy_tb_per_s"],
    }


def decode(args: argparse.Namespace, limit: dict[str, Any]) -> dict[str, Any]:
    """The rollout alone, parameters in bfloat16."""
    lm = LMConfig(**SHAPES[args.shape], **COMMON, param_dtype="bfloat16")
    sampling = Sampling(
        max_tokens=args.new, samples=args.samples, growths=args.growths,
        unstack={"auto": None, "yes": True, "no": False}[args.unstack],
    )  # fmt: skip
    attend = OTHERS.get(args.decode_attend) or getattr(attention, args.decode_attend or "plain")
    attend = attend if args.decode_attend else attention.choose(lm)
    reads, writes = "prompt prompt_length", "tokens segment position mask logp group"
    call = core.generate(
        "actor_gen", of="actor", fn=sample(lm, sampling, attend=attend), reads=reads, writes=writes
    )
    spec = core.Spec(params.abstract(lm), params.logical_axes(lm))
    place = {"actor_gen": core.Placement((0,))}
    step = core.compile(core.Graph(reads, (call,)), place, {"actor": spec}, keep="tokens")
    batch = {
        "prompt": np.random.default_rng(0).integers(4, 256, (args.prompts, args.prompt), np.int32),
        "prompt_length": np.full(args.prompts, args.prompt, np.int32),
    }
    models = {"actor": core.Model(params.init(lm, jax.random.key(0)))}
    began = time.perf_counter()
    step.build(batch)
    ready = time.perf_counter() - began
    seconds = []
    for t in range(args.steps):
        start = time.perf_counter()
        models, data, _ = step(models, batch, assembly.words(0, "bench", t))
        jax.block_until_ready(data)
        seconds.append(time.perf_counter() - start)
    kernels = {}
    if args.profile:
        run = lambda: jax.block_until_ready(step(models, batch, assembly.words(0, "bench", 0)))  # noqa: E731
        kernels["kernels"] = profiled(run, args.profile)
    out = {
        "work": "decode",
        "attend": attend.__name__,
        "unstack": args.unstack,
        "growths": args.growths,
        "compile_s": ready,
    }
    return out | kernels | _decode(lm, args, float(np.median(seconds[1:])), limit)


def compare_attention(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of every attention at hand, forward and with gradients, and their errors."""
    shape = SHAPES[args.shape]
    rows, length, dim = args.rows, args.length, shape["head_dim"]
    heads = (shape["heads"], shape["kv_heads"], shape["kv_heads"], shape["heads"])
    q, k, v, g = (
        jax.random.normal(jax.random.key(i), (rows, length, n, dim), jnp.bfloat16)
        for i, n in enumerate(heads)
    )
    segment, position = _packed(rows, length)
    kinds = {"plain": attention.plain, "fused": attention.fused} | OTHERS
    out: dict[str, Any] = {"work": "attention", "rows": rows, "length": length}
    exact = None
    for name, fn in kinds.items():

        def run(q, k, v, fn=fn):
            mask = attention.Mask(position, segment, position, segment)
            return fn(q, k, v, mask, scale=dim**-0.5)

        def both(q, k, v, g, run=run):
            y, back = jax.vjp(run, q, k, v)
            return y, back(g)

        try:
            forward, everything = jax.jit(run), jax.jit(both)
            if exact is None:
                exact = everything(*(x.astype(jnp.float32) for x in (q, k, v, g)))
            got = everything(q, k, v, g)
            errors = jax.tree.map(_relative, got, exact)
            out[name] = {
                "forward_ms": 1e3 * _seconds(functools.partial(forward, q, k, v)),
                "both_ms": 1e3 * _seconds(functools.partial(everything, q, k, v, g)),
                "error": max(jax.tree.leaves(errors)),
                "temporary_mib": everything.lower(q, k, v, g)
                .compile()
                .memory_analysis()
                .temp_size_in_bytes
                / 2**20,
            }
        except Exception as error:  # what a kernel refuses is a result as well
            out[name] = f"{type(error).__name__}: {str(error)[:300]}"
    return out


def masked(q, k, v, mask, *, scale, softcap=None):
    """cuDNN with everything in the mask, so that nothing is skipped."""
    seen = mask.seen()
    out = jax.nn.dot_product_attention(
        q, k, v, mask=seen[:, None], scale=scale, implementation="cudnn"
    )
    return jnp.where((mask.q_segment > 0)[:, :, None, None], out, jnp.zeros((), out.dtype))


def packed(q, k, v, mask, *, scale, softcap=None):
    """cuDNN told where each of at most 16 documents of a row begins (private to JAX)."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    n = jnp.arange(1, 17, dtype=jnp.int32)
    size = (mask.q_segment[:, None, :] == n[None, :, None]).sum(-1, dtype=jnp.int32)
    before = jnp.cumsum(size, axis=1, dtype=jnp.int32) - size
    there = size > 0
    starts = jnp.where(there, before, -1)
    total = size.sum(1)
    count = there.sum(1)
    starts = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    at = jnp.arange(17)[None, :] == count[:, None]
    starts = jnp.where(at, total[:, None], starts)
    length = jnp.where(there, size, -1)
    out = dot_product_attention(
        q, k, v, q_seqlen=length, kv_seqlen=length, q_offsets=starts, kv_offsets=starts,
        scale=scale, mask_type=MaskType.PADDING_CAUSAL,
    )  # fmt: skip
    return jnp.where((mask.q_segment > 0)[:, :, None, None], out, jnp.zeros((), out.dtype))


def triton(q, k, v, mask, *, scale, softcap=None):
    """The Pallas kernel that comes with JAX; key heads repeated."""
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    groups = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    sizes = BlockSizes(
        block_q=128, block_k=64, block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64
    )
    out = mha(q, k, v, mask.q_segment, sm_scale=scale, causal=True, block_sizes=sizes)
    return jnp.where((mask.q_segment > 0)[:, :, None, None], out, jnp.zeros((), out.dtype))


OTHERS = {"masked": masked, "packed": packed, "triton": triton}


def _packed(rows: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Segments and positions of documents packed into rows, with padding behind."""
    rng = np.random.default_rng(0)
    segment, position = np.zeros((2, rows, length), np.int32)
    for r in range(rows):
        at, n = 0, 1
        while at < length - length // 16:
            size = min(int(rng.integers(length // 16, length // 2)), length - at)
            segment[r, at : at + size], position[r, at : at + size] = n, np.arange(size)
            at, n = at + size, n + 1
    return jnp.asarray(segment), jnp.asarray(position)


def _relative(a: jax.Array, b: jax.Array) -> float:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def _seconds(fn: Any, repeat: int = 10) -> float:
    jax.block_until_ready(fn())
    best = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeat):
            out = fn()
        jax.block_until_ready(out)
        best.append((time.perf_counter() - start) / repeat)
    return float(np.median(best))


def profiled(fn: Any, top: int) -> list[list[Any]]:
    """Kernels that take most of a call of `fn`: [name, milliseconds, how often]."""
    folder = tempfile.mkdtemp()
    with jax.profiler.trace(folder):
        fn()
    file = next(Path(folder).rglob("*.xplane.pb"))
    spent: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines if "GPU" in plane.name else ():
            for event in line.events if line.name.startswith("Stream") else ():
                spent[event.name][0] += event.duration_ns / 1e6
                spent[event.name][1] += 1
    rows = sorted(spent.items(), key=lambda kv: -kv[1][0])
    total = [["all", sum(t for _, (t, _) in rows), sum(n for _, (_, n) in rows)]]
    return total + [[name[:70], ms, n] for name, (ms, n) in rows[:top]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", nargs="+", default=["attention", "sft", "grpo", "decode"])
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--growths", type=int, default=1)
    parser.add_argument("--unstack", default="auto", choices=["auto", "yes", "no"])
    parser.add_argument("--remat", default="none")
    parser.add_argument("--rows_by", default="auto", choices=["auto", "masked"])
    parser.add_argument("--decode_attend", default="", choices=["", "fused", "plain", "masked"])
    parser.add_argument("--profile", type=int, default=0, help="print the n dearest kernels")
    parser.add_argument("--chunk", type=int, default=0, help="log2 of the logits at once")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.chunk:
        heads.CHUNK_LOGITS = heads.CHUNK_LOGITS_CPU = 2**args.chunk
    if args.rows_by == "masked":  # by cuDNN, although there is a kernel
        sequence.for_whole_rows = lambda: False
    limit = limits()
    _tell(args.out, {"work": "limits"} | limit)
    for work in args.work:
        if work == "attention":
            found = compare_attention(args)
        elif work == "decode":
            found = decode(args, limit)
        else:
            found = loop(args, work, limit)
        _tell(args.out, {"shape": args.shape} | found)


def _tell(out: Path | None, row: dict[str, Any]) -> None:
    text = json.dumps(_rounded(row))
    print(text, flush=True)
    if out is not None:
        with out.open("a") as f:
            f.write(text + "\n")


def _rounded(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_rounded(v) for v in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


if __name__ == "__main__":
    main()
