"""Loads the workspace library once, past the deprecations that it raises while it is imported."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import wandb_workspaces.workspaces  # noqa: F401
