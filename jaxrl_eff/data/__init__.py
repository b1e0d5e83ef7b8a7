"""Examples in, arrays of static shape out: sources, chat templates, packing, resumable batches."""
