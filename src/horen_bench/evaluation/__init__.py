"""Evaluates a model on the probes of a stream's prefix under one protocol; knows nothing about methods."""
