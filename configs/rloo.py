r"""RLOO on the digits toy: every answer is measured against the mean of the others.

python -m jaxrl_eff.main --config=configs/rloo.py --workdir=runs/rloo
"""

from configs import common


def get_config():
    c = common.digits_run("sft", "rloo")
    c.sft = common.digits_sft()
    c.rloo = common.digits_rl("rloo", loss=dict(kl_coef=0.02))
    return c
