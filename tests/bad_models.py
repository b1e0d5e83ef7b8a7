"""Files that cannot be used: models, tokenizers, templates, adapters and deltas."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_files import Write, copy, edited, put, sft


def _turned(content: bytes) -> bytes:
    """A file of safetensors whose first matrix that is not square says to lie on its side."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    shapes = [v["shape"] for k, v in sorted(header.items()) if k != "__metadata__"]
    next(s for s in shapes if len(s) == 2 and s[0] != s[1]).reverse()
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    return content[:8] + text + content[8 + size :]


def _models() -> list[tuple]:
    sizes = (
        "vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads",
        "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings",
    )  # fmt: skip
    values: list[Any] = ["abc", [], {}, 0, -1, 1.5, True, 1e30]
    changes = [{name: value} for name in sizes for value in values]
    other: list[Any] = ["abc", [], {}, -1.0, float("nan"), float("inf")]
    changes += [{name: v} for name in ("rms_norm_eps", "rope_theta") for v in other]
    changes = [
        *random.Random(1).sample(changes, 24),
        {"model_type": 3}, {"model_type": "mamba"}, {"architectures": 3}, {"hidden_act": "tanhx"},
        {"rope_scaling": "linear"}, {"rope_scaling": {"rope_type": "x", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": "x"}}, {"tie_word_embeddings": "x"},
        {"eos_token_id": "x"}, {"quantization_config": {"bits": 4}},
    ]  # fmt: skip

    def config(change: dict) -> Write:
        def written(home_: Path, folder: Path) -> dict:
            model = copy(home_, folder, "model")
            edited(model / "config.json", change)
            return sft(model, home_ / "rows.jsonl")

        return written

    def file(name: str, content: str | bytes | None, *more: str) -> Write:
        def written(home_: Path, folder: Path) -> tuple:
            model = copy(home_, folder, "model")
            if name == "tokenizer.json":  # a tokenizer of characters would not read it
                edited(model / "tokenizer_config.json", {"alphabet": None})
            put(model / name, content)
            return ("generate", f"--model={model}", "--max_tokens=1", *(more or ("--prompt=a",)))

        return written

    def weights(change: Callable[[bytes], bytes]) -> Write:
        def written(home_: Path, folder: Path) -> tuple:
            model = copy(home_, folder, "model")
            path = model / "model.safetensors"
            path.write_bytes(change(path.read_bytes()))
            return "generate", f"--model={model}", "--max_tokens=1", "--prompt=a"

        return written

    def template(text: Any) -> Write:
        def written(home_: Path, folder: Path) -> tuple:
            model = copy(home_, folder, "model")
            edited(model / "tokenizer_config.json", {"chat_template": text})
            return "generate", f"--model={model}", "--max_tokens=1", "--chat"

        return written

    out = [("model", str(c), (*c, "config.json"), config(c)) for c in changes]
    out += [
        ("model", f"config.json is {text!s:.20}", ("model",), file("config.json", text))
        for text in ("", "[1]", "3", "null", "{", b"\xff\xfe", "[" * 9999 + "]" * 9999, None)
    ]
    out += [
        ("model", f"generation_config.json is {t}", ("model",), file("generation_config.json", t))
        for t in ('{"eos_token_id": "x"}', "[]", "{")
    ]
    out += [
        ("model", "an index of numbers", ("model",), file(INDEX, '{"weight_map": {"a": 5}}')),
        ("model", "an index of a list", ("model",), file(INDEX, "[]")),
        ("model", "an index elsewhere", ("model",), file(INDEX, '{"weight_map": {"a": "/x"}}')),
        ("model", "no weights", ("model",), file("model.safetensors", None)),
        ("model", "empty weights", ("model",), file("model.safetensors", b"")),
        ("model", "weights of text", ("model",), file("model.safetensors", "abc" * 99)),
        ("model", "half the weights", ("model",), weights(lambda b: b[: len(b) // 2])),
        ("model", "weights with more behind", ("model",), weights(lambda b: b + b"abc")),
        ("model", "a huge header", ("model",), weights(lambda b: b"\xff" * 8 + b[8:])),
        ("model", "other names", ("model",), weights(lambda b: b.replace(b"embed", b"embbd"))),
        ("model", "another shape", ("model",), weights(_turned)),
    ]
    told = ("tokenizer", "model")
    out += [
        ("tokenizer", f"tokenizer.json is {text!s:.20}", told, file("tokenizer.json", text))
        for text in ("", "{", "[]", "3", "{}", '{"model": {}}', '{"model": {"type": "x"}}', b"\xff")
    ]
    out += [
        ("tokenizer", f"its config is {text!s:.40}", told, file("tokenizer_config.json", text))
        for text in (
            "[]",
            "{",
            "3",
            '"a"',
            '{"eos_token": {"x": 1}}',
            '{"eos_token": 3}',
            '{"eos_token": "<none>"}',
            '{"bos_token": []}',
            '{"pad_token": {"content": 3}}',
            b"\xff",
        )
    ]
    out += [
        ("template", str(text)[:60], ("template", "chat"), template(text))
        for text in (
            3,
            [1],
            {"a": 1},
            "{{ 1 // 0 }}",
            "{% for",
            "{{ nothing.x }}",
            "{{ messages[9].x }}",
            "{{ raise_exception('no') }}",
            "{% for i in range(10**9) %}{% endfor %}",
            "{% for i in range(99999) %}{% for j in range(99999) %}a{% endfor %}{% endfor %}",
            "{{ 'a' * 10**10 }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{% include 'x' %}",
            "{{ messages.__class__.__mro__ }}",
            "{{ 3 + 'a' }}",
        )
    ]
    return out


INDEX = "model.safetensors.index.json"


# Adapters and deltas


def _adapters() -> list[tuple]:
    def written(change: Callable[[Path], Any]) -> Write:
        def write(home_: Path, folder: Path) -> dict:
            adapter = copy(home_, folder, "adapter")
            change(adapter)
            part = {"name": "lora", "rank": 2, "start": str(adapter)}
            return sft(home_ / "model", home_ / "rows.jsonl", adapt={"actor": part})

        return write

    config, weights = "adapter_config.json", "adapter_model.safetensors"
    changes = [
        {"r": "x"}, {"r": 3}, {"r": 0}, {"lora_alpha": "x"}, {"lora_alpha": None},
        {"peft_type": "IA3"}, {"target_modules": 3}, {"bias": "all"}, {"use_dora": True},
        {"init_lora_weights": "pissa"}, {"no_such_field": 3}, {"rank_pattern": {"q_proj": 9}},
    ]  # fmt: skip
    out = [
        ("adapter", str(c), ("adapter",), written(lambda d, c=c: edited(d / config, c)))
        for c in changes
    ]
    contents = [(config, t) for t in ("", "[]", "{", "null", b"\xff", None)]
    contents += [(weights, t) for t in (b"", b"abc" * 99, None)]
    return out + [
        ("adapter", f"{n} is {t!r}"[:60], ("adapter",), written(lambda d, n=n, t=t: put(d / n, t)))
        for n, t in contents
    ]


def _deltas() -> list[tuple]:
    def written(change: Callable[[bytes], bytes], *command: str) -> Write:
        def write(home_: Path, folder: Path) -> tuple:
            file = folder / "delta"
            file.write_bytes(change((home_ / "delta").read_bytes()))
            if command == ("show",):
                return "delta", "show", str(file)
            base, out = f"--base={home_}/model", f"--out={folder}/out"
            return "delta", "apply", base, f"--delta={file}", out

        return write

    rng = random.Random(2)

    def flipped(content: bytes) -> bytes:
        at = rng.randrange(8, len(content))
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]

    changes = [
        ("nothing", lambda b: b""), ("text", lambda b: b"no delta"), ("half", lambda b: b[:200]),
        ("cut off", lambda b: b[:-1]), ("more behind", lambda b: b + b"x"),
        ("a huge header", lambda b: b"\xff" * 8 + b[8:]),
        ("another version", lambda b: b.replace(b'\\"version\\": 1', b'\\"version\\": 9')),
        ("another shape", lambda b: b.replace(b'\\"shape\\": [12, 16]', b'\\"shape\\": [99, 16]')),
        *((f"a flipped bit, {i}", flipped) for i in range(4)),
    ]  # fmt: skip
    return [
        ("delta", f"{name}, {how}", ("delta",), written(change, how))
        for name, change in changes
        for how in ("show", "apply")
    ]


FILES: list[tuple] = [*_models(), *_adapters(), *_deltas()]
