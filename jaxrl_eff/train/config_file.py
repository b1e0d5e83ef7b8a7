"""Configs on the command line: the file, its argument, and overrides of single values.

    --config=configs/grpo.py:model=DIR --config.grpo.steps=50 --config.seed=1

A config file is Python with `get_config()`, or `get_config(arg)` for the text after the colon. Any
field of `settings` can be set, even if the file omits it; a value is parsed as Python ("50",
"1e-4", "(1, 2)", "true"), or kept as text if the file's value is text or it is not Python.
"""

import ast
import contextlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxrl_eff import secret

FLAG = "config."  # absl collects the overrides under this name
TRACEBACK = "JAXRL_EFF_TRACEBACK"  # environment variable that enables tracebacks
_LONGEST = 2000  # characters of a message; values of a config can have any size


class ConfigError(ValueError):
    """A config file or an override that cannot be used."""


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Context that turns any error into one line "error: ..." and exit code 2.

    With JAXRL_EFF_TRACEBACK=1 in the environment errors propagate unchanged. A closed standard
    output ends the command quietly, Ctrl-C with exit code 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        print()
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        fail(said(error))


def fail(message: str) -> NoReturn:
    """Prints "error: ..." and exits with code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def said(error: BaseException) -> str:
    """Returns an error in one line, without the type's name if messages are meant for users."""
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError | OSError | ImportError) or not text:
        text = f"{type(error).__name__}: {text or 'no message'} ({TRACEBACK}=1 tells where)"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def rewrite(argv: Sequence[str]) -> list[str]:
    """Rewrites `--config.a.b=c` or `--config.a.b c` as `--config.=a.b=c`, which absl collects."""
    out, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        name, given, value = word.partition("=")
        name = "--" + name.lstrip("-")
        if word.startswith("-") and name.startswith("--config.") and name != "--config.":
            if not given:
                if not rest or rest[0].startswith("--"):
                    raise ConfigError(f"{word} needs a value: {word}=...")
                value = rest.pop(0)
            word = f"--{FLAG}={name.removeprefix('--config.')}={value}"
        out.append(word)
    return out


def load(spec: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Loads the config of a file as plain dicts, with overrides `"a.b=c"` applied.

    Raises:
        ConfigError: the file is missing, fails, or does not give a config.
    """
    name, _, arg = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"--config={name} is no file; expected one of {[*map(str, files())]}.")
    config = _get(path, arg)
    if hasattr(config, "to_dict"):
        try:
            config = config.to_dict()
        except Exception as error:  # placeholders without a value, self-referencing sections
            raise ConfigError(f"get_config of {path}: {said(error)}") from error
    if not isinstance(config, Mapping):
        raise ConfigError(f"get_config of {path} gave {type(config).__name__}, but no config.")
    config = dict(config)
    for text in overrides:
        where, _, value = text.partition("=")
        override(config, where, value)
    return config


def _get(path: Path, arg: str) -> Any:
    # So that a config can import configs.common from any working directory.
    for place in (str(Path.cwd()), str(path.resolve().parent.parent)):
        if place not in sys.path:
            sys.path.append(place)
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None:
        raise ConfigError(f"--config={path} is no Python file; its name must end in .py.")
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{path} cannot be read: {_told(error, path)}") from error
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no function get_config.")
    if not callable(module.get_config):
        raise ConfigError(f"{path}: get_config is {module.get_config!r:.80}, but no function.")
    takes = bool(inspect.signature(module.get_config).parameters)
    if arg and not takes:
        raise ConfigError(f"{path} takes no argument, but got {arg!r} behind the colon.")
    try:
        return module.get_config(arg) if takes and arg else module.get_config()
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{path}: {_told(error, path)}") from error


def _told(error: BaseException, path: Path) -> str:
    """Returns one line: the message of a ValueError, or type, place and message."""
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    line = next((f.lineno for f in reversed(frames) if Path(f.filename) == path), None)
    text = str(error) or "no message"
    return f"{f'line {line}: ' if line else ''}{type(error).__name__}: {text}"


def override(config: dict[str, Any], where: str, text: str) -> None:
    """Sets the value at `"a.b"`, creating sections as needed; fields are validated later.

    Raises:
        ConfigError: a name is empty, or a section's name has a value that is not a section.
    """
    *way, last = where.split(".")
    section = config
    for i, name in enumerate([*way, last]):
        if not name:
            raise ConfigError(f"--config.{where} has an empty name in it.")
        if i < len(way):
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                path = ".".join(way[: i + 1])
                shown = secret.redacted(section, name)
                raise ConfigError(
                    f"--config.{where}: config.{path} is {shown!r:.200}, which has no fields."
                )
    section[last] = _value(text, section.get(last))


def _value(text: str, now: Any) -> Any:
    if isinstance(now, str) and not isinstance(now, bool):
        return _unquoted(text)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        pass
    if isinstance(now, tuple | list):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def files() -> list[Path]:
    """Lists available configs: of the current directory, else of the package's repository."""
    for folder in (Path("configs"), Path(__file__).resolve().parents[2] / "configs"):
        found = sorted(p for p in folder.glob("*.py") if p.stem not in ("__init__", "common"))
        if found:
            return found
    return []


def describe() -> str:
    """Returns a line per available config: its path and the first line of its docstring."""
    rows = []
    for path in files():
        try:
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        except (OSError, SyntaxError, ValueError):
            text = ""
        rows.append((str(path), text.partition("\n")[0]))
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"  {name:{width}}  {text}" for name, text in rows)


def flat(value: Any, path: str = "config") -> list[str]:
    """Returns `config.a.b = c` for every value of nested dicts; a hash for `secret` values."""
    if isinstance(value, Mapping) and value:
        return [line for k, v in _shown(value, path).items() for line in flat(v, f"{path}.{k}")]
    return [f"{path} = {value!r}"]


def _shown(value: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    return secret.redacted(value) if path == "config" else value  # once, at the root
