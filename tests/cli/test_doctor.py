"""The doctor says what is there, what is missing, and fails only when training could not run."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import launch
import pytest

from jaxrl_eff.cli import doctor
from jaxrl_eff.parallel.devices import (
    cache_directory,
    measure_copy,
    measure_matmul,
    memory_bytes,
    peak_flops_per_s,
)
from jaxrl_eff.train import startup


def test_a_sound_installation_is_ready(capsys, monkeypatch):
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda n: None if n == "wandb" else real(n))
    assert doctor.main(["--quick"]) == 0
    out = capsys.readouterr().out
    assert f"jax               {jax.__version__}" in out
    assert "8 x cpu (cpu)" in out
    assert "pip install 'jaxrl_eff[wandb]'" in out
    assert out.rstrip().endswith("ready: nothing needed is missing.")


def test_measured_rates_are_printed(capsys, monkeypatch):
    monkeypatch.setattr("jaxrl_eff.parallel.devices.measure_matmul", lambda dtype, **kw: 2.5e9)
    monkeypatch.setattr("jaxrl_eff.parallel.devices.measure_copy", lambda **kw: 3e9)
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "2.500 GFLOP/s" in out and "3.000 GB/s" in out


def test_missing_packages_and_bad_pairs_are_broken(capsys, monkeypatch):
    good = dict.fromkeys(doctor.REQUIRED, "1.0")
    assert doctor.problems(good) == []
    assert "grain missing" in doctor.problems({**good, "grain": None})[0]
    bad = {**good, "jax": "0.11.2", "flax": "0.12.9"}
    assert "jax 0.11.2 with flax 0.12.9" in doctor.problems(bad)[0]
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda n: None if n == "grain" else real(n))
    assert doctor.main(["--quick"]) == 1
    assert "broken: grain missing" in capsys.readouterr().out


def test_a_missing_console_is_told_without_it():
    code = (
        "import sys; sys.modules['rich'] = None\n"
        "from jaxrl_eff.cli import doctor\n"
        "real = doctor.version; doctor.version = lambda n: None if n == 'rich' else real(n)\n"
        "sys.exit(doctor.main(['--quick']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == "broken: rich missing: pip install jaxrl_eff\n"


def test_a_backend_that_does_not_start_is_broken(capsys, monkeypatch):
    def fail():
        raise RuntimeError("no driver")

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert doctor.main(["--quick"]) == 1
    assert "broken: RuntimeError while starting JAX: no driver" in capsys.readouterr().out


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend"), AssertionError()])
def test_a_platform_that_is_not_here_is_named_with_its_variable(error, capsys, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    code, _, err = launch.called(doctor.main, capsys, "--quick")
    assert code == 2 and err.startswith("error: JAX_PLATFORMS=cuda: ") and err.count("\n") == 1
    run = launch.config("algorithm=sft")
    with pytest.raises(ValueError, match="JAX_PLATFORMS=cuda: that platform does not start here"):
        startup.prepare(run)


def test_without_a_home_there_is_no_cache(monkeypatch, tmp_path):
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)

    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", unknown)
    assert cache_directory() is None and doctor.cache_fact(None).startswith("off: ")
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert cache_directory() is None
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "a" / "b"))
    assert cache_directory() == tmp_path / "a" / "b"


def test_versions_outside_the_bounds_are_noted():
    needs = ["jax<0.13,>=0.10.2", "optax<0.3,>=0.2.8", "torch>=9; extra == 'parity'"]
    have = {"jax": "0.13.0", "optax": "0.2.8", "torch": "1"}
    (note,) = doctor.outside_bounds(needs, have)
    assert note.startswith("jax 0.13.0 is outside")


def test_simulated_devices_need_threads(monkeypatch):
    monkeypatch.setenv("NPROC", "2")
    assert any("set NPROC=32" in note for note in doctor.notes(jax.devices()))
    monkeypatch.setenv("NPROC", "32")
    assert not any("NPROC" in note for note in doctor.notes(jax.devices()))


def test_the_cache_is_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_directory() == tmp_path / "x" / "jaxrl_eff" / "xla"
    assert not (tmp_path / "x").exists()
    (tmp_path / "a").write_bytes(b"x" * 2**20)
    assert "(1 files, 1.0 MiB)" in doctor.cache_fact(tmp_path)
    assert "not there" in doctor.cache_fact(tmp_path / "no")


def test_help_is_fast_and_needs_no_jax():
    code = (
        "import sys; sys.argv = ['doctor', '--help']\n"
        "from jaxrl_eff.cli import doctor\n"
        "try: doctor.main()\n"
        "except SystemExit as e: assert e.code == 0 and 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("kind", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 PCIe", jnp.bfloat16, 756),
        ("NVIDIA A100-SXM4-40GB", "float32", 156),
        ("TPU v5 lite", "bfloat16", 197),
        ("TPU v5", "bfloat16", 459),
        ("TPU v6 lite", "bfloat16", 918),
        ("NVIDIA H100 80GB HBM3", "int8", None),
        ("cpu", "float32", None),
    ],
)
def test_peaks_come_from_the_table(kind, dtype, tflops):
    peak = peak_flops_per_s(kind, dtype)
    assert peak is None if tflops is None else peak == tflops * 1e12


def test_rates_and_memory_are_plausible():
    assert 1e8 < measure_matmul(size=128, seconds=0.01) < 1e14
    assert 1e7 < measure_copy(nbytes=1 << 20, seconds=0.01) < 1e13
    assert memory_bytes(jax.devices()[0]) > 2**28
