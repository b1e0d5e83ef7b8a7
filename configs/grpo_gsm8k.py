r"""GRPO on GSM8K with a Hugging Face chat model, both by path; the reward is the right number.

  python -m jaxrl_eff.main --config=configs/grpo_gsm8k.py:model=DIR,data=DIR --workdir=runs/gsm8k
  python -m jaxrl_eff.main --config=configs/grpo_gsm8k.py:model=DIR,data=DIR,pod --workdir=...

model: a directory with config.json, safetensors and a tokenizer with a chat template (Qwen 2.5 or 3
of 0.5B to 1.5B fit one GPU of 80 GB in bfloat16 with float32 optimizer state). data: a directory
with train.jsonl and test.jsonl, lines of {"question": ..., "answer": "... #### 42"}. `pod` shards
parameters over all devices and takes a larger batch. `plain` is for a base model without a chat
template.
"""

from ml_collections import ConfigDict

from configs import common

ASK = "{prompt}\nReason step by step, then give the answer after ####."


def get_config(arg=None):
    arg = common.parse_arg(arg, model="", data="", pod=False, plain=False)
    c = ConfigDict()
    c.seed = 0
    c.model = dict(path=arg["model"], dtype="bfloat16", param_dtype="float32", remat="full")
    c.stages = ("grpo",)
    c.grpo = dict(
        algorithm="grpo",
        steps=200,
        batch=256 if arg["pod"] else 16,
        data=dict(
            source="jsonl",
            path=f"{arg['data']}/train.jsonl",
            format="prompt" if arg["plain"] else "chat_prompt",
            fields=dict(field="question"),
            template="Question: {prompt}\nAnswer:" if arg["plain"] else ASK,
            bos=False,
            prompt_length=256,
        ),
        models=dict(actor="base"),
        optim=dict(actor=dict(lr=1e-6, schedule="constant", warmup=10)),
        loss=dict(beta=0.001, loss_agg="token_mean", clip_high=0.28),
        sampling=dict(max_tokens=512, samples=8),
        reward=dict(name="numeric", options=dict(field="answer")),
        plan="fsdp" if arg["pod"] else dict(default=dict(), actor_train=dict(microbatches=16)),
        evaluate=dict(
            problems=256,
            every=50,
            before=True,
            data=f"{arg['data']}/test.jsonl",
            reward=dict(name="numeric", options=dict(field="answer")),
        ),
        samples_every=5,
    )
    c.checkpoint = dict(every=50, keep=2)
    return c
