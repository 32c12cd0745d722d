"""Exact attention: api.py says what it computes; one file for each backend."""
