"""Rows to the devices that want them, and sums of them home again."""
