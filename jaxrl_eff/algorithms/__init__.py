"""Algorithms: each file is one paper, a frozen `Config`, a table of calls, and a record of them.

The difference between two files is the difference between two papers. `losses` and `advantages`
hold the equations on arrays; `policy` the rows that several tables share.
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
