"""Instructions about images."""
