"""UnKE (arXiv 2405.15349): answers of a paragraph written into one whole decoder block."""
