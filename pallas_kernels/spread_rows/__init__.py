"""Rows copied to several places each."""
