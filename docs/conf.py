"""The documentation site; `make docs` builds it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

project = "weightlift"
author = "The weightlift authors"
copyright = "2026, the weightlift authors"
_version: dict[str, str] = {}
exec((ROOT / "python" / "weightlift" / "core" / "version.py").read_text(), _version)
release = version = _version["__version__"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = False
# The type `bytes` in a signature, which two classes have as an attribute too.
suppress_warnings = ["ref.python"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"weightlift {release}"
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
# Nothing is fetched when a page is viewed.
html_show_sphinx = False
