"""Training of a part of a model: sparse entries, LoRA, quantized bases, layers in turn."""
