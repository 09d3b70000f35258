"The `#|` lines at the head of a cell, read the same way whichever nbdev is installed"
import re

LINE = re.compile(r"^\s*#\s*\|\s*([\w-]+):?\s*(.*?)\s*$")


def directives(source):
    """Name -> argument of the `#|` lines at the head of `source`; blank lines between them do not count, any
    other line ends them
    """
    found = {}
    for line in source.splitlines():
        if not line.strip(): continue
        match = LINE.match(line)
        if not match: break
        found[match[1]] = match[2]
    return found

def is_skipped(source, flags):
    "Does a code cell carry one of `flags`, or `#| eval: false`?"
    said = directives(source)
    return bool(set(flags) & said.keys()) or said.get("eval", "").lower() == "false"
