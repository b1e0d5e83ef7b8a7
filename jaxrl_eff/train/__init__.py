"""Training from a config: settings, assembly, the training loop, evaluation, export.

`jaxrl_eff.run` trains; the modules below serve programs that look inside of a run. The names below
are public, everything else is private.
"""

from jaxrl_eff import public

__all__, __getattr__, __dir__ = public.table(
    __name__,
    {"settings": ("Run",)},
    modules=("assembly", "config_file", "settings", "startup", "state", "writer"),
)
