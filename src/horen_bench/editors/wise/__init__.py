"""WISE (arXiv 2405.14768), one layer's weight, a side copy of it, and a router between the two; and REPAIR on it."""
