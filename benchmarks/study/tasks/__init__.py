"""What is learned: examples from installed packages, questions about images, and how a model takes them."""
