r"""ReMax on the digits toy: every answer is measured against the greedy one.

python -m jaxrl_eff.main --config=configs/remax.py --workdir=runs/remax
"""

from configs import common


def get_config():
    c = common.digits_run("sft", "remax")
    c.sft = common.digits_sft()
    c.remax = common.digits_rl(
        "remax", loss=dict(kl_coef=0.02), sampling=dict(max_tokens=5, samples=1), batch=256
    )
    return c
