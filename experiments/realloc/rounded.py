"""What rounded weights change in the logits of a model, and the bytes that they take to send.

    python experiments/realloc/rounded.py MODEL [--rows=16] [--tokens=256]

MODEL is a Hugging Face directory. The model samples rows at temperature 1 with exact weights; the
same rows are then read with weights as a call with `weights="int8"` or `"int4"` reads them. Bytes
are planned ones, from the first four of eight simulated devices to the others.
"""

import argparse

PARSER = argparse.ArgumentParser(description=__doc__.split("\n")[0])
PARSER.add_argument("model")
PARSER.add_argument("--rows", type=int, default=16)
PARSER.add_argument("--tokens", type=int, default=256, help="of a row")

if __name__ == "__main__":
    ARGS = PARSER.parse_args()
    from jaxrl_eff.parallel import host

    host.simulate(8)

import jax
import jax.numpy as jnp

from jaxrl_eff import LMConfig, Spec, abstract, load_hf, logical_axes, read_config
from jaxrl_eff.core import Call, Graph
from jaxrl_eff.core.shardings import Shardings
from jaxrl_eff.core.weight_sources import WeightSources
from jaxrl_eff.models import apply, unembed
from jaxrl_eff.parallel import Placement, rules
from jaxrl_eff.rollout import Sampling, sample

PRECISIONS = ("", "int8", "int4")
QWEN = LMConfig(  # the sizes of Qwen2.5 0.5B
    vocab=151_936, layers=24, width=896, heads=14, kv_heads=2, head_dim=64, ffn=4864, tie=True
)
TRAINED = {"replicated": Placement((0, 1, 2, 3)), "fsdp 4": Placement((0, 1, 2, 3), fsdp=4)}
SAMPLED = {
    "replicated": Placement((4, 5, 6, 7)),
    "data 2 x tensor 2": Placement((4, 5, 6, 7), data=2, tensor=2),
}


def source(lm, dtype, trained, sampled, precision):
    """The route of weights to a call that reads them in a precision."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), abstract(lm))
    spec = Spec(shapes, logical_axes(lm))
    calls = tuple(
        Call(name, "infer", "actor", lambda *_: {}, (), weights=weights)
        for name, weights in (("home", ""), ("read", precision))
    )
    plan = {"home": trained, "read": sampled}
    shardings = Shardings(Graph("", calls), plan, {"actor": spec})
    return WeightSources(shardings, None, None).route(calls[1])


def rounded(lm, params, precision):
    """The weights as a call reads them on the device that holds them."""
    one = Placement((0,))
    route = source(lm, lm.param_dtype, one, one, precision)
    where = rules(one, {}).tree(logical_axes(lm))
    return route(jax.device_put(params, where))


def rows_of(lm, params, rows, tokens):
    """Rows that the model samples from its first token."""
    prompt = {
        "prompt": jnp.full((rows, 1), lm.bos, jnp.int32),
        "prompt_length": jnp.ones(rows, jnp.int32),
        "prompt_example": jnp.arange(rows, dtype=jnp.int32),
    }
    fn = sample(lm, Sampling(max_tokens=tokens - 1))
    return jax.jit(fn)(params, prompt, jax.random.key(0))


def logits(lm, params, found):
    hidden, _ = apply(lm, params, found["tokens"], found["position"], found["segment"])
    return unembed(lm, params, hidden).astype(jnp.float32)


def errors(exact, rounded, found):
    """Numbers over the tokens that were sampled."""
    p, q = jax.nn.log_softmax(exact), jax.nn.log_softmax(rounded)
    mask = found["mask"][:, 1:].astype(jnp.float32)
    mean = lambda x: float((x[:, :-1] * mask).sum() / mask.sum())  # noqa: E731
    centered = exact - exact.mean(-1, keepdims=True)
    apart = rounded - exact
    apart = apart - apart.mean(-1, keepdims=True)  # a common shift changes no probability
    picked = jnp.take_along_axis(p - q, jnp.roll(found["tokens"], -1, 1)[..., None], -1)[..., 0]
    return {
        "error, root mean square": mean((apart**2).mean(-1)) ** 0.5,
        "of the logits'": (mean((apart**2).mean(-1)) / mean((centered**2).mean(-1))) ** 0.5,
        "KL, nats a token": mean((jnp.exp(p) * (p - q)).sum(-1)),
        "|log-probability apart|": mean(jnp.abs(picked)),
        "same likeliest token": mean((exact.argmax(-1) == rounded.argmax(-1)).astype(jnp.float32)),
    }


def main(args):
    lm = read_config(args.model)
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}, {args.model}")
    params = load_hf(args.model, lm)
    found = rows_of(lm, params, args.rows, args.tokens)
    read = jax.jit(lambda p: logits(lm, p, found))
    exact = read(params)
    table = {p: errors(exact, read(rounded(lm, params, p)), found) for p in PRECISIONS[1:]}
    print(f"{int(found['mask'].sum())} sampled tokens\n| weights | {' | '.join(table['int8'])} |")
    print("|---|" + "---|" * len(table["int8"]))
    for p, row in table.items():
        print(f"| {p} | {' | '.join(f'{x:.3g}' for x in row.values())} |")
    print("\n| model | trained, read | dtype | as trained, MB | int8 | int4 |")
    print("|---|---|---|---|---|---|")
    for name, of, trained, sampled in (
        ("this one", lm, "replicated", "replicated"),
        ("Qwen2.5 0.5B", QWEN, "fsdp 4", "replicated"),
        ("Qwen2.5 0.5B", QWEN, "fsdp 4", "data 2 x tensor 2"),
    ):
        for dtype in ("float32", "bfloat16"):
            ends = TRAINED[trained], SAMPLED[sampled]
            whole, *less = (source(of, dtype, *ends, p).report().received for p in PRECISIONS)
            shares = " | ".join(f"{x / 1e6:,.2f} ({x / whole:.3f})" for x in less)
            print(f"| {name} | {trained}, {sampled} | {dtype} | {whole / 1e6:,.2f} | {shares} |")


if __name__ == "__main__":
    main(ARGS)
