"""Commands as people type them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from weightlift.cli.main import main

__all__ = ["Type", "type_in"]

Type = Callable[..., "tuple[int, str, str]"]


@pytest.fixture
def type_in(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Type:
    """``weightlift ARGUMENTS`` on a terminal of 80 columns: the status, stdout and stderr."""

    def type_in(*arguments: str | Path, columns: int = 80) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", ["weightlift", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return type_in
