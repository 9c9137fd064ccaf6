"""UnKE: answers of a paragraph written into one whole decoder block."""

from horen_bench.editors.unke.editor import UnkeEditor

__all__ = ["UnkeEditor"]
