"""Hooks of mkdocs: README.md becomes the first page, its index the navigation, docstrings the API.

The pages stay what they are on a code host. Only here links out of docs/ are turned round.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parents[1]
API = {
    "api_b2txt_jax.md": (
        "b2txt_jax",
        ["api", "inference.run", "model.interface", "signal.augment", "metrics", "data.trial"],
    ),
    "api_lm_server.md": (
        "lm_server",
        ["client", "search.interface", "hypothesis", "settings", "protocol"],
    ),
}
"""Page -> (package, modules below it)."""


def on_config(config: Any) -> Any:
    """Take the navigation from README.md's index, where every page must be."""
    nav: list[dict[str, Any]] = [{"b2txt_jax": "index.md"}]
    for row in re.findall(r"^\| (\[.*?) \|", (REPOSITORY / "README.md").read_text(), re.MULTILINE):
        nav += [{text: page} for text, page in re.findall(r"\[([^\]]+)\]\(docs/([^)]+)\)", row)]
    config["nav"] = [*nav, {"API": [{package: page} for page, (package, _) in API.items()]}]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the first page and those made of docstrings."""
    readme = (REPOSITORY / "README.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    for page, (package, modules) in API.items():
        names = [package, *(f"{package}.{module}" for module in modules)]
        text = "\n\n".join([f"# {package}", *(f"::: {name}" for name in names)])
        files.append(File.generated(config, page, content=text + "\n"))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Show paths outside of docs/ as text: the site does not hold those files."""
    return re.sub(r"\[([^\]]+)\]\(\.\./(?!.*\.md\))[^)]+\)", r"\1", markdown)
