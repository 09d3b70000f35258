"Blocks and their templates: text stays text, blocks are HTML, nothing is left empty by mistake"
import math, pathlib, re
from html.parser import HTMLParser
import numpy as np, pandas as pd, pytest
from jinja2.exceptions import TemplateNotFound, UndefinedError
import leverplus
from leverplus.markup import (
    Block, Blocks, Cell, Figure, Filled, Fold, Glossary, Heading, Paragraph, Preformatted, Scroll, Sentences,
    Strip, Table, as_cell, fill_template, frame_table,
)

NASTY = "<b onclick='x'>&amp;\"</div>"

class Read(HTMLParser):
    "The tags of a piece of HTML, their attributes, and its text"
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.values = []
        self.text = ""
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.values += [value for _, value in attrs]
    def handle_data(self, data): self.text += data

EVERY = [
    Heading(NASTY, 2, NASTY),
    Paragraph(NASTY, lead=NASTY),
    Sentences([NASTY]),
    Preformatted(NASTY),
    Fold(NASTY, Paragraph("within")),
    Scroll(Paragraph("within"), NASTY),
    Figure(NASTY, NASTY),
    Strip([], NASTY),
    Table(NASTY, [NASTY], [[Cell(NASTY)], [Cell(NASTY, "number")], [Cell(NASTY, "head")]]),
]

@pytest.mark.parametrize("block", EVERY, ids=lambda block: type(block).__name__)
def test_every_field_is_text(block):
    "What a field holds is read back as it was written, and makes no tag and no attribute of its own"
    read = Read(block.html())
    assert read.tags.count("b") == isinstance(block, Paragraph) # whose lead is bold
    told = read.text + " ".join(value for value in read.values if value)
    assert NASTY in told
    assert "onclick='x'>" not in block.html()

def test_blocks_are_html_once():
    "However deep a block lies, it is escaped once"
    deep = Fold("a", Blocks([Strip([Scroll(Paragraph("1 < 2"), "b")])]))
    assert deep.html().count("1 &lt; 2") == 1 and "&amp;lt;" not in deep.html()
    assert deep._repr_html_() == deep.__html__() == deep.html()
    assert Read(deep.html()).tags == ["details", "summary", "div", "div", "p"]

def test_a_word_points_to_its_meaning():
    "Words and meanings are text; what was used is listed, in the order of the meanings, by the id of its button"
    words = Glossary({"a": "first", NASTY: NASTY, "c": "third"})
    buttons = [words.term("c", NASTY), words.term(NASTY), words.term("c")]
    read = Read(Blocks([*buttons, words]).html())
    assert read.tags == ["button"]*3 + ["dl"] + ["div", "dt", "dd"]*2
    assert read.text.count(NASTY) == 4 and "first" not in read.text and "third" in read.text
    ids = re.findall(r'id="(\w+)" popover', words.html())
    targets = [re.search(r'popovertarget="(\w+)"', button.html())[1] for button in buttons]
    assert targets == [ids[1], ids[0], ids[1]]
    with pytest.raises(ValueError, match="no meaning of 'd'"): words.term("d")
    assert "<div" not in Glossary(dict(a="b")).html()

def test_what_is_missing_is_an_error():
    with pytest.raises(UndefinedError, match="'lines' is undefined"): fill_template("sentences.html")
    with pytest.raises(UndefinedError, match="verdict"): Filled("verdicts.html", lines=[dict(said="a")]).html()
    with pytest.raises(TemplateNotFound, match="nowhere.html"): fill_template("nowhere.html")

def test_cells():
    shown = {3: "3", 3.0: "3", 1234.5678: "1.23e+03", 1e6: "1000000", .12345: "0.123", -12.: "-12"}
    for value, text in shown.items(): assert as_cell(value) == Cell(text, "number")
    assert as_cell(np.float32(.5)) == Cell("0.5", "number") and as_cell(np.int64(7)) == Cell("7", "number")
    assert as_cell(float("nan")) == Cell("–", "number") and as_cell(None) == Cell("–", "text")
    assert as_cell(True) == Cell("True", "text") and as_cell(np.bool_(False)) == Cell("False", "text")

def test_a_named_index_is_part_of_the_table():
    df = pd.DataFrame(dict(x=[1, 2]), index=pd.MultiIndex.from_tuples([("a", 1), ("b", 2)], names=["s", "S"]))
    table = frame_table(df, "a table")
    assert table.columns == ["s", "S", "x"] and [cell.text for cell in table.rows[1]] == ["b", "2", "2"]
    assert frame_table(df.reset_index(drop=True), "a table").columns == ["x"]

def test_every_template_is_used():
    "By a block, by another template, or by a page"
    package = pathlib.Path(leverplus.__file__).parent
    files = [*package.glob("*.py"), *(package/"templates").iterdir()]
    used = set()
    for path in files: used |= set(re.findall(r'"([\w.]+\.(?:html|css|js))"', path.read_text()))
    assert {p.name for p in (package/"templates").iterdir()} <= used
    assert all(kind.template in used for kind in Block.__subclasses__() if hasattr(kind, "template"))

@pytest.mark.parametrize("v,said", [(math.inf, "inf"), (-math.inf, "-inf"), (np.float64(math.inf), "inf"), (12., "12")])
def test_an_effect_that_nothing_could_detect_is_a_number(v, said):
    "The detectable effect of a handful of questions is infinite"
    assert as_cell(v).text == said
