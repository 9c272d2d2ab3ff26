"""The site: guides and tutorials in Markdown, an API reference out of the docstrings.

`make docs` builds it into build/docs. Every warning is an error there, a link that leads nowhere
and a cell that fails or writes to stderr among them. Nothing is fetched.
"""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

import docstrings  # noqa: E402

import aqt_search  # noqa: E402

project = "aqt_search"
version = release = aqt_search.__version__
copyright = "the authors of aqt_search, Apache License 2.0"

extensions = ["myst_nb", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = "aqt_search"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False

# Guides are pages of a code host, too: plain Markdown, whose headings can be linked to.
myst_heading_anchors = 3

# Tutorials run in every build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_output_stderr = "error"
nb_merge_streams = True

add_module_names = False
smartquotes = False
highlight_language = "text"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

# Types of jax, numpy and the standard library: no page of theirs is at hand.
_FOREIGN = [
    "Any", "ArrayLike", "Callable", "Collection", "Hashable", "Iterable", "Mapping", "Path",
    "Sequence",
]  # fmt: skip
# Types of ours that only fields have: read their source.
_INTERNAL = [
    "Axes", "Block", "Channels", "Consumer", "ElasticDecision", "Factors", "LeafMask", "Loop",
    "Matrices", "OperandValue", "Records", "Shared", "SiteFacts", "SiteWeight", "Stage", "Tail",
    "TrainState", "Value", "WeightRow",
]  # fmt: skip
nitpick_ignore = [("py:class", name) for name in _FOREIGN + _INTERNAL]
nitpick_ignore_regex = [("py:(class|obj)", r"(jax|np|numpy|optax|grain|collections|typing|os)\..*")]


def setup(app):
    """Docstrings are plain text with a few marks; autodoc takes reStructuredText."""
    docstrings.setup(app, HERE / "api")
