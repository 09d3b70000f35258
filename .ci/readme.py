"""README.md from nbs/index.ipynb: `python .ci/readme.py [--root DIR]`; nothing is executed, stored outputs are used.

Markdown cells stay; code becomes fenced python without its `#|` lines; of an output the richest text form is kept
(markdown, html, plain). `#| hide` drops a cell, `#| echo: false` its code, `#| output: false` its output.
Figures are written to nbs/images/readme_*. Relative links, written for nbs/, are rewritten to work from the root.
"""
import argparse, posixpath, re, sys
from pathlib import Path
from directives import directives

# of [x](target), ![x](target), <img src="target">
TARGET = re.compile(r"""(\]\(\s*|(?:src|href)\s*=\s*["'])([^)\s"'>]+)""")

def link(target):
    "A target relative to nbs/ -> relative to the root; URLs, anchors and rooted paths stay"
    if re.match(r"[a-zA-Z][\w+.-]*:|[#/]", target): return target
    path, hash_, anchor = target.partition("#")
    return posixpath.normpath(posixpath.join("nbs", path)) + hash_ + anchor

def relink(text):
    "Rewrite the link targets of markdown `text`, but not inside fenced code"
    parts = re.split(r"(^```.*?^```[^\n]*$)", text, flags=re.M | re.S)
    return "".join(p if p.startswith("```") else TARGET.sub(lambda m: m[1] + link(m[2]), p) for p in parts)

def pipes(html):
    "A table of pandas in markdown; None for any other HTML. Its index column goes, the page resets what should stay"
    if 'class="dataframe"' not in html: return None
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)[1:] for row in re.findall(r"<tr.*?</tr>", html, re.S)]
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)

def outputs(cell):
    "The stored outputs, relinked; frames become tables of markdown"
    for o in cell.outputs:
        data = o.get("data", {})
        table = pipes(data.get("text/html", ""))
        if table: data["text/markdown"] = table
        for kind in data.keys() & {"text/markdown", "text/html"}: data[kind] = relink(data[kind])
    return cell.outputs

def prepare(nb):
    "Apply the directives and rewrite links, in place"
    said = lambda d, name: d.get(name, "").lower() == "false"
    cells = []
    for c in nb.cells:
        if c.cell_type == "markdown": c.source = relink(c.source)
        if c.cell_type == "code":
            d = directives(c.source)
            if d.keys() & {"hide", "default_exp"} or said(d, "include"): continue
            c.source = "\n".join(line for line in c.source.splitlines() if not line.startswith("#|")).strip()
            c.metadata["transient"] = {"remove_source": said(d, "echo") or not c.source}
            c.outputs = [] if said(d, "output") else outputs(c)
        cells.append(c)
    nb.cells = cells
    nb.metadata["language_info"] = {"name": "python"}
    return nb

def convert(root):
    "Write README.md and its images below `root`"
    import nbformat
    from nbconvert import MarkdownExporter
    from traitlets.config import Config
    source, images = root/"nbs"/"index.ipynb", root/"nbs"/"images"
    if not source.is_file(): sys.exit(f"{source.name} is missing in nbs/: README.md is made from it")
    order = ["text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/html", "text/plain"]
    cfg = Config(
        {
            "NbConvertBase": {"display_data_priority": order},
            "ExtractOutputPreprocessor": {
                "output_filename_template": "nbs/images/readme_{cell_index}_{index}{extension}"
            },
        }
    )
    text, resources = MarkdownExporter(config=cfg).from_notebook_node(
        prepare(nbformat.read(source, 4)), {"output_files_dir": ""}
    )
    for old in images.glob("readme_*"): old.unlink()
    for name, data in resources.get("outputs", {}).items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    note = "<!-- made from nbs/index.ipynb by .ci/readme.py; edit the notebook -->\n\n"
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"^[ \t]+$", "", text, flags=re.M))
    (root/"README.md").write_text(note + text.strip() + "\n", encoding="utf8")

if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="a checkout")
    convert(ap.parse_args().root)
