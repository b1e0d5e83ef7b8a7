"""What an export says where the disk is full."""

import errno

import pytest

from jaxrl_eff import export


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
