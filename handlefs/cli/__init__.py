"""The command line: one module per command; main.py joins them."""
