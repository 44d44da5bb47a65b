"""Objects with a ``close`` as context managers."""

from __future__ import annotations

from types import TracebackType
from typing import Any, NoReturn, TypeVar

__all__ = ["Closing"]

_Self = TypeVar("_Self", bound="Closing")


class Closing:
    """A context manager that calls ``close`` at its end, also after an error."""

    # What to do instead of a pickle or a copy.
    _instead = "pass on its path, and open that again"

    def close(self) -> None:
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Neither ``pickle`` nor ``copy`` takes what holds open files.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"a {type(self).__name__} keeps files open, and cannot be pickled or copied: "
            f"{self._instead}"
        )

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
