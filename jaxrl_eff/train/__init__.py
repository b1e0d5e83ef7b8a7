"""Training from a config: settings, assembly, the training loop, evaluation, export."""
