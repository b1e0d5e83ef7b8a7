r"""PPO on the digits toy with a reward computed from the text instead of a reward model.

  python -m jaxrl_eff.main --config=configs/ppo.py --workdir=runs/ppo
  python -m jaxrl_eff.main --config=configs/ppo.py:adaptive --workdir=runs/ppo_adaptive

`adaptive` steers the KL coefficient to 1 nat a response. With a reward model: quickstart.py.
"""

from configs import common


def get_config(arg=None):
    arg = common.parse_arg(arg, adaptive=False)
    c = common.digits_run("sft", "ppo")
    c.sft = common.digits_sft()
    loss = dict(kl_coef=0.05, lam=1.0, minibatches=4, kl_target=None)
    if arg["adaptive"]:
        loss["kl_target"] = 1.0
    c.ppo = common.digits_rl(
        "ppo",
        batch=256,
        models=dict(actor="sft", critic="sft"),
        optim=dict(actor=dict(lr=1e-3, warmup=3), critic=dict(lr=1e-3)),
        sampling=dict(max_tokens=5),
        loss=loss,
    )
    return c
