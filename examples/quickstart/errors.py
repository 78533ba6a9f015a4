"""What the quick start's preparation raises."""


class QuickstartError(RuntimeError):
    """The quick start cannot go on; the message says why and what helps."""
