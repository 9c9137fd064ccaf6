"""Every write, fsync, rename, read and allocation of a run fails once, and runs are killed; `__main__.py` runs it."""
