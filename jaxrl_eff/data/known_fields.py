"""Names of the fields in a tokenizer's files, and what is done with each.

Read: `tokenizer.py` uses them. Harmless: tokens are the same whatever they say. Every other field
is refused, see `fields.checked`; those that end in "_token" and name a text are special tokens.
"""

from typing import Any

READ = {
    "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens",
    "model_specific_special_tokens", "add_bos_token", "add_eos_token", "add_prefix_space",
    "split_special_tokens", "chat_template", "alphabet", "bos_token", "eos_token", "pad_token",
    "unk_token", "sep_token", "cls_token", "mask_token",
}  # fmt: skip
HARMLESS = {
    # Which class reads tokenizer.json, and where it was.
    "tokenizer_class", "processor_class", "name_or_path", "special_tokens_map_file",
    "tokenizer_file", "is_local", "local_files_only", "backend", "files_loaded", "from_slow",
    "init_inputs", "transformers_version", "unsloth_version",
    # Lengths, padding and truncation, which are a run's own.
    "model_max_length", "max_len", "max_length", "padding_side", "truncation_side", "stride",
    "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id", "padding", "truncation",
    "model_input_names", "return_token_type_ids", "add_special_tokens", "verbose",
    # Decoding, and conversion from a sentencepiece model, which is not read.
    "clean_up_tokenization_spaces", "spaces_between_special_tokens", "errors", "legacy",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", "sp_model_kwargs",
    # Conversations: what a reply is parsed by, and prompts that a template would have to ask for.
    "use_default_system_prompt", "response_template", "response_schema", "chat_control_tokens",
}  # fmt: skip
# Known, and supported with these values only.
ONLY: dict[str, tuple[Any, ...]] = {
    "auto_map": (None, {}),
    "do_lower_case": (None, False),
    "fix_mistral_regex": (None, False),
}
# Flags of one added token.
TOKEN = {"content", "lstrip", "rstrip", "single_word", "normalized", "special", "__type"}
