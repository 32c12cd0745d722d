"""Runs of rows between devices, each to its own place in the receiver's array."""
