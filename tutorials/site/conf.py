"""The site, built by ``make docs`` from the folder above this one."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import pyproelbo  # noqa: E402

project = "pyproelbo"
author = "the authors of pyproelbo"
version = release = os.environ.get("DOCS_VERSION") or pyproelbo.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "mathml",
    "docstrings",
    "api",
    "links",
]
exclude_patterns = ["site", "names.md", "**/.ipynb_checkpoints"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}

nb_execution_mode = "off"  # the notebooks have their outputs
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
default_role = "code"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = [("Keys", "params_style")]

html_theme = "pydata_sphinx_theme"
html_title = f"pyproelbo {release}"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "show_nav_level": 2,
    "header_links_before_dropdown": 6,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
}
if "DOCS_URL" in os.environ:  # where other versions are, see switcher.py
    html_theme_options |= {
        "switcher": {
            "json_url": f"{os.environ['DOCS_URL']}/switcher.json",
            "version_match": release,
        },
        "check_switcher": False,
        "navbar_end": ["version-switcher", "theme-switcher"],
    }
html_sidebars = {"index": []}
html_show_sourcelink = False
copyright = "the authors of pyproelbo; Apache-2.0"
