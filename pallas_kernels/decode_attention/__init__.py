"""Attention of a few new tokens to a paged cache: api.py says what it computes; one file for each backend."""
