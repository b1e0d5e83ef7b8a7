"""Prints what a model answers, token by token.

  python -m jaxrl_eff generate --model=runs/quickstart --prompt="123>" --temperature=0
  python -m jaxrl_eff generate --model=DIR --chat

--model is a Hugging Face directory, or the workdir of a run that exported its model. With --prompt
only the continuation is printed. With --chat every line of standard input is answered, through the
chat template of the checkpoint; end the conversation with Ctrl-D. The same seed gives the same
tokens as in training. It runs on one device.
"""

# The model, the cache and the draw are those of `rollout.sample`; only the loop is on the host, so
# that every token is shown as it comes. Left out: keeping the cache between turns of a chat.

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxrl_eff.checkpoints import load_hf, read_config
from jaxrl_eff.cli import parser
from jaxrl_eff.data.chat import render_chat
from jaxrl_eff.data.text import decode_stream
from jaxrl_eff.data.tokenizer import Tokenizer, load_tokenizer
from jaxrl_eff.models import LMConfig, apply, unembed, unstack_layers
from jaxrl_eff.models.logits import Warp
from jaxrl_eff.models.transformer import Cache
from jaxrl_eff.parallel import host
from jaxrl_eff.rollout import cache as kv
from jaxrl_eff.rollout.generate import small
from jaxrl_eff.rollout.sampling import Sampling, draw, uniforms
from jaxrl_eff.types import Array, Float, Int, Key, PyTree

# Prompts are padded to multiples of this, so that a conversation compiles few programs.
_BLOCK = 64
_DEFAULT_TOKENS = 256


