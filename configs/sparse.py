r"""Training a part of a model: SFT of the digits toy, then GRPO of 1 % of the entries or of LoRA.

  python -m jaxrl_eff.main --config=configs/sparse.py --workdir=runs/sparse
  python -m jaxrl_eff.main --config=configs/sparse.py:way=lora --workdir=runs/sparse_lora

`way` is "random" (a fixed 1 % at random), "spiel" (SpIEL: drop and grow by gradients), "blocks"
(8 x 8 blocks by gradients, anew every 20 steps), "lora", "qlora" (LoRA on a base of 4 bits),
"dora", "lisa" (one layer at a time), or "all" to compare with. The model is first trained whole by
SFT, since a random one has nothing to be adapted. Results of one seed stand in experiments/sparse.

With a model of your own: --config.model.path=DIR --config.model.shape="{}"
--config.tokenizer=model --config.stages="('grpo',)" --config.grpo.models.actor=base, and data.
"""

from configs import common

# Few entries need larger steps than all of them: 10 to 30 times.
WAYS = dict(
    random=(1e-2, dict(name="static", selector="random", density=0.01)),
    spiel=(1e-2, dict(name="spiel_ag", selector="gradient", density=0.01, every=20)),
    blocks=(
        1e-2,
        dict(name="periodic", selector="gradient", granularity="block", block=(8, 8), density=0.01),
    ),
    lora=(3e-3, dict(name="lora", rank=4, alpha=8.0)),
    qlora=(3e-3, dict(name="lora", rank=4, alpha=8.0, base="nf4")),
    dora=(3e-3, dict(name="dora", rank=4, alpha=8.0)),
    lisa=(1e-3, dict(name="lisa", layers=1, every=20)),
    all=(1e-3, None),
)


def get_config(arg=None):
    a = common.parse_arg(arg, way="random")
    if a["way"] not in WAYS:
        raise ValueError(f"way={a['way']!r}; there are {sorted(WAYS)}.")
    lr, part = WAYS[a["way"]]
    c = common.digits_run("sft", "grpo")
    c.sft = common.digits_sft()
    c.grpo = common.digits_rl("grpo")
    c.grpo.optim.actor.lr = lr
    c.grpo.adapt = dict(actor=part) if part else dict()
    return c
