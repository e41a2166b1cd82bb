import sys
from importlib.metadata import version as installed_version
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from documented import check_coverage  # noqa: E402
from inventories import write_inventories  # noqa: E402

from flexkit.selection.policies import __all__ as POLICIES  # noqa: E402

project = "flexkit"
author = "The flexkit authors"
copyright = "The flexkit authors"
release = version = installed_version("flexkit-vlm")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
default_role = "code"
add_module_names = False
toc_object_entries_show_parents = "hide"

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say types, shapes and dtypes
autosummary_generate = False

napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_preprocess_types = True

intersphinx_mapping = write_inventories(DOCS / "inventories.txt", DOCS / "_build" / "inventories")
nitpick_ignore = [("py:class", "optional")]

doctest_global_setup = """
import torch, flexkit
from torch import nn
from flexkit import *
from flexkit.attention import *
from flexkit.encoding import *
from flexkit.selection import *
_ = torch.manual_seed(0)
"""
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "examples_dirs": "../examples/gallery",
    "gallery_dirs": "gallery",
    "image_scrapers": ("figures",),
    "reset_modules": (),
    "abort_on_example_error": True,
    "min_reported_time": 60,
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "write_computation_times": False,
}

html_theme = "furo"
html_title = f"flexkit {release}"


def resolve_short_name(app, env, node, contnode):
    """Resolve a role such as :func:`margin_cells` wherever exactly one documented name ends so."""
    if node.get("refdomain") != "py" or node.hasattr("refspecific"):
        return None
    node["refspecific"] = True
    return env.domains.python_domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], node["reftarget"], node, contnode
    )


def skip_policies(app, what, name, obj, skip, options):
    """Leave the policies out of the page of functions: they have a page of their own."""
    return True if what == "module" and name in POLICIES else None


def setup(app):
    app.connect("autodoc-skip-member", skip_policies)
    app.connect("missing-reference", resolve_short_name, priority=600)
    app.connect("env-check-consistency", check_coverage)
