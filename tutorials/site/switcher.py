"""Write switcher.json, the list of versions that the site offers: a folder each, the newest first.

python tutorials/site/switcher.py FOLDER ADDRESS
"""

import json
import re
import sys
from pathlib import Path

NEWEST = "main"  # the folder of what is not released yet


def versions(folder: Path, address: str) -> list[dict[str, str | bool]]:
    """Of the folders in ``folder``: the released ones by their numbers, and ``main``."""
    tags = [path.name for path in folder.iterdir() if re.fullmatch(r"v?\d+(\.\d+)*", path.name)]
    tags.sort(
        key=lambda tag: [int(part) for part in tag.removeprefix("v").split(".")], reverse=True
    )
    names = [*tags, NEWEST] if (folder / NEWEST).is_dir() else tags
    latest = tags[0] if tags else NEWEST
    return [
        {
            "name": f"{name} (latest)" if name == latest and tags else name,
            "version": name,
            "url": f"{address.rstrip('/')}/{name}/",
            "preferred": name == latest,
        }
        for name in names
    ]


def main(folder: str, address: str) -> None:
    """Write the list, and a page that leads to the latest version."""
    found = versions(Path(folder), address)
    (Path(folder) / "switcher.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    latest = next(each["url"] for each in found if each["preferred"])
    page = f'<!doctype html><meta http-equiv="refresh" content="0; url={latest}">\n'
    (Path(folder) / "index.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
