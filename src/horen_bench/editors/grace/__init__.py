"""GRACE: a codebook of balls whose values take the output's place."""
