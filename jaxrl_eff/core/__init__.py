"""A graph of named calls, placed by a plan, compiled into a step.

Independent of models, algorithms and configs. `Graph` and the calls `generate`, `infer`, `train`
and `local` define what is computed; a `Plan` gives every call a `Placement`; `compile` builds
the step. The functions of calls return `meters` as metrics. The names below are public, everything
else is private.
"""

from jaxrl_eff import public

__all__, __getattr__, __dir__ = public.table(
    __name__,
    {
        "compiling": ("compile",),
        "figure": ("draw",),
        "graph": (
            "Call", "Graph", "Placement", "Plan", "generate", "infer", "local", "order", "train",
        ),
        "plan_rules": ("check_plan",),
        "schedules": ("Packing",),
        "specs": ("Adaptation", "Model", "Spec"),
        "step": ("Step",),
    },
    modules=("meters",),
)  # fmt: skip
