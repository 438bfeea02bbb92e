"""The one kind of error that a user can mend."""


class UserError(ValueError):
    """A mistake in the configuration or the input, shown as one line, exit status 2, no traceback.

    Args:
        key: dotted configuration key or file that is at fault, e.g. ``data.source``.
        problem: what is wrong, in words.
        remedy: what to do about it (may be empty).
    """

    def __init__(self, key: str, problem: str, remedy: str = ""):
        self.key, self.problem, self.remedy = key, problem, remedy
        super().__init__(f"{key}: {problem}" + (f" ({remedy})" if remedy else ""))
