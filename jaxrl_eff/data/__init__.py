"""Data pipeline: sources, chat templates, packing, and resumable batches of static shape."""
