r"""Fine-tuning on short and long sequences at once: long ones over the devices of a `seq` axis.

  python -m jaxrl_eff.main --config=configs/long_sft.py --workdir=runs/long
  python -m jaxrl_eff.main --config=configs/long_sft.py:model=DIR,data=FILE,seq=8 --workdir=DIR

Without a model it learns to find a digit in a row of letters, from scratch, on four simulated
devices. `data` is a jsonl file of chat messages; `seq` how many devices share a long sequence;
`length` the longest one kept, in tokens (0: what fits). `stretch=4` extends the context of a model
four times by YaRN before it is fine-tuned. How many tokens a device holds is found by compiling;
--config.sft.schedule.room=N says it. To see first what a schedule would gain on your lengths:
python -m jaxrl_eff balance --help. What came of it: python -m jaxrl_eff needle --help.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg=None):
    a = common.parse_arg(arg, model="", data="", seq=2, length=0, stretch=1.0, steps=300)
    c = ConfigDict()
    c.seed = 0
    c.stages = ("sft",)
    c.sft = dict(
        algorithm="sft",
        steps=a["steps"],
        batch=64,
        optim=dict(actor=dict(lr=1e-5, schedule="cosine", warmup=10)),
        plan=dict(default=dict(seq=a["seq"])),
        schedule=dict(name="skrull"),
    )
    if a["model"]:
        if not a["data"]:
            raise ValueError("with model=DIR say data=FILE, a jsonl file of chat messages.")
        c.model = dict(path=a["model"], dtype="bfloat16", remat="attention")
        c.sft.data = dict(path=a["data"], format="messages", length=a["length"])
    else:
        c.simulate_devices = 4
        c.tokenizer = "chars:abcdefghij0123456789=?"
        c.model = common.tiny_model()
        c.model.shape.max_length = 1024
        c.sft.optim.actor.lr = 3e-3
        c.sft.schedule.shapes = 4
        c.sft.data = dict(source="needles", format="completion", prompt_length=512, length=520)
        c.sft.evaluate = dict(problems=128, max_tokens=2, reward=dict(name="gold"))
    if a["stretch"] > 1:
        c.model.rope = dict(kind="yarn", factor=a["stretch"])
    return c
