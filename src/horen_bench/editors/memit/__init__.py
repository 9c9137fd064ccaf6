"""MEMIT: many facts by least squares over a window of layers."""
