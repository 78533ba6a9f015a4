"""Tiny randomly initialised models of every model type that transformers can build, for tests that go wide."""
