"""Everything about a GPU that cannot be known without one, measured step by step; `gpu_suite.py` runs it."""
