"""Backbones: their module trees, how they are loaded, changed and put back."""
