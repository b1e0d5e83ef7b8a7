"""The notebook runs from the first cell to the last, in small, in a process of its own."""

import json
import os
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra 'dev'")
nbclient = pytest.importorskip("nbclient", reason="needs the extra 'dev'")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "colab" / "quickstart.ipynb"


def _notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_short_and_stored_without_outputs():
    nbformat.validate(_notebook())
    assert len(_notebook().cells) <= 12
    assert not any(cell.get("outputs") for cell in _notebook().cells)


@pytest.mark.filterwarnings("ignore")  # of the notebook's own machinery, not of this package
def test_the_notebook_runs(tmp_path, monkeypatch):
    # The kernel must not inherit this process's eight simulated devices: it simulates two.
    for name in ("XLA_FLAGS", "NPROC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path[1:2]]))
    # What is tried is that the cells run: fast programs would take longer to compile than to run.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    monkeypatch.setenv("NOTEBOOK_SCALE", "0.02")
    monkeypatch.setenv("NOTEBOOK_WORKDIR", str(tmp_path / "run"))
    # A kernel of this very interpreter, whatever kernels the user has installed.
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    folder = tmp_path / "kernels" / "this"
    folder.mkdir(parents=True)
    spec |= {"display_name": "this", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    notebook = _notebook()
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="this", resources=resources)
    client.execute()

    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert "actor_train -. actor .-> actor_gen" in printed
    assert "largest relative difference" in printed
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
