"""AlphaEdit: MEMIT's window with every change kept out of the directions of general text."""
