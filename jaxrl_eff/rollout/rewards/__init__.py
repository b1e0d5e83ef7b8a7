"""Rewards that rules compute: functions `(example, response) -> float`, made from settings.

Example:
    >>> from jaxrl_eff import rewards
    >>> rewards.numeric(field="answer")({"answer": "#### 1,234"}, "so it is 1234.0")
    1.0
    >>> short = rewards.length_penalty(soft=4, hard=8)
    >>> rewards.weighted((1.0, rewards.exact()), (0.5, short))({"answer": "yes"}, "yes")
    1.0
"""

from jaxrl_eff import public

__all__, __getattr__, __dir__ = public.table(
    __name__,
    {
        "symbolic": ("math",),
        "verify": (
            "contains", "exact", "host_reward", "length_penalty", "matches", "numeric", "tagged",
            "weighted", "word_share",
        ),
    },
)  # fmt: skip
