"""RMS norm and rotary position embedding of heads, in one pass; see api.py."""
