"""The documented behaviour of ``ModelMixin``."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import weightlift as wl
from support import ROOT
from weightlift.checkpoint.hub import HubArguments
from weightlift.models import arguments

# The example of the documentation.
EXAMPLE = """
import torch

import weightlift as wl


class MyModel(wl.ModelMixin, wl.ConfigMixin):
    @wl.register_to_config
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(width, width)


class Named(MyModel):
    config_name = "named.json"


model: MyModel = MyModel.from_pretrained("folder", device_map="cuda", dtype="bfloat16")
model.save_pretrained("folder", max_shard_size="5GB")
"""


def test_from_pretrained_names_every_argument() -> None:
    text = wl.ModelMixin.from_pretrained.__doc__ or ""
    taken = {*arguments._DEFAULTS, *HubArguments.__dataclass_fields__}
    for name in (*taken, "use_auth_token", "resume_download", "proxies"):
        lines = [line.split(":")[0] for line in text.splitlines() if ":" in line]
        assert any(name in line.replace(",", " ").split() for line in lines), name


# Methods for the package itself, and those of torch.nn.Module.
INTERNAL = ("from_native", "plus", "native", "cuda")


@pytest.mark.parametrize("name", sorted(set(wl.__all__) - {"__version__", "Checkpoint"}))
def test_every_public_name_says_what_it_takes(name: str) -> None:
    public = getattr(wl, name)
    text = inspect.getdoc(public) or ""
    assert text
    is_made_by_users = not (
        isinstance(public, type) and issubclass(public, (Exception, torch.nn.Module))
    )
    if is_made_by_users and name not in ("ConfigMixin", "PushToHubMixin", "StreamHandle"):
        for argument in inspect.signature(public).parameters:
            assert re.search(rf"\b{argument}\b", text), argument
    if isinstance(public, type) and public not in (wl.StreamHandle, wl.Checkpoint):
        for method, function in inspect.getmembers(public, inspect.isroutine):
            is_ours = (getattr(function, "__module__", "") or "").startswith("weightlift.")
            if method.startswith("_") or not is_ours or method in INTERNAL:
                continue
            taken = [one for one in inspect.signature(function).parameters.values()
                     if one.name not in ("self", "cls")
                     and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]  # fmt: skip
            text = inspect.getdoc(function) or ""
            missing = [one.name for one in taken if not re.search(rf"\b{one.name}\b", text)]
            assert not missing, (method, missing)


# Examples have functions without annotations, libraries without types, and their own variables.
LENIENT = (
    "# mypy: allow-untyped-defs, allow-untyped-calls, ignore-missing-imports, allow-redefinition\n"
)


def test_a_model_class_and_every_documented_example_pass_mypy(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(EXAMPLE)
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        pattern = r"(?:<!-- test: (\w+)[^>]*-->\n)?```python\n(.*?)^```$"
        whole = ""
        for mark, block in re.findall(pattern, page.read_text(), re.DOTALL | re.MULTILINE):
            if mark not in ("torchrun", "flax"):  # those take models without types
                whole += f"if True:\n{textwrap.indent(block, '    ')}"
        (tmp_path / f"page_{page.stem.replace('-', '_')}.py").write_text(LENIENT + whole)
    command = [sys.executable, "-m", "mypy", "--strict",
               "--follow-imports=silent", str(tmp_path)]  # fmt: skip
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert found.returncode == 0, found.stdout
