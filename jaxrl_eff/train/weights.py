"""Checks of the weights that a run reads and writes, before anything is compiled."""

from collections.abc import Collection, Mapping

from jaxrl_eff.checkpoints import hf_config_write, hf_load, peft_files
from jaxrl_eff.models import LMConfig
from jaxrl_eff.peft import lora, ways
from jaxrl_eff.peft.config import AdaptSettings
from jaxrl_eff.train import parts


def check_read(
    origins: Mapping[str, tuple[str, str]],
    lms: Mapping[str, LMConfig],
    base: str,
    ignore: Collection[str],
) -> None:
    """Compares the tensors of every directory that parameters come from with its model's.

    Args:
        origins: role -> source of its initial parameters, as in `assembly.Stage`.
        lms: role -> config of its model.
        base: the base model's directory, "" if it has none.
        ignore: names of tensors and files to ignore.

    Raises:
        FileNotFoundError, ValueError: see `hf_load.load_hf`.
    """
    for role, (kind, name) in origins.items():
        if directory := {"base": base, "directory": name}.get(kind):
            hf_load.check_weights(directory, lms[role], ignore=ignore)


def check_export(stage: str, role: str, lm: LMConfig, part: AdaptSettings | None) -> None:
    """Rejects a model, and an adapter, that could not be exported at the end.

    Args:
        stage, role: the last trained model, for messages.
        part: settings of its partial training, if any.

    Raises:
        ValueError: a format cannot represent a field; the message names it.
    """
    with parts.at_path(f"config.export: {role} of stage {stage}"):
        hf_config_write.check_exportable(lm)
        if part is not None and part.name in lora.METHODS:
            adapted = lora.targets(lm, part.targets or lora.TARGETS)
            peft_files.check_exportable(lm, adapted, ways.whole_names(part, lm))
