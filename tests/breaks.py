"""What a deliberate break of the code is.

The lists are in `breaks_*.py`. `mutations.py` runs them, and `test_mutations.py` sees that they fit the code.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Break:
    """One fault that somebody might make, and the tests that must notice it.

    Attributes:
        name: what is wrong then, in a few words; unique.
        file: path in the repository.
        text: what stands there, exactly once.
        replacement: what stands there instead.
        tests: node ids, of which at least one must fail.
    """

    name: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]

    def applied(self, source: str) -> str:
        """The file's content with the break in it.

        Raises:
            ValueError: when the text is not there exactly once: the code has moved on, and the break must follow.
        """
        count = source.count(self.text)
        if count != 1:
            raise ValueError(f"break {self.name!r}: its text occurs {count} times in {self.file}, not once; update it")
        if self.text == self.replacement:
            raise ValueError(f"break {self.name!r} changes nothing")
        return source.replace(self.text, self.replacement)
