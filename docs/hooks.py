"""mkdocs: the site has docs/ alone, so a link to another file of the repository is shown as its path."""

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\.?/[^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Called by mkdocs for every page, before it is rendered."""
    docs = Path(config.docs_dir).resolve()
    folder = docs / Path(page.file.src_uri).parent

    def shown(link: re.Match[str]) -> str:
        text, target = link.groups()
        place = (folder / target).resolve()
        if place.is_relative_to(docs):
            return link[0]
        path = place.relative_to(docs.parent)
        return f"`{path}`" if text.strip("`/").endswith(path.name) else f"{text} (`{path}`)"

    return LINK.sub(shown, markdown)
