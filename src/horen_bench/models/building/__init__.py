"""Model folders that are made on the user's machine, from weights that come as packages or as GGUF files."""
