"""How a check passes or fails, with its numbers, under pytest and under `gpu-check`."""


class Wrong(AssertionError):
    """A check failed; `numbers` say by how much."""

    def __init__(self, numbers: dict):
        super().__init__(repr(numbers))
        self.numbers = numbers


def judged(right: bool, numbers: dict) -> dict:
    """The check's numbers. Raises Wrong with them where it is not right."""
    if not right:
        raise Wrong(numbers)
    return numbers
