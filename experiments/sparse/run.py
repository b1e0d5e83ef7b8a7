r"""Bytes and FLOPs of ways to train, from compiled programs: no step is run.

  python experiments/sparse/run.py

Prints for every way the bytes of arguments (parameters and optimizer state) and of temporaries of a
whole SFT update, those of the program that chooses anew, and the FLOPs of one layer's passes (XLA
counts the body of the loop over layers once). Float32, since XLA's CPU backend widens bfloat16
weights into copies of their own.
"""

import jax
import jax.numpy as jnp
import optax

from jaxrl_eff import core, models
from jaxrl_eff.algorithms import sft
from jaxrl_eff.models import LMConfig, params
from jaxrl_eff.optim import optimizer
from jaxrl_eff.peft import ways
from jaxrl_eff.train import settings

LM = LMConfig(
    vocab=32, layers=12, width=256, heads=4, kv_heads=4, head_dim=64, ffn=768, unroll=1,
    remat="full",
)  # fmt: skip
ROWS, LENGTH = 2, 64
WAYS = {
    "all": None,
    "static entries, 1 %": dict(name="static"),
    "static 32 x 32 blocks, 1 %": dict(name="static", granularity="block", block=(32, 32)),
    "SpIEL-AG entries, 1 %": dict(name="spiel_ag", selector="gradient"),
    "overlay entries, 1 %": dict(name="static", mode="overlay"),
    "LoRA, rank 4": dict(name="lora", rank=4),
    "LoRA, rank 4, on int8": dict(name="lora", rank=4, base="int8"),
    "LoRA, rank 4, on nf4": dict(name="lora", rank=4, base="nf4"),
    "DoRA, rank 4": dict(name="dora", rank=4),
    "LISA, 1 of 12 layers": dict(name="lisa", layers=1),
    "one block of one matrix": dict(
        name="static", targets=("layers/attn/v/kernel",), granularity="block", block=(64, 64)
    ),
}


def spec(way):
    if way is None:
        tx = optimizer("adam", 1e-3, clip_norm=1.0)
        return core.Spec(params.abstract(LM), models.logical_axes(LM), tx)
    optim = settings.OptimSettings(name="adam")
    part = settings.AdaptSettings(**way)
    return ways.spec(part, LM, optim, optax.constant_schedule(1e-3), 1000)


def main():
    whole = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    batch = dict.fromkeys(("tokens", "segment", "position"), whole)
    batch["mask"] = jax.ShapeDtypeStruct(whole.shape, jnp.float32)
    graph = sft.graph(sft.SFTConfig(), {"actor": LM})
    print(f"{'':28} arguments  temporaries  choosing: temporaries   MFLOP")
    for name, way in WAYS.items():
        place = {"actor_train": core.Placement((0,))}
        step = core.compile(graph, place, {"actor": spec(way)}).build(batch)
        memory = step.memory("actor_train")
        again = step.memory("actor_train", choosing=True)
        flops = step.analysis()["actor_train"]["flops"]
        print(
            f"{name:28} {memory.argument_size_in_bytes / 1e6:9.2f}  "
            f"{memory.temp_size_in_bytes / 1e6:11.2f}  "
            f"{'' if again is None else f'{again.temp_size_in_bytes / 1e6:.2f}':>21} "
            f"{flops / 1e6:7.1f}"
        )


if __name__ == "__main__":
    main()
