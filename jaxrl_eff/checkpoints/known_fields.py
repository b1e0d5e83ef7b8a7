"""Names of the fields in Hugging Face's model and adapter files, and how each is handled.

Read: used by the parsers in `hf_config` and `peft_config`. Harmless: their values cannot change the
model's logits (they concern training, generation, storage or labels). Only: only some values are
supported. Every other field is rejected, see `fields.checked`. A test with the marker `parity`
compares these lists with the classes of the installed transformers and PEFT.
"""

from typing import Any

_SOFT = {"final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar"}
_WINDOW = {"sliding_window", "layer_types"}
_QWEN = _WINDOW | {"use_sliding_window", "max_window_layers"}
_GEMMA = _WINDOW | _SOFT | {"attention_bias", "hidden_activation"}

_READ = {
    "model_type", "architectures", "id2label", "num_labels", "vocab_size", "hidden_size",
    "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "rms_norm_eps", "initializer_range", "max_position_embeddings",
    "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "bos_token_id",
    "eos_token_id", "pad_token_id",
}  # fmt: skip
# Family -> fields that its parser reads.
READ: dict[str, set[str]] = {
    "llama": _READ | {"attention_bias", "mlp_bias", "layer_types"},
    "mistral": _READ | _WINDOW,
    "qwen2": _READ | _QWEN,
    "qwen3": _READ | _QWEN | {"attention_bias"},
    "gemma2": _READ | _GEMMA,
    "gemma3_text": _READ | _GEMMA | {"rope_local_base_freq", "sliding_window_pattern"},
}
# Generation parameters, which old files contain and transformers removes from them unread.
GENERATION = {
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "early_stopping", "max_time",
    "stop_strings", "do_sample", "num_beams", "num_beam_groups", "temperature", "top_k", "top_p",
    "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "encoder_repetition_penalty", "length_penalty", "diversity_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "force_words_ids", "constraints",
    "renormalize_logits", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "sequence_bias", "token_healing", "guidance_scale", "watermarking_config",
    "num_return_sequences", "output_scores", "output_logits", "return_dict_in_generate",
    "decoder_start_token_id", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "prompt_lookup_num_tokens",
    "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
    "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "compile_config",
    "disable_compile", "continuous_batching_config", "low_memory", "penalty_alpha", "dola_layers",
    "prefill_chunk_size", "cache_implementation", "cache_config", "max_cache_len", "use_mtp",
    "use_cache", "output_attentions", "output_hidden_states", "_from_model_config",
    "generation_config",
}  # fmt: skip
HARMLESS = GENERATION | {
    # Storage and origin: parameters are cast to the run's dtype.
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype",
    "unsloth_version", "unsloth_fixed", "_unsloth_fixed", "transformers.js_config", "license",
    # Kernels and outputs of transformers' own code.
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "_flash_attn_2_enabled", "experts_implementation", "return_dict", "torchscript",
    "pretraining_tp", "use_bfloat16", "tf_legacy_loss", "is_decoder", "tie_last_hidden_states",
    # Training there: dropout, and the loss.
    "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "classifier_dropout", "problem_type", "label2id", "finetuning_task", "task_specific_params",
    "tokenizer_class", "prefix",
    # Written by transformers 5 for Gemma 3 in addition to layer_types.
    "_sliding_window_pattern",
}  # fmt: skip
_NONE = (None,)
_OFF = (None, False)
# Known, and supported with these values only; transformers' own default comes first.
ONLY: dict[str, tuple[Any, ...]] = {
    "use_bidirectional_attention": _OFF,
    "partial_rotary_factor": (None, 1),
    "quantization_config": _NONE,
    "compression_config": _NONE,
    "per_layer_config": _NONE,
    "is_encoder_decoder": _OFF,
    "add_cross_attention": _OFF,
    "cross_attention_hidden_size": _NONE,
    "tie_encoder_decoder": _OFF,
    "chunk_size_feed_forward": (None, 0),
    "pruned_heads": (None, {}),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "mlp_bias": _OFF,
    "attention_bias": _OFF,
    "use_qk_norm": _OFF,
    "clip_qkv": _NONE,
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": _NONE,
    "attention_chunk_size": _NONE,
    "no_rope_layers": (None, []),
}
# Qwen 2 always has biases on these projections, whatever the field says.
ONLY_OF = {"qwen2": {"attention_bias": (None, True, False)}}
# The image-text model around Gemma 3's decoder; only the decoder is run.
GEMMA3 = {
    "text_config", "vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index",
    "image_token_index", "model_type", "architectures", "tie_word_embeddings", "bos_token_id",
    "eos_token_id", "pad_token_id", "initializer_range", "id2label", "num_labels",
}  # fmt: skip

_ROPE = {"rope_type", "type", "rope_theta"}
# Kind of rotary embedding -> the fields that it reads.
ROPE = {
    "default": _ROPE,
    "linear": _ROPE | {"factor"},
    "llama3": _ROPE
    | {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": _ROPE
    | {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
    | {"mscale", "mscale_all_dim", "truncate"},
}

LORA_READ = {
    "peft_type", "task_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules",
    "exclude_modules", "modules_to_save", "init_lora_weights", "ensure_weight_tying",
}  # fmt: skip
LORA_HARMLESS = {
    "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "lora_dropout", "runtime_config",
    # Settings of features that another field enables, and that field is read.
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config",
}  # fmt: skip
LORA_ONLY: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": _OFF,
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "layers_pattern": (None, [], ""),
    "layer_replication": (None, []),
    "megatron_config": _NONE,
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "lora_bias": _OFF,
    "use_qalora": _OFF,
    "use_bdlora": _NONE,
    "alora_invocation_tokens": _NONE,
    "arrow_config": _NONE,
    "kasa_config": _NONE,
    "monteclora_config": _NONE,
    "velora_config": _NONE,
}
# Initializations of LoRA's matrices that do not change the base model. Others (PiSSA, OLoRA, CorDA,
# LoftQ, LoRA-GA) change the base, or the form of the adapter.
INITS = (True, False, None, "gaussian", "eva", "orthogonal")
