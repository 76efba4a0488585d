"""Compares predicted peaks with those of real training steps."""
