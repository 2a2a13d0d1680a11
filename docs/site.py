"""For mkdocs.yml: the README is the site's first page, and files beside docs/ that a page links to
are part of the site."""

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md"} | {
    name: name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
}


def on_files(files: Files, config) -> Files:
    for name, page in PAGES.items():
        text = (ROOT / name).read_text("utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    for file in list(files.documentation_pages()):
        for link in re.findall(r"\]\(\.\./([^)#]+)", file.content_string):
            if link not in PAGES and files.get_file_from_path(link) is None:
                files.append(File.generated(config, link, abs_src_path=str(ROOT / link)))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    return markdown.replace("](../", "](")
