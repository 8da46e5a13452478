"""How the documentation is built: `make docs` writes it as plain HTML, which needs no network to be read."""

import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hf_rrd import RelationalDistillationConfig, __version__  # noqa: E402

project = "hf_rrd"
author = "The hf_rrd contributors"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nitpick_ignore_regex = [("py:.*", r"(?!hf_rrd).*")]  # of types only ours are described here
exclude_patterns = ["pictures"]
highlight_language = "text"  # of a block that names none
default_role = "literal"  # a docstring's `name`
autodoc_typehints = "none"  # the signature would have them again; what a reader needs is under Parameters
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = f"hf_rrd {version}"
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_copyright = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}


def write_block(app: Sphinx, what: str, name: str, about: Any, options: Any, lines: list[str]) -> None:
    """Turn the Markdown fences of a docstring into blocks of reStructuredText."""
    inside = False
    for number, line in enumerate(lines):
        if line.strip() == "```python" and not inside:
            lines[number], inside = ".. code-block:: python\n", True
        elif line.strip() == "```" and inside:
            lines[number], inside = "", False
        elif inside:
            lines[number] = f"    {line}"
    lines[:] = "\n".join(lines).split("\n")


def write_settings(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the settings, each with its default and its help, where a page says so."""
    described = re.findall(r"^    (?:    )?(\w+): ", RelationalDistillationConfig.__doc__ or "", re.MULTILINE)
    entries = [
        f"```{{confval}} {each.name}\n:default: `{each.default!r}`\n\n{each.metadata['help']}\n```\n"
        for each in fields(RelationalDistillationConfig)
        if each.name in described
    ]
    source[0] = source[0].replace("<!-- settings -->", "\n".join(entries))


def write_formula(self: Any, node: nodes.Node) -> None:
    """Write a formula as MathML, which browsers draw by themselves."""
    display = isinstance(node, nodes.math_block)
    formula = tex2mathml(node.astext(), as_block=display)
    self.body.append(f'<div class="formula">{formula}</div>\n' if display else formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Connect the above."""
    app.connect("autodoc-process-docstring", write_block, priority=400)  # before napoleon
    app.connect("source-read", write_settings)
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))


html_math_renderer = "mathml"
