r"""RAFT on the digits toy: the best of eight answers is imitated.

python -m jaxrl_eff.main --config=configs/raft.py --workdir=runs/raft
"""

from configs import common


def get_config():
    c = common.digits_run("sft", "raft")
    c.sft = common.digits_sft()
    c.raft = common.digits_rl("raft", optim=dict(actor=dict(lr=2e-3, warmup=3)))
    return c
