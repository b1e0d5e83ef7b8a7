"""ZeRO++ (arXiv:2306.10209): quantized collectives across nodes with slow links."""
