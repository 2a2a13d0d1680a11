"""Whether a page holds only the markup of its own."""

import re
from html.parser import HTMLParser

TAGS = re.compile(
    "html|meta|title|style|main|nav|section|details|summary|h[1-4]|p|b|a|div|span|form|label|input|"
    "button|img|small|figure|figcaption|ol|ul|li|code|table|tr|th|td|svg|text|path|polyline|circle"
)
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.strange = []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes if name.startswith("on")]
        links = [v for n, v in attributes if n in ("href", "src", "action") and not own(v)]
        if not TAGS.fullmatch(tag) or names or links:
            self.strange.append((tag, attributes))


def own(link: str) -> bool:
    return link.startswith(("/", "#", "data:image/png;base64,")) and not link.startswith("//")


def strange(page: str) -> list:
    """Elements and attributes that none of our pages has, and characters that turn what follows."""
    parser = Page()
    parser.feed(page)
    return parser.strange + OBEYED.findall(page.replace("\r\n", ""))
