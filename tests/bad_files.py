"""Files that cannot be used: configs and data. And a directory with a good one of everything."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}b{% endif %}"
)
# What is written into a folder, and then tried: a config, the path of one, or a command.
Write = Callable[[Path, Path], dict | str | tuple]


def home(folder: Path) -> Path:
    """A directory with one good example of everything."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxrl_eff import tree
    from jaxrl_eff.checkpoints import deltas, save_hf
    from jaxrl_eff.checkpoints.peft_files import save_peft
    from jaxrl_eff.data.tokenizer import CharTokenizer
    from jaxrl_eff.models import LMConfig
    from jaxrl_eff.models.params import abstract
    from jaxrl_eff.peft import lora

    folder.mkdir()
    tokenizer = CharTokenizer("abcdefgh ", TEMPLATE)
    lm = LMConfig(
        vocab=tokenizer.vocab, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24,
        max_length=64, bos=1, eos=(2,), pad=0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), abstract(lm))
    save_hf(folder / "model", lm, params, tokenizer_from=tokenizer)
    shapes, _ = lora.lora_shapes(lm, 2, lora.TARGETS, dora=False)
    made = {k: jnp.asarray(np.ones(v.shape), v.dtype) for k, v in shapes.items()}
    save_peft(folder / "adapter", lm, tree.with_leaves(params, made))
    save_hf(folder / "tuned", lm, jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 1), params))
    states = [deltas.read_directory(folder / name) for name in ("model", "tuned")]
    deltas.save(deltas.diff(*states), folder / "delta")
    rows = [{"text": "abc", "prompt": "a", "completion": "b", "answer": str(i)} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "lengths").write_text("10\n20\n30\n40\n")
    return folder


def sft(model: Path, rows: Path, **changes: Any) -> dict:
    """A config of one step on a file with a model's directory."""
    data = {"path": str(rows), "format": "text", "length": 32} | changes.pop("data", {})
    stage = {
        "algorithm": "sft", "steps": 1, "batch": 2, "data": data,
        "optim": {"actor": {"lr": 1e-4}}, "plan": {"default": {"devices": 1}},
    } | changes  # fmt: skip
    return {"model": {"path": str(model)}, "stages": ("sft",), "sft": stage}


def copy(home_: Path, folder: Path, name: str) -> Path:
    return Path(shutil.copytree(home_ / name, folder / name))


def edited(file: Path, changes: dict | Callable) -> None:
    found = json.loads(file.read_text())
    found = changes(found) if callable(changes) else found | changes
    file.write_text(json.dumps(found))


def put(file: Path, content: str | bytes | None) -> None:
    file.unlink(missing_ok=True)
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())


# Config files


def _configs() -> list[tuple]:
    get = "def get_config():\n    return "
    rows = [
        ("syntax", "def get_config(: 1", "SyntaxError"),
        ("bytes", b"\xff\xfe\x00def", "SyntaxError"),
        ("nul", b"x = '\x00'", "SyntaxError"),
        ("empty", "", "get_config"),
        ("no function", "get_config = {}", "get_config"),
        ("two arguments", "def get_config(a, b):\n    return {}", "TypeError"),
        ("no end", "def get_config():\n    return get_config()", "RecursionError"),
        ("exit", "import sys\nsys.exit(3)", "SystemExit"),
        ("exit later", "def get_config():\n    raise SystemExit('bye')", "bye"),
        ("import", "import no_such_module", "no_such_module"),
        ("assertion", "assert False", "AssertionError"),
        ("warning", "def get_config():\n    raise UserWarning('hm')", "hm"),
        ("none", get + "None", "NoneType"),
        ("list", get + "[1]", "list"),
        ("text", get + "'abc'", "str"),
        ("class", get + "dict", "type"),
        ("nothing in it", get + "{}", "config.model"),
        ("key of a number", get + "{3: 1}", "3"),
        ("stages of numbers", get + "dict(stages=(1, 2))", "stages"),
        ("stage of a number", get + "dict(stages=('a',), a=3)", "'a'"),
        ("stage of nothing", get + "dict(stages=('a',), a=dict(algorithm=None))", "config.a"),
        (
            "holds itself",
            "a = {}\na['a'] = a\n" + get + "dict(wandb=a, model={}, stages=())",
            "wandb",
        ),
        ("array", "import numpy\n" + get + "dict(seed=numpy.ones(3), model={}, stages=())", "seed"),
        ("function", get + "dict(wandb=dict(a=print), model={}, stages=())", "wandb"),
        (
            "placeholder",
            "from ml_collections import ConfigDict, config_dict as c\n"
            + get
            + "ConfigDict(dict(seed=c.required_placeholder(int)))",
            "seed",
        ),
    ]

    def write(content: str | bytes, name: str = "config.py") -> Write:
        def written(_: Path, folder: Path) -> str:
            put(folder / name, content)
            return str(folder / name)

        return written

    def pipe(_: Path, folder: Path) -> str:
        os.mkfifo(folder / "config.py")
        return str(folder / "config.py")

    out = [("config", name, (word, "config.py"), write(text)) for name, text, word in rows]
    out += [
        ("config", "another suffix", ("config.txt",), write("", "config.txt")),
        ("config", "a pipe", ("config.py",), pipe),
        ("config", "a directory", ("is no file",), lambda _, folder: str(folder)),
        ("config", "none there", ("none.py",), lambda _, folder: str(folder / "none.py")),
        ("config", "a name of another kind", ("is no file",), lambda *_: "a\0b.py"),
    ]
    return out


