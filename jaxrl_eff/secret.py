"""Redaction of secret values of a config, such as keys of services, which are never written out.

A value is secret by its name, at any depth (`api_key`, `authToken`). Within text, secrets are the
part of a URL between `//` and `@`, its parameters with such names (`?token=`), and keys with a
recognizable format (`hf_...`, `sk-...`, `Bearer ...`). A hash replaces the value, so that changes
are detected.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

_WORDS = {
    "key", "apikey", "keys", "token", "password", "passwd", "passphrase", "secret", "secrets",
    "credential", "credentials", "auth", "authorization", "bearer", "cookie",
    "pwd", "oauth", "jwt", "webhook", "sig", "signature",
}  # fmt: skip
_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_HASH = re.compile(r"\(hidden, [0-9a-f]{8}\)")
_LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_PARAMETER = re.compile(r"(?<=[?&])([\w.-]{1,80})=(?!\(hidden,)([^&\s#]+)")
_FORM = re.compile(
    r"\b(?:hf_|gh[opsu]_|github_pat_|glpat-|sk-|xox[abps]-|AKIA)[\w-]{16,}"
    r"|(?<=\b[Bb]earer )[\w.~+/-]{8,}=*"
)


def named(name: str) -> bool:
    """Returns True if a value of this name is secret."""
    words = {w.lower() for w in _PARTS.findall(str(name))}
    return bool(words & _WORDS)


def redacted(value: Any, name: str = "") -> Any:
    """Returns the value, in plain containers, with secrets replaced by hashes.

    Args:
        value: of a config: a dict, list, tuple, text, number or None.
        name: its name.
    """
    return _redacted(value, named(name))


def told(path: str, value: Any) -> str:
    """Formats a config value for an error message: `repr`, truncated to 200 characters, redacted.

    Args:
        path: "config.a.b[0]"; everything below a secret name is secret.
        value: the value at that path.
    """
    secret = any(named(part) for part in re.split(r"[.\[\]]", path))
    return f"{_redacted(value, secret)!r:.200}"


def _redacted(value: Any, secret: bool) -> Any:
    if isinstance(value, Mapping):
        return {k: _redacted(v, secret or named(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_redacted(v, secret) for v in value)
    if secret and value is not None and value != "" and not isinstance(value, bool):
        return _hidden(value)
    if isinstance(value, str):
        value = _LOGIN.sub(lambda found: _hidden(found[0]), value)
        value = _PARAMETER.sub(_parameter, value)
        return _FORM.sub(lambda found: _hidden(found[0]), value)
    return value


def _parameter(found: re.Match) -> str:
    """Returns a parameter of a URL, with its value hidden if its name is secret."""
    return f"{found[1]}={_hidden(found[2])}" if named(found[1]) else found[0]


def _hidden(value: Any) -> str:
    if isinstance(value, str) and _HASH.fullmatch(value):
        return value
    digest = hashlib.sha256(repr(value).encode(errors="replace")).hexdigest()
    return f"(hidden, {digest[:8]})"
