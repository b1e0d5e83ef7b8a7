"""Names of the fields in a tokenizer's files, and how each is handled.

Read: `tokenizer.py` uses them. Harmless: they do not affect tokens. Every other field is refused,
see `fields.checked`, except names that end in "_token" with a text value: those are special tokens.
"""

from typing import Any

READ = {
    "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens",
    "model_specific_special_tokens", "add_bos_token", "add_eos_token", "add_prefix_space",
    "split_special_tokens", "chat_template", "alphabet", "bos_token", "eos_token", "pad_token",
    "unk_token", "sep_token", "cls_token", "mask_token",
}  # fmt: skip
HARMLESS = {
    # The class that reads tokenizer.json, and where the file was stored.
    "tokenizer_class", "processor_class", "name_or_path", "special_tokens_map_file",
    "tokenizer_file", "is_local", "local_files_only", "backend", "files_loaded", "from_slow",
    "init_inputs", "transformers_version", "unsloth_version",
    # Lengths, padding and truncation, which each run sets itself.
    "model_max_length", "max_len", "max_length", "padding_side", "truncation_side", "stride",
    "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id", "padding", "truncation",
    "model_input_names", "return_token_type_ids", "add_special_tokens", "verbose",
    # Decoding, and conversion from a sentencepiece model, which is not read.
    "clean_up_tokenization_spaces", "spaces_between_special_tokens", "errors", "legacy",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", "sp_model_kwargs",
    # Conversations: how replies are parsed, and prompts that a template would have to request.
    "use_default_system_prompt", "response_template", "response_schema", "chat_control_tokens",
}  # fmt: skip
# Known fields, supported with these values only.
ONLY: dict[str, tuple[Any, ...]] = {
    "auto_map": (None, {}),
    "do_lower_case": (None, False),
    "fix_mistral_regex": (None, False),
}
# Flags of one added token.
TOKEN = {"content", "lstrip", "rstrip", "single_word", "normalized", "special", "__type"}
