"""Length-aware micro-batches of sequences, packed and sharded so that devices finish together."""
