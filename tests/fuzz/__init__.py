"""Random input for the package, by commands of their own."""
