"""Checks the installation: versions, devices, measured speed, and what is missing.

  python -m jaxrl_eff doctor

Nothing is changed or downloaded. Exit codes: 0 training can run; 1 something it needs is missing or
known not to work; 2 the command or an environment variable asks for something impossible.
"""

import importlib.metadata
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

from jaxrl_eff.cli import parser
from jaxrl_eff.parallel import host

# Import names differ from the names of distributions; both are needed.
REQUIRED = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml_collections", "absl-py", "numpy",
    "safetensors", "grain", "tensorboardX", "rich",
)  # fmt: skip
OPTIONAL = {
    "hf": (("tokenizers", "jinja2"), "tokenizers and chat templates"),
    "parquet": (("pyarrow",), "parquet files as data"),
    "wandb": (("wandb",), "Weights & Biases logging"),
    "parity": (("torch", "transformers"), "comparisons with transformers in the tests"),
}
# (distribution, versions) pairs that fail together, and how.
KNOWN_BAD = (("jax", ("0.11.1", "0.11.2"), "flax", ("0.12.8", "0.12.9"), "importing flax fails"),)


def version(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def problems(versions: dict[str, str | None]) -> list[str]:
    """Lists what makes training impossible: missing packages and pairs known to fail."""
    missing = [name for name in REQUIRED if versions.get(name) is None]
    found = [f"{', '.join(missing)} missing: pip install jaxrl_eff"] if missing else []
    for a, bad_a, b, bad_b, how in KNOWN_BAD:
        if versions.get(a) in bad_a and versions.get(b) in bad_b:
            found.append(f"{a} {versions[a]} with {b} {versions[b]}: {how}; install other versions")
    return found


def outside_bounds(requirements: list[str], versions: dict[str, str | None]) -> list[str]:
    """Installed versions outside the bounds that were tried."""
    found = []
    for requirement in requirements:
        if ";" in requirement or not (parts := re.match(r"([\w.-]+)\s*(.*)", requirement)):
            continue
        name, bounds = parts[1], parts[2]
        if (have := versions.get(name)) and not _within(have, bounds):
            found.append(f"{name} {have} is outside {bounds}, the versions that were tried")
    return found


def _within(have: str, bounds: str) -> bool:
    for bound in filter(None, bounds.split(",")):
        operator, limit = re.match(r"\s*(>=|<=|==|!=|~=|<|>)\s*([\w.]+)", bound).groups()
        a, b = _numbers(have), _numbers(limit)
        if (operator == ">=" and a < b) or (operator == "<" and a >= b):
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", text)[:4])


def extras() -> list[tuple[str, str, str]]:
    """(extra, what for, "installed" or the command that installs it)."""
    rows = []
    for extra, (distributions, use) in OPTIONAL.items():
        missing = [name for name in distributions if version(name) is None]
        state = f"pip install 'jaxrl_eff[{extra}]'" if missing else "installed"
        rows.append((extra, use, state))
    return rows


def device_facts(devices: list[Any]) -> dict[str, str]:
    """Backend, kinds, processes and memory, as text."""
    import jax

    from jaxrl_eff.parallel.devices import memory_bytes, peak_flops_per_s

    kinds = sorted({d.device_kind for d in devices})
    bytes_ = memory_bytes(devices[0])
    peak = peak_flops_per_s(devices[0].device_kind, "bfloat16")
    shared = " of the host, shared" if devices[0].platform == "cpu" else " each"
    return {
        "devices": f"{len(devices)} x {', '.join(kinds)} ({jax.default_backend()})",
        "processes": str(jax.process_count()),
        "memory": f"{bytes_ / 2**30:.1f} GiB{shared}" if bytes_ else "unknown",
        "published peak": f"{peak / 1e12:.0f} TFLOP/s in bfloat16" if peak else "none in the table",
    }


def cache_fact(directory: str | Path | None) -> str:
    """Describes the compilation cache: its directory, number of programs and size."""
    if directory is None:
        return "off: nothing can be written there (JAX_COMPILATION_CACHE_DIR says where)"
    if not Path(directory).is_dir():
        return f"{directory} (not there yet; JAX_COMPILATION_CACHE_DIR moves it)"
    sizes = [p.stat().st_size for p in Path(directory).rglob("*") if p.is_file()]
    return f"{directory} ({len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB)"


def notes(devices: list[Any]) -> list[str]:
    """Lists what works but deserves attention."""
    import jax

    found = []
    count = len(devices)
    if devices[0].platform == "cpu":
        if count > 1:
            found.append(f"the {count} CPU devices are simulated: for trying plans, not for speed.")
        if count > 1 and int(os.environ.get("NPROC") or os.cpu_count() or 1) < 4 * count:
            found.append(
                f"set NPROC={4 * count} before Python starts: JAX 0.10 sizes its threads by the "
                f"cores ({os.cpu_count()}), and {count} simulated devices can then deadlock."
            )
        if count > 1 and not host.in_order():
            found.append(
                f"set XLA_FLAGS={host.IN_ORDER} before Python starts: simulated devices may mix up "
                "messages that are under way at once."
            )
        if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists():
            found.append(
                "an NVIDIA driver is here but JAX sees none: pip install 'jaxrl_eff[cuda]'"
            )
        if Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists():
            found.append("a TPU may be here but JAX sees none: pip install 'jaxrl_eff[tpu]'")
    if jax.config.jax_default_matmul_precision is not None:
        precision = jax.config.jax_default_matmul_precision
        found.append(f"jax_default_matmul_precision is {precision}; measured rates depend on it.")
    return found


def rates(device: Any) -> list[list[str]]:
    """Measured rates of one device; about a second on a CPU."""
    from jaxrl_eff.parallel.devices import measure_copy, measure_matmul, peak_flops_per_s
    from jaxrl_eff.train.console import number

    rows = []
    for dtype in ("float32", "bfloat16"):
        rate = measure_matmul(dtype, device=device, seconds=0.2)
        peak = peak_flops_per_s(device.device_kind, dtype)
        share = f"{rate / peak:.0%} of the published peak" if peak else ""
        rows.append([f"matrix product, {dtype}", f"{number(rate / 1e9)} GFLOP/s", share])
    copy = measure_copy(device=device, seconds=0.2)
    rows.append(["memory, read and write", f"{number(copy / 1e9)} GB/s", ""])
    return rows


def main(argv: list[str] | None = None) -> int:
    """Prints the findings; returns the exit status."""
    words = parser.command("doctor", __doc__)
    words.add_argument("--quick", action="store_true", help="do not measure the speed")
    return words.run(argv, lambda options: _examine(options.quick))


def _examine(quick: bool) -> int:
    versions = {name: version(name) for name in REQUIRED}
    broken = problems(versions)
    if versions["rich"] is None:  # without it the rest cannot be printed
        print("\n".join(f"broken: {problem}" for problem in broken))
        return 1
    from jaxrl_eff.train.console import Console

    console = Console(terminal=False, width=shutil.get_terminal_size((100, 24)).columns)
    shown = {name: have or "MISSING" for name, have in versions.items()}
    console.header(
        "versions",
        {"python": f"{platform.python_version()} ({platform.platform()})", **shown},
    )
    try:
        requirements = importlib.metadata.requires("jaxrl_eff") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    remarks = outside_bounds(requirements, versions)
    devices: list[Any] = []
    if not broken:
        try:
            import flax.linen  # noqa: F401

            from jaxrl_eff.parallel.devices import cache_directory

            devices = host.devices()
        except host.PlatformError:
            raise
        except Exception as error:  # whatever it is, saying it is this program's task
            broken.append(f"{type(error).__name__} while starting JAX: {error}")
    if devices:
        cache = cache_fact(cache_directory())
        console.header("devices", {**device_facts(devices), "compile cache": cache})
        remarks += notes(devices)
        if not quick:
            console.table("measured", ["", "rate", ""], rates(devices[0]))
    console.table("optional", ["extra", "for", ""], extras())
    for remark in remarks:
        console.line(f"note: {remark}")
    for problem in broken:
        console.line(f"broken: {problem}")
    if not broken:
        console.line("ready: nothing needed is missing.")
    return 1 if broken else 0
