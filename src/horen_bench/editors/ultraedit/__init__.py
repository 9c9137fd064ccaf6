"""UltraEdit: a closed-form change of several matrices, lifelong normalised."""
