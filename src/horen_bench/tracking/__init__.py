"""A copy of the runs' numbers for a dashboard (Weights & Biases); tables never read from it."""
