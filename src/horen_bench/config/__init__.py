"""Configuration: what a run may be told, checked and put into words."""
