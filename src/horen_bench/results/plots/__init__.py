"""Figures as pure functions of rows: the paper's, and the curves of one run; each writes the numbers it shows."""
