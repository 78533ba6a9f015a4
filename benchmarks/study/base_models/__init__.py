"""What is fine-tuned: small models that the study pretrains itself, once, and ships."""
