r"""GRPO on the digits toy: eight answers a prompt, advantages within the group, no critic.

  python -m jaxrl_eff.main --config=configs/grpo.py --workdir=runs/grpo

The variants are choices of the loss: Dr.GRPO --config.grpo.loss.scale_by_std=False
--config.grpo.loss.loss_agg=constant; DAPO loss_agg=token_mean, clip_high=0.28, beta=0.0; GSPO
ratio=sequence. Responses of very different lengths: --config.grpo.schedule.name=skrull packs them
for everything that follows sampling.
"""

from configs import common


def get_config():
    c = common.digits_run("sft", "grpo")
    c.sft = common.digits_sft()
    c.grpo = common.digits_rl("grpo", loss=dict(beta=0.02))
    return c
