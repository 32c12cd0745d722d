"""What 8-bit training needs of a gradient, in one pass: it rounded, lying both ways, its largest number; see api.py."""
