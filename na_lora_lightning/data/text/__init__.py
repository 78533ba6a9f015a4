"""Instructions in text."""
