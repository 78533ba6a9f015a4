"""What can go wrong with a study, in one sentence that names the thing, the reason and the remedy."""


class StudyError(Exception):
    """A study, a result or a piece of data that cannot be used."""
