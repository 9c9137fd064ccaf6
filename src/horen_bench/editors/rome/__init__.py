"""ROME: one fact as one rank-one change of one down-projection."""
