"""Weights on disk: checkpoints of a run, Hugging Face and PEFT files, delta files.

The names below are public, everything else is private.
"""

from jaxrl_eff import public

__all__, __getattr__, __dir__ = public.table(
    __name__,
    {
        "hf_config": ("read_config",),
        "hf_config_write": ("write_config",),
        "hf_load": ("load_hf",),
        "hf_save": ("save_hf",),
        "peft_files": ("load_peft", "save_peft"),
        "run": ("Checkpoints",),
    },
    modules=("deltas",),
)
