"""What an export says where the disk is full."""

import errno

import launch
import pytest

from jaxrl_eff.data.tokenizer import CharTokenizer
from jaxrl_eff.train import export


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError(f"Error while serializing: I/O error: ... (os error {errno.ENOSPC})"),
    ],
)
def test_a_full_disk_is_told_with_the_path(error, tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*export'"):  # noqa: SIM117
        with export._telling(tmp_path / "export"):
            raise error


def test_other_errors_pass(tmp_path):
    with pytest.raises(ValueError, match="shape"), export._telling(tmp_path / "export"):
        raise ValueError("a shape")


def test_killed_while_it_writes_the_tokenizer_it_is_written_by_the_next_run(tmp_path, monkeypatch):
    run = launch.config("algorithm=sft,steps=1")

    def killed(self, directory):
        (directory / ".tokenizer.json.partial").touch()
        raise launch.Killed

    with monkeypatch.context() as m:
        m.setattr(CharTokenizer, "save", killed)
        with pytest.raises(launch.Killed):
            launch.train(run, tmp_path)
    assert not (tmp_path / "export").exists()
    assert launch.train(run, tmp_path)
    names = {p.name for p in (tmp_path / "export").iterdir()}
    assert {"tokenizer.json", "model.safetensors"} <= names
    assert not [n for n in names if n.endswith(".partial")]
