"""Algorithms: each file is one paper, a frozen `Config`, a table of calls, and an `Algorithm`.

Files differ only as their papers do. `losses` and `advantages` have the equations on arrays;
`policy` has the rows that several tables share. The names in `__all__` are public, everything else
is private.
"""

from jaxrl_eff.algorithms import dpo, grpo, ppo, raft, remax, reward_model, rloo, sft
from jaxrl_eff.algorithms.base import Algorithm, Rollout

ALGORITHMS: dict[str, Algorithm] = {
    "sft": sft.ALGORITHM,
    "reward_model": reward_model.ALGORITHM,
    "dpo": dpo.ALGORITHM,
    "ppo": ppo.ALGORITHM,
    "grpo": grpo.ALGORITHM,
    "rloo": rloo.ALGORITHM,
    "remax": remax.ALGORITHM,
    "raft": raft.ALGORITHM,
}

__all__ = [
    "ALGORITHMS", "Algorithm", "Rollout", "dpo", "grpo", "ppo", "raft", "remax", "reward_model",
    "rloo", "sft",
]  # fmt: skip
