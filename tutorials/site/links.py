"""Names in code, such as ``pe.check``, lead to their pages."""

import re
from typing import Any

import names
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

_NAME = re.compile(r"^pe\.(\w+)")


def setup(app: Sphinx) -> dict[str, Any]:
    """Be an extension of Sphinx: a transform of all pages."""
    app.add_transform(_Links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


class _Links(SphinxTransform):
    """Code that begins with a public name becomes a reference to it."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        """Wrap such code, where it is no part of a link or of a heading."""
        public = names.public()
        for code in list(self.document.findall(nodes.literal)):
            found = _NAME.match(code.astext())
            is_free = not isinstance(code.parent, nodes.reference | nodes.title | pending_xref)
            if found and found[1] in public and is_free:
                xref = pending_xref(
                    "",
                    refdomain="py",
                    reftype="obj",
                    reftarget=f"pyproelbo.{found[1]}",
                    refexplicit=True,
                    refwarn=False,
                )
                code.replace_self(xref)
                xref += code
