"""The study that asks whether NA-LoRA beats plain LoRA: cells of task × model × arm × learning rate × seed."""


class StudyError(Exception):
    """A study, a result or a piece of data that cannot be used: one sentence with the reason and the remedy."""
