"""What the methods that rewrite a down-projection in closed form share: ROME, MEMIT, AlphaEdit."""
