"""Datasets: each yields `EditCase`s in stream order."""
