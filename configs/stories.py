r"""GRPO of a small pretrained story model, given by path: its stories turn happy.

  python -m jaxrl_eff.main --config=configs/stories.py:model=DIR --workdir=runs/stories

DIR is a Hugging Face directory of a story model, e.g. the 260K-parameter Llama trained on
TinyStories. The reward is the share of happy words, so that the change can be read in the samples:
compare the first and last ones in the report.
"""

from ml_collections import ConfigDict

from configs import common

OPENINGS = (
    "Once upon a time, there was a",
    "One day, a little girl named Lily",
    "Tom and his mom went to the",
    "There was a big dog who",
    "In the park, a boy saw",
    "The cat sat on the",
    "Ben had a new toy. He",
    "It was a sunny day and",
    "A bird lived in a tall tree. It",
    "Mia wanted to",
    "The old man had a",
    "Sam and Anna were friends. They",
    "One night, the moon",
    "A small fish swam in the",
    "Max found a box. Inside",
    "Mommy made a cake for",
    "The rabbit was hungry and",
    "At school, the teacher",
    "A frog jumped into the",
    "Daddy gave Tim a",
)
HAPPY = (
    "happy", "happily", "smile", "smiled", "laugh", "laughed", "fun", "love", "loved", "joy",
    "glad", "excited", "play", "played", "nice", "friend", "friends", "hug", "hugged",
)  # fmt: skip


def get_config(arg=None):
    arg = common.parse_arg(arg, model="")
    c = ConfigDict()
    c.seed = 0
    c.model = dict(path=arg["model"])
    c.stages = ("grpo",)
    c.grpo = dict(
        algorithm="grpo",
        steps=40,
        batch=8,
        data=dict(
            source="inline",
            format="prompt",
            prompt_length=24,
            held_out=4,
            options=dict(examples=tuple({"prompt": text} for text in OPENINGS)),
        ),
        models=dict(actor="base"),
        optim=dict(actor=dict(lr=3e-4, warmup=5)),
        loss=dict(beta=0.1),
        sampling=dict(max_tokens=80, samples=8),
        reward=dict(name="word_share", options=dict(words=HAPPY)),
        evaluate=dict(
            problems=4,
            before=True,
            temperature=1.0,
            reward=dict(name="word_share", options=dict(words=HAPPY)),
        ),
        samples_every=10,
    )
    c.expect = dict(metric="grpo/eval", rises_over="grpo/eval_before", rise=0.05)
    return c
