"""ZeRO++: quantized collectives between nodes with slow links (arXiv:2306.10209)."""
