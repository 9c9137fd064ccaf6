"""What a run leaves: files that are whole at every moment, and what is printed and drawn of them."""
