r"""Supervised fine-tuning on the digits toy, from scratch, on packed rows.

  python -m jaxrl_eff.main --config=configs/sft.py --workdir=runs/sft

With your own data: --config.sft.data.source=jsonl --config.sft.data.path=FILE
--config.sft.data.options="{}" and a model by --config.model.path=DIR --config.model.shape="{}"
--config.tokenizer=model.
"""

from configs import common


def get_config():
    c = common.digits_run("sft")
    c.sft = common.digits_sft()
    return c
