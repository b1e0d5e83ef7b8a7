"""Weights on disk: checkpoints of a run, Hugging Face and PEFT files, delta files."""
