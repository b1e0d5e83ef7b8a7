"""A run of seconds for every algorithm: a char model of two layers on the toy of reversed digits.

  python -m jaxrl_eff.main --config=tests/tiny.py:algorithm=grpo,steps=4 --workdir=DIR

`algorithm=three` is SFT, a reward model and PPO with an adaptive KL coefficient.
"""

from ml_collections import ConfigDict

from configs.common import parse_arg

TASK = dict(source="reverse", length=24, prompt_length=4, options=dict(digits=2))
MEASURE = dict(problems=8, max_tokens=4, reward=dict(name="digit_share"))


def get_config(arg=None):
    a = parse_arg(
        arg, algorithm="sft", steps=2, devices=0, first=2, every=0, evaluate=False, plan="first",
        optim="adamw", staleness=0,
    )  # fmt: skip
    c = ConfigDict()
    c.simulate_devices = a["devices"]
    c.tokenizer = "chars:0123456789>"
    c.model = dict(
        shape=dict(
            layers=2, width=32, heads=2, kv_heads=1, head_dim=16, ffn=48, tie=True, max_length=32
        )
    )
    c.checkpoint = dict(every=a["every"], keep=3)
    rows = plan(a["plan"], a["first"], a["algorithm"])
    names = ("sft", "rm", "ppo") if a["algorithm"] == "three" else (a["algorithm"],)
    c.stages = names
    for name in names:
        c[name] = stage(name, a["steps"], rows, three=len(names) > 1)
        for optim in c[name].optim.values():
            if a["optim"] != "adamw":
                optim.name, optim.lr = a["optim"], 0.3
        if c[name].algorithm in ("ppo", "grpo", "remax"):
            c[name].staleness = a["staleness"]
        if a["evaluate"] and name == names[-1]:
            c[name].evaluate = dict(MEASURE, before=True)
    return c


def plan(kind, first, algorithm):
    """Plans for eight devices: the first few, sampling and training apart, ..."""
    if kind == "first":
        return dict(default=dict(devices=list(range(first))))
    if kind in ("search", "all", "fsdp", "halves"):
        return kind
    sampling, training, rest = {
        "apart": (dict(devices=[0, 1, 2, 3]), dict(devices=[4, 5, 6, 7], fsdp=2), [4, 5]),
        "across": (dict(devices=[0, 1, 4, 5]), dict(devices=[2, 3, 6, 7], fsdp=4), [6, 7]),
        "overlap": (dict(devices=[2, 3, 4, 5], tensor=2), dict(devices=[0, 1, 2, 3]), [5, 4]),
        "small": (dict(devices=[0, 1], tensor=2), dict(devices=[7]), [3, 2, 1, 0]),
    }[kind]
    rows = dict(default=dict(devices=rest), actor_gen=sampling)
    rows["actor_train"] = training
    if algorithm == "remax":
        rows["greedy_gen"] = dict(devices=rest)
    return rows


def stage(name, steps, plan, *, three=False):
    common = dict(steps=steps, batch=8, plan=plan, samples_every=2)
    lr = dict(lr=3e-3)
    if name == "sft":
        data = dict(TASK, format="completion", options=dict(digits=2, wrong=0.5))
        return dict(common, algorithm="sft", data=data, optim=dict(actor=lr))
    if name in ("rm", "reward_model", "dpo"):
        data = dict(TASK, format="preference")
        if name == "dpo":
            return dict(common, algorithm="dpo", data=data, optim=dict(actor=lr))
        models = dict(reward="sft" if three else "base")
        return dict(
            common, algorithm="reward_model", data=data, models=models, optim=dict(reward=lr)
        )
    common |= dict(
        algorithm=name,
        data=dict(TASK, format="prompt"),
        optim=dict(actor=lr),
        sampling=dict(max_tokens=4, samples=1 if name in ("ppo", "remax") else 4),
        reward=dict(name="digit_share"),
    )
    if name == "ppo":
        common |= dict(
            models=dict(critic="base"),
            optim=dict(actor=lr, critic=lr),
            loss=dict(kl_coef=0.1, kl_target=1.0, epochs=2, minibatches=2),
        )
    if name == "ppo" and three:
        common |= dict(
            models=dict(actor="sft", critic="rm", reward="rm"), reward=dict(name="model")
        )
    return common
