"""Algorithms: each file is one paper, a frozen `Config` and a table of calls.

The difference between two files is the difference between two papers. `losses` and `advantages`
hold the equations on arrays; `policy` the rows that several tables share.
"""

import importlib

_FILES = (
    "advantages", "dpo", "grpo", "losses", "policy", "ppo", "raft", "remax", "reward_model",
    "rloo", "sft",
)  # fmt: skip


def __getattr__(name: str):
    if name in _FILES:
        return importlib.import_module(f"jaxrl_eff.algorithms.{name}")
    raise AttributeError(f"algorithms has no {name!r}; it has {', '.join(_FILES)}")


def __dir__():
    return list(_FILES)
