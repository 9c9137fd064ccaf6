"""Fine-tuning of one weight matrix on the edit alone: FT-L and FT-M."""
