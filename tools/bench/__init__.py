"""Measures velora_fx against its rivals."""
