"""Length-aware micro-batches: sequences of many lengths, cut so that devices finish together."""
