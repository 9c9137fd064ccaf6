"""WISE (arXiv 2405.14768): one layer's weight, a side copy of it, and a router between the two."""

from horen_bench.editors.wise.editor import WiseEditor

__all__ = ["WiseEditor"]
