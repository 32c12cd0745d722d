"""Activations rounded to 8 bits, one scale for each row and group."""
