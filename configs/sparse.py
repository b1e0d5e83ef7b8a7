r"""Training a part of a model: SFT of the digits toy, then GRPO of 1 % of the entries or of LoRA.

  python -m jaxrl_eff.main --config=configs/sparse.py --workdir=runs/sparse
  python -m jaxrl_eff.main --config=configs/sparse.py:way=lora --workdir=runs/sparse_lora

`way` is "random" (a fixed 1 % at random), "spiel" (SpIEL: drop and grow by gradients), "blocks"
(8 x 8 blocks by gradients, anew every 20 steps), "lora" or "dora". The model is first trained whole
by SFT, since a random one has nothing to be adapted.

With a model of your own: --config.model.path=DIR --config.model.shape="{}"
--config.tokenizer=model --config.stages="('grpo',)" --config.grpo.models.actor=base, and data.
"""

from configs import common

WAYS = dict(
    random=dict(name="static", selector="random", density=0.01),
    spiel=dict(name="spiel_ag", selector="gradient", density=0.01, every=20),
    blocks=dict(
        name="periodic", selector="gradient", granularity="block", block=(8, 8), density=0.01
    ),
    lora=dict(name="lora", rank=4, alpha=8.0),
    dora=dict(name="dora", rank=4, alpha=8.0),
)


def get_config(arg=None):
    a = common.parse_arg(arg, way="random")
    if a["way"] not in WAYS:
        raise ValueError(f"way={a['way']!r}; there are {sorted(WAYS)}.")
    c = common.digits_run("sft", "grpo")
    c.sft = common.digits_sft()
    c.grpo = common.digits_rl("grpo")
    # Few entries need larger steps: 10 to 30 times those of training all.
    c.grpo.optim.actor.lr = 1e-2
    c.grpo.adapt = dict(actor=WAYS[a["way"]])
    return c
