"""What the codebook editors share: routing, the growing codebook, the hook, the training of values."""
