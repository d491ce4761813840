"""Names in code lead to their pages: ``pe.check``, and ``05_elbo_surgery`` of a tutorial."""

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
    """Code that begins with a public name, or is that of a tutorial, becomes a reference to it."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        """Wrap such code, where it is no part of a link or of a heading."""
        for code in list(self.document.findall(nodes.literal)):
            is_free = not isinstance(code.parent, nodes.reference | nodes.title | pending_xref)
            target = self._target(code.astext()) if is_free else None
            if target is not None:
                xref = pending_xref("", **target, refexplicit=True, refwarn=False)
                code.replace_self(xref)
                xref += code

    def _target(self, text: str) -> dict[str, str] | None:
        found = _NAME.match(text)
        if found and found[1] in names.public():
            name = f"pyproelbo.{found[1]}"
            return {"refdomain": "py", "reftype": "obj", "reftarget": name}
        if re.fullmatch(r"\d\d_\w+", text) and text in self.env.found_docs:
            return {"refdomain": "std", "reftype": "doc", "reftarget": f"/{text}"}
        return None
