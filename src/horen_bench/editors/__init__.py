"""Editing methods behind one contract (`base`), one module per method."""