# Data


def _data() -> list[tuple]:
    good = '{"text": "abc", "prompt": "a", "completion": "b", "messages": []}\n'
    text, chat = {"format": "text"}, {"format": "messages"}
    pair, two = {"format": "preference"}, {"format": "completion"}
    rows = [
        ("nothing", "", text),
        ("blank lines", "\n\n\n", text),
        ("no JSON", good + "{text: abc}\n", text),
        ("cut off", good + '{"text": "ab', text),
        ("a number", good + "3\n", text),
        ("a list", good + "[3]\n", text),
        ("NaN", good + '{"text": NaN}\n', text),
        ("bytes", good.encode() + b'{"text": "\xff\xfe"}\n', text),
        ("binary", bytes(range(256)) * 4, text),
        ("another encoding", good.encode("utf-16"), text),
        ("half a character", good + '{"text": "\\ud800"}\n', text),
        ("deep", good + "[" * 100_000 + "]" * 100_000 + "\n", text),
        ("no field", good + '{"txt": "abc"}\n', text),
        ("null", good + '{"text": null}\n', text),
        ("text of a number", good + '{"text": 3}\n', text),
        ("text of a list", good + '{"text": ["a"]}\n', text),
        ("unknown characters", good + '{"text": "xyz"}\n', text),
        ("empty text", '{"text": ""}\n' * 3, {"format": "text", "bos": False, "eos": False}),
        ("too long", good + json.dumps({"text": "a" * 99}) + "\n", text | {"overlong": "error"}),
        ("all too long", (json.dumps({"text": "a" * 99}) + "\n") * 3, text),
        ("no completion", good + '{"prompt": "a"}\n', two),
        ("null completion", good + '{"prompt": "a", "completion": null}\n', two),
        ("no pair", good * 3, pair),
        ("half a pair", '{"prompt": "a", "chosen": "b"}\n' * 3, pair),
        ("no messages", '{"messages": []}\n' * 3, chat),
        ("messages of text", '{"messages": "abc"}\n' * 3, chat),
        ("messages of numbers", '{"messages": [3]}\n' * 3, chat),
        ("a message without a role", '{"messages": [{"content": "a"}]}\n' * 3, chat),
        ("a message of a number", '{"messages": [{"role": "user", "content": 3}]}\n' * 3, chat),
        ("no field of the name", good * 3, text | {"fields": {"field": "story"}}),
        ("fields of another format", good * 3, text | {"fields": {"promt": "a"}}),
        ("more apart than there are", good * 3, text | {"held_out": 99}),
        ("no parquet", good * 3, text | {"source": "parquet"}),
        ("a template without a prompt", good * 3, two | {"template": "abc"}),
        ("a length of 1", good * 3, text | {"length": 1}),
    ]

    def write(content: str | bytes, changes: dict) -> Write:
        def written(home_: Path, folder: Path) -> dict:
            put(folder / "data.jsonl", content)
            algorithm = {"algorithm": "dpo"} if changes["format"] == "preference" else {}
            return sft(home_ / "model", folder / "data.jsonl", data=changes, **algorithm)

        return written

    def of(make: Callable[[Path], Any]) -> Write:
        def written(home_: Path, folder: Path) -> dict:
            make(folder / "data.jsonl")
            return sft(home_ / "model", folder / "data.jsonl")

        return written

    def held(answer: str) -> Write:
        def written(home_: Path, folder: Path) -> dict:
            rows = (home_ / "rows.jsonl").read_text().splitlines()
            rows[5] = f'{{"prompt": "a", "answer": {answer}}}'
            (folder / "data.jsonl").write_text("\n".join(rows) + "\n")
            measure = {
                "problems": 8, "data": str(folder / "data.jsonl"), "max_tokens": 2,
                "reward": {"name": "numeric"},
            }  # fmt: skip
            data = {"format": "completion", "prompt_length": 4}
            return sft(home_ / "model", home_ / "rows.jsonl", data=data, evaluate=measure)

        return written

    words = ("data", "config.sft")
    return [("data", name, words, write(content, changes)) for name, content, changes in rows] + [
        ("data", "a pipe", words, of(os.mkfifo)),
        ("data", "a directory", words, of(os.mkdir)),
        ("data", "a loop", words, of(lambda p: p.symlink_to(p))),
        ("data", "none there", words, of(lambda p: None)),
        ("data", "a held-out answer of null", ("line 6",), held("null")),
        ("data", "a held-out answer of words", ("line 6",), held('"none"')),
        ("data", "a held-out answer of a list", ("line 6",), held("[1]")),
    ]


FILES: list[tuple] = [*_configs(), *_data()]
