"""Makes the golden numbers beside it: logits that transformers gives for tiny random models.

  python tests/checkpoints/golden/make_golden.py

A case is `NAME.json` (a config.json and the shape of every tensor) and `NAME.npz` (token ids
and logits). Weights are not stored: `weights` draws them from the tensors' names, here and in the
tests alike. Sequences are longer than the sliding windows. Made with transformers 5.12.1 and torch
2.13.0 in float32.
"""

import json
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TOKENS = 32

_TINY = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Old and new spellings of the rotary embedding both occur, as they do in the wild.
CASES = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500.0},
    "llama3": {
        "model_type": "llama",
        "head_dim": 16,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 48,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": 7, "head_dim": 12},
    "qwen2": {
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
        "rope_theta": 10_000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen2_linear": {
        "model_type": "qwen2",
        "sliding_window": 6,
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    },
    "qwen3": {
        "model_type": "qwen3",
        "head_dim": 20,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "gemma2": {
        "model_type": "gemma2",
        "num_hidden_layers": 4,
        "head_dim": 12,
        "query_pre_attn_scalar": 20,
        "sliding_window": 6,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 25.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 5,
        "sliding_window_pattern": 3,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}


def weights(shapes: dict[str, list[int]], *, gemma: bool) -> dict[str, np.ndarray]:
    """float32 weights, each drawn from its name; matrices keep the size of what they multiply."""
    drawn = {}
    for name, shape in shapes.items():
        # The legacy generator, because its numbers never change between releases.
        x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if name.endswith("norm.weight") or "layernorm" in name:
            x = 0.3 * x + (0.0 if gemma else 1.0)
        elif x.ndim == 2 and "embed" not in name:
            x = x / np.sqrt(shape[1])
        drawn[name] = x.astype(np.float32)
    return drawn


def tokens(name: str, vocab: int) -> np.ndarray:
    """[TOKENS] int32 token ids of a case."""
    return np.random.RandomState(zlib.crc32(name.encode())).randint(vocab, size=TOKENS, dtype="i4")


def reference(config: dict):
    """The transformers model of a configuration with our weights, and its tensors' shapes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(config)
    hf = AutoConfig.for_model(settings.pop("model_type"), **settings)
    # Only the eager attention applies Gemma 2's soft-cap.
    model = AutoModelForCausalLM.from_config(hf, attn_implementation="eager").float().eval()
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    if config.get("tie_word_embeddings", hf.model_type.startswith("gemma")):
        del shapes["lm_head.weight"]
    drawn = weights(shapes, gemma=hf.model_type.startswith("gemma"))
    model.load_state_dict({k: torch.tensor(v) for k, v in drawn.items()}, strict=False)
    model.tie_weights()
    return model, shapes


def logits(model, ids: np.ndarray) -> np.ndarray:
    """[T, V] float32."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids[None], dtype=torch.long)).logits[0].numpy()


def main() -> None:
    for name, case in CASES.items():
        config = _TINY | case
        model, shapes = reference(config)
        ids = tokens(name, config["vocab_size"])
        out = logits(model, ids)
        text = json.dumps({"config": config, "shapes": shapes}, indent=1)
        (HERE / f"{name}.json").write_text(text + "\n")
        np.savez_compressed(HERE / f"{name}.npz", ids=ids, logits=out)
        print(f"{name:13s} {len(shapes):3d} tensors, |logits| <= {abs(out).max():.2f}")


if __name__ == "__main__":
    main()
