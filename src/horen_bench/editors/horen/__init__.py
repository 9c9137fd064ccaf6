"""HoReN: a codebook read by normalized Hopfield retrieval."""
