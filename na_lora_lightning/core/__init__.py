"""The method in pure torch: it knows nothing of Lightning."""
