"""The pages of the repository, and the code and commands on them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text("utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
}
PROGRAMS = "python|bash|make|pytest|pip|torchrun"
INLINE = rf"`((?:[A-Z_]+=\S+ )*(?:{PROGRAMS}) [^`…]+)`"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.M | re.S)


def commands(page: str) -> list[str]:
    """Of its blocks and sentences, without comments."""
    found = [" ".join(command.split()) for command in re.findall(INLINE, PAGES[page])]
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            parts = re.split(r"&&|; do| do ", re.sub(r"(^|\s)#.*", "", line))
            found += [" ".join(part.split()) for part in parts]
    return [x for x in found if x and x != "done"]
