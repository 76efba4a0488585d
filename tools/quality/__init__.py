"""Trains models in several ways and compares how well they learn; run it as `python tools/quality --help` explains."""
