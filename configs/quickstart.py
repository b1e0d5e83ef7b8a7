r"""RLHF in three stages on a plain CPU: SFT, a reward model, PPO with its six calls.

  make quickstart
  python -m jaxrl_eff.main --config=configs/quickstart.py --workdir=runs/quickstart

The task is to write three digits backwards ("123>" -> "321"), so the truth is known, but nobody
tells PPO: it learns from a reward model that was trained on pairs of right and wrong answers. Half
of the SFT labels are wrong. The two simulated devices are used as one mesh by some calls and apart
by others, so the actor's and critic's weights are really reallocated in each step.

Expected: held-out accuracy rises by at least 0.3 from SFT to PPO.
"""

from ml_collections import ConfigDict

from configs import common


def get_config():
    c = ConfigDict()
    c.seed = 0
    c.simulate_devices = 2
    c.tokenizer = "chars:0123456789>"
    c.model = common.tiny_model()
    c.stages = ("sft", "rm", "ppo")

    digits = dict(digits=3, train=800, held_out=200)
    task = dict(source="reverse", length=72, prompt_length=5)
    measure = dict(problems=200, max_tokens=5, temperature=1.0, reward=dict(name="gold"))
    c.sft = dict(
        algorithm="sft",
        steps=150,
        batch=24,
        data=dict(task, format="completion", options=dict(digits, wrong=0.5)),
        optim=dict(actor=dict(lr=3e-3, schedule="cosine", warmup=10)),
        evaluate=measure,
    )
    c.rm = dict(
        algorithm="reward_model",
        steps=400,
        batch=48,
        data=dict(task, format="preference", options=digits),
        models=dict(reward="sft"),
        optim=dict(reward=dict(lr=3e-3, schedule="cosine", warmup=10)),
        loss=dict(center=0.01),
    )
    c.ppo = dict(
        algorithm="ppo",
        steps=60,
        batch=256,
        data=dict(task, format="prompt", options=digits),
        models=dict(actor="sft", critic="rm", reward="rm"),
        optim=dict(
            # At a constant rate a run may fall back in its last steps.
            # Faster than this it learns to please the reward model by wrong answers.
            actor=dict(lr=5e-4, schedule="cosine", warmup=3),
            critic=dict(lr=1e-3, schedule="cosine"),
        ),
        loss=dict(kl_coef=0.1, lam=1.0, minibatches=4, epochs=1, missing_eos_penalty=1.0),
        sampling=dict(max_tokens=5),
        plan=dict(
            actor_gen=dict(devices=[0, 1]),
            rew_inf=dict(devices=[0]),
            ref_inf=dict(devices=[1]),
            critic_inf=dict(devices=[0, 1]),
            actor_train=dict(devices=[0, 1], fsdp=2),
            critic_train=dict(devices=[0, 1], fsdp=2),
        ),
        evaluate=measure,
        samples_every=20,
    )
    c.expect = dict(metric="ppo/eval", rises_over="sft/eval", rise=0.3)
    return c
