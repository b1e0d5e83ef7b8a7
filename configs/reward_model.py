r"""A Bradley-Terry reward model on the digits toy, from a supervised model.

python -m jaxrl_eff.main --config=configs/reward_model.py --workdir=runs/reward_model
"""

from configs import common


def get_config():
    c = common.digits_run("sft", "rm")
    c.sft = common.digits_sft()
    c.rm = dict(
        algorithm="reward_model",
        steps=300,
        batch=48,
        data=dict(common.digits(keep_length=False), format="preference"),
        models=dict(reward="sft"),
        optim=dict(reward=dict(lr=3e-3, schedule="cosine", warmup=10)),
        loss=dict(center=0.01),
    )
    return c
