"""Benchmark harness for large-scale sequential knowledge editing of language models."""