def stream(
    cfg: LMConfig, params: PyTree, sampling: Sampling, prompt: Sequence[int], key: Key[Array, ""]
) -> Iterator[int]:
    """The tokens of one response, without the one that ends it.

    Args:
        params: stacked, or apart (`models.unstack_layers`), which is faster for small models.
        prompt: at least one token id.
    """
    width = -(-len(prompt) // _BLOCK) * _BLOCK
    steps = -(-sampling.max_tokens // _BLOCK) * _BLOCK
    padded = jnp.zeros((1, width), jnp.int32).at[0, : len(prompt)].set(jnp.asarray(prompt))
    uniform = _uniforms(key, steps)
    stops = {*cfg.eos, *sampling.stop}
    logits, cache = _read(cfg, width + steps, params, padded, jnp.int32(len(prompt)))
    token = draw(logits, sampling.warp, uniform[:, 0])[0]
    for step in range(1, sampling.max_tokens + 1):
        shown = token
        if step < sampling.max_tokens:
            # Dispatched before the last token is fetched: the device works while text is printed.
            at = jnp.int32([[len(prompt) + step - 1]])
            token, cache = _step(
                cfg, sampling.warp, params, cache, token[:, None], at, uniform, jnp.int32(step)
            )
        if int(shown[0]) in stops:
            return
        yield int(shown[0])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(
    cfg: LMConfig, slots: int, params: PyTree, prompt: Int[Array, "B T"], length: Int[Array, ""]
) -> tuple[Float[Array, "B V"], Cache]:
    """The logits after the prompt, which is padded, and its cache, with `slots` in all."""
    at = jnp.arange(prompt.shape[1], dtype=jnp.int32)[None]
    segment = (at < length).astype(jnp.int32)
    cache = kv.empty(cfg, 1, slots, stacked="layers" in params)
    hidden, cache = apply(cfg, params, prompt, at, segment, cache=cache)
    last = jax.lax.dynamic_index_in_dim(hidden, length - 1, axis=1, keepdims=False)
    # A number of type int would make the first step another program than the second.
    return unembed(cfg, params, last), cache.replace(slot=jnp.int32(cache.slot))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _step(
    cfg: LMConfig,
    warp: Warp,
    params: PyTree,
    cache: Cache,
    token: Int[Array, "B 1"],
    position: Int[Array, "B 1"],
    uniform: Float[Array, "B steps"],
    step: Int[Array, ""],
) -> tuple[Int[Array, "B"], Cache]:
    """Reads a token and draws the next."""
    hidden, cache = apply(cfg, params, token, position, jnp.ones_like(token), cache=cache)
    now = jax.lax.dynamic_index_in_dim(uniform, step, axis=1, keepdims=False)
    return draw(unembed(cfg, params, hidden[:, 0]), warp, now)[0], cache


@functools.partial(jax.jit, static_argnums=1)
def _uniforms(key: Key[Array, ""], steps: int) -> Float[Array, "1 steps"]:
    """The random numbers that `rollout.sample` gives to its first row."""
    return uniforms(key, jnp.zeros(1, jnp.int32), steps)


def find(directory: str) -> Path:
    """The Hugging Face directory that is meant.

    Raises:
        FileNotFoundError: neither it nor its `export/` holds a `config.json`.
    """
    path = Path(directory)
    for candidate in (path / "export", path):
        if (candidate / "config.json").is_file():
            return candidate
    if not path.is_dir():
        raise FileNotFoundError(f"--model={directory}: there is no such directory.")
    raise FileNotFoundError(
        f"--model={directory} holds neither a config.json nor an export/ with one."
    )


def language_model(directory: Path, ignore: Sequence[str] = ()) -> LMConfig:
    """The config of a model that writes text.

    Raises:
        ValueError: it is a value model.
    """
    cfg = read_config(directory, ignore=ignore)
    if cfg.head != "lm":
        raise ValueError(f"{directory} holds a value model, which cannot write text.")
    return cfg


def _room(cfg: LMConfig, prompt: Sequence[int], asked: int | None) -> int:
    """Returns the longest response in tokens: `asked`, or what fits up to `_DEFAULT_TOKENS`.

    Raises:
        ValueError: the prompt is empty, not of this model's vocabulary, or too long with `asked`.
    """
    if not prompt:
        raise ValueError("the prompt is empty, and the tokenizer has no token that begins a text.")
    if max(prompt) >= cfg.vocab:
        raise ValueError(f"the tokenizer gives id {max(prompt)}, but the model has {cfg.vocab}.")
    left = cfg.max_length - len(prompt)
    if left < (asked or 1):
        raise ValueError(
            f"the prompt has {len(prompt)} tokens and --max_tokens={asked or 1}, together more "
            f"than the {cfg.max_length} that the model was made for."
        )
    return asked or min(left, _DEFAULT_TOKENS)


def _load(directory: Path, cfg: LMConfig, ignore: Sequence[str]) -> PyTree:
    params = load_hf(directory, cfg, ignore=ignore)
    if small(params):
        params = jax.jit(unstack_layers, static_argnums=0)(cfg, params)
    return params


def _chat(tokenizer: Tokenizer, say: Callable[[Sequence[int], int], str]) -> None:
    """Answers every line of standard input until it ends."""
    messages: list[dict[str, str]] = []
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.rstrip("\n")})
        text = render_chat(tokenizer, messages, add_generation_prompt=True)
        answer = say(tokenizer.encode(text), len(messages))
        messages.append({"role": "assistant", "content": answer})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    words = parser.command("generate", __doc__)
    add = words.option
    add("--model", "DIR", parser.MODEL)
    add("--prompt", "TEXT", "the text to continue", default=None)
    words.flag("--chat", "hold a conversation on standard input")
    longest = f"longest answer (default {_DEFAULT_TOKENS}, or what the context leaves)"
    add("--max_tokens", "N", longest, int, None)
    add("--temperature", "T", "0 always takes the likeliest token", float, 1.0)
    add("--top_k", "K", "sample from the K likeliest tokens; 0: from all", int, 0)
    add("--top_p", "P", "sample from the likeliest tokens that sum to this", float, 1.0)
    add("--seed", "N", parser.SEED_OF, parser.SEED, 0)
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", "NAME", f"one of {', '.join(dtypes)}", default=dtypes[0], choices=dtypes)
    unread = "fields and tensors of the checkpoint to ignore, separated by commas"
    add("--ignore", "NAMES", unread, default="")
    return words.run(argv, _run)


def _run(args: argparse.Namespace) -> None:
    # Everything that can be wrong is found before the weights are read.
    if (args.prompt is None) != args.chat:
        raise ValueError("give either --prompt=TEXT or --chat; see --help.")
    host.devices()
    directory = find(args.model)
    ignore = tuple(filter(None, args.ignore.split(",")))
    cfg = language_model(directory, ignore).replace(dtype=args.dtype, param_dtype=args.dtype)
    tokenizer = load_tokenizer(directory, ignore=ignore)
    asked = args.max_tokens
    sampling = Sampling(
        max_tokens=_DEFAULT_TOKENS if asked is None else asked,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        stop=tokenizer.stop,
    )
    key = jax.random.key(args.seed)
    if args.chat:
        render_chat(tokenizer, [{"role": "user", "content": ""}], add_generation_prompt=True)
    prompt = [0] if args.chat else tokenizer.encode(args.prompt, special=True)
    _room(cfg, prompt, asked)
    params = _load(directory, cfg, ignore)

    def say(prompt: Sequence[int], turn: int | None = None) -> str:
        """Prints a response as it comes, and returns it."""
        own = key if turn is None else jax.random.fold_in(key, turn)
        limited = dataclasses.replace(sampling, max_tokens=_room(cfg, prompt, asked))
        pieces = []
        ids = stream(cfg, params, limited, prompt, own)
        for piece in decode_stream(tokenizer, ids, after=prompt):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print(flush=True)
        return "".join(pieces)

    if args.chat:
        _chat(tokenizer, say)
    else:
        say(prompt)
