"""Settings of the documentation site: `make docs` builds it into docs/_build, warnings are errors."""

import sys
from pathlib import Path

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE.parent), str(_HERE / "_ext")]

import laserrec  # noqa: E402

project = "laserrec"
author = "the laserrec authors"
copyright = "the laserrec authors, Apache-2.0"
version = release = laserrec.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "generated", "docstrings"]
exclude_patterns = ["_build"]

myst_heading_anchors = 4
myst_enable_extensions = ["deflist", "attrs_inline"]

autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # those of torch are not in our form
default_role = "code"
smartquotes = False  # two dashes are a flag
nitpicky = True
# Types in signatures are links where they can be: not every type has an entry, other projects' need a network.
nitpick_ignore_regex = [("py:class", ".*"), ("py:.*", r"(?!laserrec\.).*")]

html_theme = "furo"
html_title = f"laserrec {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sourcelink = False
