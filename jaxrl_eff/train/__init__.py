"""From a config to trained weights: settings, assembly, the training loop, evaluation, export."""
