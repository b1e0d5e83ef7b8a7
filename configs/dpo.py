r"""DPO on the digits toy: preferences straight into the policy, no reward model, no sampling.

python -m jaxrl_eff.main --config=configs/dpo.py --workdir=runs/dpo
python -m jaxrl_eff.main --config=configs/dpo.py:loss=ipo --workdir=runs/ipo
"""

from configs import common


def get_config(arg=None):
    arg = common.parse_arg(arg, loss="sigmoid")
    c = common.digits_run("sft", "dpo")
    c.sft = common.digits_sft()
    c.dpo = dict(
        algorithm="dpo",
        steps=150,
        batch=48,
        data=dict(common.digits(keep_length=False), format="preference"),
        models=dict(actor="sft"),
        optim=dict(actor=dict(lr=1e-3, schedule="linear", warmup=10)),
        loss=dict(beta=0.2, loss=arg["loss"]),
        evaluate=common.digits_accuracy(),
    )
    return c
