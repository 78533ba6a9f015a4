"""Thin Lightning callbacks around the core."""
