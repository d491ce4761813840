"""Say in README.md and setup.cfg where the repository is, and that the package is on PyPI.

    python .github/for_pypi.py https://github.com/OWNER/NAME v0.2.0

Links in a README on PyPI have to be whole. The address is that of the repository that publishes,
and is therefore not written down in it. This changes the two files, before they are built.
"""

import re
import sys
from pathlib import Path

LINK = re.compile(r"(?<=\]\()(?!\w+:|#)[^)\s]+(?=\))")
PICTURES = (".png", ".gif", ".svg")


def with_whole_links(text: str, repository: str, tag: str) -> str:
    """A page whose links to files are links to those of a tag, and whose pictures are shown."""
    return LINK.sub(
        lambda m: f"{repository}/{'raw' if m[0].endswith(PICTURES) else 'blob'}/{tag}/{m[0]}", text
    )


def from_pypi(text: str) -> str:
    """A page that installs the package from PyPI where it did from a clone."""
    text = re.sub(r'pip install "\.(\[\w+\])"', r'pip install "pyproelbo\1"', text)
    return text.replace("pip install . ", "pip install pyproelbo ")


def with_urls(config: str, repository: str, tag: str) -> str:
    """The metadata, with the addresses of the project."""
    urls = {
        "Repository": repository,
        "Documentation": f"{repository}/tree/{tag}/tutorials",
        "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }
    lines = "".join(f"    {name} = {url}\n" for name, url in urls.items())
    return config.replace("classifiers =\n", f"project_urls =\n{lines}classifiers =\n", 1)


def main(repository: str, tag: str, folder: Path = Path()) -> None:
    """Change the files in a folder."""
    readme, config = folder / "README.md", folder / "setup.cfg"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(from_pypi(with_whole_links(text, repository, tag)), encoding="utf-8")
    text = config.read_text(encoding="utf-8")
    config.write_text(with_urls(text, repository, tag), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
