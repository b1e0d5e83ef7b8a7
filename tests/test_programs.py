"""The tests' own compilation cache."""

import os

import programs
from jax._src.lru_cache import LRUCache


def test_the_oldest_programs_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "LIMIT_BYTES", 250)
    for age, name in enumerate("abc"):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    programs.make_room(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    programs.make_room(tmp_path / "not there yet")


def test_a_program_is_written_whole_and_once(tmp_path, monkeypatch):
    """What another worker sees under the name is complete."""
    seen, replace = [], os.replace

    def watched(part, path):
        seen.append((path.exists(), part.read_bytes()))
        replace(part, path)

    monkeypatch.setattr(os, "replace", watched)
    cache = LRUCache(str(tmp_path), max_size=-1)
    cache.put("key", b"program")
    cache.put("key", b"another")
    assert seen == [(False, b"program")] and cache.get("key") == b"program"
    assert [p.name for p in tmp_path.iterdir()] == ["key-cache"]
