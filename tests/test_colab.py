"""The notebooks run from the first cell to the last, in small, each in a process of its own."""

import ast
import importlib
import json
import os
import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra 'dev'")
nbclient = pytest.importorskip("nbclient", reason="needs the extra 'dev'")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_short_and_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) <= 12
    assert not any(cell.get("outputs") for cell in notebook.cells)


def run(name, tmp_path, monkeypatch):
    """What the cells print."""
    # The kernel must not inherit this process's eight simulated devices: it simulates its own.
    for variable in ("XLA_FLAGS", "NPROC"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path[1:2]]))
    # What is tried is that the cells run: fast programs would take longer to compile than to run.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("NOTEBOOK_SCALE", "0.02")
    monkeypatch.setenv("NOTEBOOK_WORKDIR", str(tmp_path / "run"))
    # A kernel of this very interpreter, whatever kernels the user has installed.
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    folder = tmp_path / "kernels" / "this"
    folder.mkdir(parents=True)
    spec |= {"display_name": "this", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    notebook = nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(ROOT / "colab")}}
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="this", resources=resources)
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_a_notebook_imports_is_there(path):
    cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    lines = [line for cell in cells for line in cell.split("\n") if not line.startswith(("!", "%"))]
    found = ast.walk(ast.parse("\n".join(lines)))
    names = [(n.module, a.name) for n in found if isinstance(n, ast.ImportFrom) for a in n.names]
    assert any(module.startswith("jaxrl_eff") for module, _ in names)
    for module, name in names:
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")


@pytest.mark.slow  # `make quickstart` runs the same job
@pytest.mark.filterwarnings("ignore")  # of the notebook's own machinery, not of this package
def test_the_quickstart(tmp_path, monkeypatch):
    printed = run("quickstart", tmp_path, monkeypatch)
    assert "actor_train -. actor .-> actor_gen" in printed
    assert "largest relative difference" in printed
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_one_plan_explained(tmp_path, monkeypatch):
    printed = run("plan", tmp_path, monkeypatch)
    assert "no plan takes less than" in printed
    by_hand = next(line for line in printed.splitlines() if line.startswith("a step: "))
    assert "(+" in by_hand  # the row that was changed by hand costs time
    assert "{'actor_gen': 0," not in printed
    difference = next(x for x in printed.splitlines() if x.startswith("largest difference"))
    assert float(difference.split(": ")[1]) < 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_optimizers_in_a_loop_of_ones_own(tmp_path, monkeypatch):
    printed = run("optimizers", tmp_path, monkeypatch)
    lines = dict(re.findall(r"^([^:\n]+?):? +loss (\d\.\d+)", printed, re.M))
    alone, best = float(lines["optax.adamw, bfloat16"]), float(lines["adamw, all float32"])
    for name in ("collage_adamw, plus", "adamw, int16"):
        assert abs(float(lines[name]) - best) < 0.2 * best < 0.1 * alone
    assert "taken back: equal to the base is True" in printed
