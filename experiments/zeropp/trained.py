"""The rungs of `config.STAGE.zero` as training takes them: the character model, two nodes of four.

  python -m experiments.zeropp.trained [--steps=1000] [--seeds=3] [--rungs=NAME ...]

What a run does, without its files: an SFT step compiled for a plan with dcn=2 and fsdp=4, whose
weights and gradients travel as the rung says, each kernel by itself. The validation loss is of the
float32 weights. Results are added to `results.json`; what is there already is not run again.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from experiments.zeropp.lm import DEVICES, language_model  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.collage.run import LENGTH, ROWS, loss, model
from jaxrl_eff import core
from jaxrl_eff.algorithms import sft
from jaxrl_eff.models import init, params
from jaxrl_eff.parallel import Placement
from jaxrl_eff.parallel.zero import levels

OUT = Path(__file__).parent / "results.json"
RUNGS = ("", "exact", "int8", "int4", "int4_delta", "qgz")


def compiled(cfg, rung: str, steps: int) -> core.Step:
    """The train call of SFT; without a rung the compiler shards it as it likes."""
    tx = optax.adamw(optax.cosine_decay_schedule(1e-3, steps), weight_decay=0.1)
    plan = levels.ZeroConfig(levels.zero_level(rung), block=256) if rung else None
    spec = core.Spec(params.abstract(cfg), params.logical_axes(cfg), tx, plan)
    graph = sft.graph(sft.SFTConfig(), {"actor": cfg})
    place = Placement(tuple(range(DEVICES)), dcn=2, fsdp=4)
    return core.compile(graph, {"actor_train": place}, {"actor": spec}).build(
        rows(np.zeros((ROWS, LENGTH), np.int32))
    )


def rows(tokens: np.ndarray) -> dict[str, np.ndarray]:
    position = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return {
        "tokens": tokens.astype(np.int32),
        "position": position,
        "segment": np.ones(tokens.shape, np.int32),
        "mask": (position > 0).astype(np.float32),
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=RUNGS, metavar="NAME")
    args = parser.parse_args()
    lm = language_model()
    cfg = model(int(max(lm.training.max(), lm.validation.max())) + 1)
    held_out = jnp.asarray(lm.batches(10_000, 40, validation=True))
    validate = jax.jit(lambda p: jax.lax.map(lambda t: loss(cfg, p, t), held_out).mean())
    results = json.loads(OUT.read_text()) if OUT.exists() else {}
    for rung in args.rungs:
        step = compiled(cfg, rung, args.steps)
        for seed in range(args.seeds):
            key = f"trained steps={args.steps} seed={seed}: {rung or 'compiler'}"
            if key in results:
                continue
            began, losses = time.time(), []
            where = jax.tree.map(lambda x: x.sharding, step.home("actor").params)
            start = jax.device_put(init(cfg, jax.random.key(seed)), where)
            models = {"actor": step.init("actor", start)}
            for t, tokens in enumerate(lm.batches(seed, args.steps)):
                models, _, seen = step(models, rows(tokens), np.array([seed, t], np.uint32))
                losses.append(seen["actor_train/loss"])
            final = jax.tree.map(np.asarray, models["actor"].params)
            found = {
                "validation": float(validate(final)),
                "training": np.array(losses).reshape(-1, 50).mean(axis=1).tolist(),
            }
            results[key] = found
            OUT.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{key}: {found['validation']:.4f}, {time.time() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
