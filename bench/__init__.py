"""Measurements of handlefs, and of others beside it; see README.md."""
