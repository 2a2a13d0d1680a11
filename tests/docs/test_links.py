"""Every link of every page leads to a file, and to a heading of it."""

import re

import pytest
from support.pages import PAGES, ROOT


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if "://" in link or link.endswith(".png"):  # the source package has no pictures
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text("utf-8")), link


def test_the_site_has_every_page():
    """`make docs` refuses a page that is left out; here without building it."""
    site = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        name = {"README.md": "index.md"}.get(page, page.removeprefix("docs/"))
        assert f"- {name}\n" in site or name.startswith("comparison/"), page
