"""The paper's tables and figures: grids of runs, what they take, and ours beside the published numbers."""
