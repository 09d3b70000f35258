"What comes from elsewhere stays text: on a page, in Markdown, in a spreadsheet, in a terminal"
import ast, csv, importlib, json, pathlib, pkgutil, re, warnings
from html.parser import HTMLParser
from types import SimpleNamespace
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from hypothesis import given, strategies as st
import leverplus
from leverplus.bank import DemoBank
from leverplus.checkpoints import model_card, passport
from leverplus.core import markdown_code, markdown_text, printable
from leverplus.data import show_items
from leverplus.diagnose import Diagnosis
from leverplus.evaluate import plot_results
from leverplus.groups import Group, RLData
from leverplus.loops import Check, ClosedLoop, Rounds
from leverplus.markup import Block, Paragraph
from leverplus.picker import Picked
from leverplus.pools import Pool
from leverplus.prompt import Demo, Prompt
from leverplus.rldata_check import Health, health
from leverplus.rldata_merge import by_gap
from leverplus.runs import Run, read_own_csv, write_csv
from leverplus.doors import read_door, say
from leverplus.cli import carry_out, main

PACKAGE = pathlib.Path(leverplus.__file__).parent
NASTY = (
    "<script>steal()</script> | [x](javascript:steal()) ![y](http://a.b/c) **b** ~~s~~ `c`"
    " $\\href{javascript:steal()}{z}$ <img src=x onerror=steal()>\n# head\x1b[31m\x9b1m\r\u202eend"
)
HARMFUL = {"script", "a", "img", "iframe", "h1", "s"}

class Tags(HTMLParser):
    "Tags and attributes of HTML, and its text"
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.attributes = []
        self.text = ""
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
    def handle_data(self, data): self.text += data

def harmless(page, own=()):
    "HTML in which what was told is text; `own`: tags that are there without it, with their number"
    read = Tags(page)
    found = {tag: read.tags.count(tag) for tag in HARMFUL & set(read.tags)}
    assert found == dict(own)
    assert not any(name.startswith("on") or "steal" in (value or "") for name, value in read.attributes)
    assert "steal()" in read.text

def rendered(text):
    "Markdown as HTML; raw HTML is let through, as notebooks and hubs do with some of it"
    markdown = pytest.importorskip("markdown_it")
    return markdown.MarkdownIt("commonmark", dict(html=True)).enable(["table", "strikethrough"]).render(text)

def obeyed(text):
    "What a terminal would obey"
    return re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)

# ---- everything that shows itself --------------------------------------------------------------------------

def groups(answer=NASTY, scorer=NASTY):
    "Two queries with three rows each"
    n = 6
    facts = dict(vqa_acc_score=[0., 1, .6]*2, vqa_correct=[0., 1, 1]*2, vqa_gt_prob=[.1, .9, .5]*2)
    facts |= {name: [0.]*n for name in ("vqa_rel_token_f1", "vqa_rel_edit_sim", "vqa_rel_score")}
    rows = pd.DataFrame(dict(
        question_id=[1]*3 + [2]*3, pointer=[(10, 11), (11, 10), (10, 12)]*2, gen_method="random",
        beam_rank=np.nan, vqa_eval_mode="official", vqa_pred_answer=answer, vqa_raw_generation=answer,
        eval_failed=False, error=None, scorer=scorer, vqa_gt_logprobs=[(-1.,)]*n, **facts,
    ))
    return RLData(rows, Pool({q: (10, 11, 12) for q in (1, 2)}, {}))

def items():
    ids = [1, 2, 10, 11, 12]
    columns = dict(question_id=ids, image_id=ids, question=NASTY, answer=NASTY, answers=[[NASTY]]*5)
    return pd.DataFrame(columns, index=ids)

def a_run(folder):
    "A run whose settings and metrics hold markup"
    run = Run.create(folder/"run", {NASTY: NASTY, "note": {"below": NASTY}}, fingerprints={NASTY: NASTY})
    return run.finish(**{f"{NASTY} measured": 1.})

def a_diagnosis(folder):
    row = dict(symptom=NASTY, value=1., wanted=NASTY, alarm=True, cause=NASTY, remedy=NASTY)
    return Diagnosis(pd.DataFrame([row], index=[NASTY]), NASTY)

def a_prompt(folder): return Prompt(1, f"/a/{NASTY}", NASTY, (Demo(2, f"/b/{NASTY}", NASTY, NASTY),))

def a_pick(folder):
    return Picked(a_prompt(folder), pd.DataFrame(dict(answer=[NASTY])), [NASTY], 0., [])

def a_loop(folder):
    checks = [Check(*[NASTY]*len(Check._fields))]
    tables = dict(dev=pd.DataFrame({NASTY: [NASTY]}))
    return ClosedLoop(None, None, None, tables, checks, NASTY, [NASTY, NASTY])

def merged_groups(folder): return by_gap(groups(), 0.)

SHOWN = { # every class that shows itself in a notebook: how one of it is made
    Block: lambda folder: Paragraph(NASTY),
    Run: a_run,
    Diagnosis: a_diagnosis,
    Prompt: a_prompt,
    Picked: a_pick,
    RLData: merged_groups,
    Group: lambda folder: groups().group(1, items()),
    Health: lambda folder: health({NASTY: groups()}),
    ClosedLoop: a_loop,
    Rounds: lambda folder: Rounds(None, [], pd.DataFrame({NASTY: [NASTY]}), [NASTY], 0),
}

def rich_classes():
    "Classes of the package that have a rich repr of their own"
    found = set()
    for module in pkgutil.iter_modules([str(PACKAGE)]):
        for value in vars(importlib.import_module(f"leverplus.{module.name}")).values():
            own = isinstance(value, type) and value.__module__.startswith("leverplus.")
            if own and {"_repr_html_", "_repr_markdown_"} & vars(value).keys(): found.add(value)
    return found

def test_every_class_that_shows_itself_is_tried(): assert rich_classes() == SHOWN.keys()

@pytest.mark.parametrize("kind", SHOWN, ids=lambda kind: kind.__name__)
def test_what_shows_itself_shows_text(kind, tmp_path):
    one = SHOWN[kind](tmp_path)
    shown = [getattr(one, name)() for name in ("_repr_html_", "_repr_markdown_") if hasattr(one, name)]
    assert shown
    if hasattr(one, "_repr_html_"): harmless(one._repr_html_())
    if hasattr(one, "_repr_markdown_"):
        text = one._repr_markdown_()
        harmless(rendered(text))
        assert "$" not in re.sub(r"(`+).+?\1(?!`)", "", text), "a formula begins"
        assert not obeyed(text)
        for table in re.findall(r"(?:^\|.*\n?)+", text, re.M):
            bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
            assert len(bars) == 1, "a cell breaks a table"
    assert not obeyed(repr(one)) and repr(one)

def test_cards_show_text():
    says = passport({})
    texts = {name: NASTY for name, value in says.items() if value is None or isinstance(value, str)}
    numbers = {NASTY: dict(value=NASTY, split=NASTY)}
    card = model_card(says | texts | dict(metrics=numbers, plan=[NASTY]), NASTY)
    body = card.split("\n---\n", 1)[1]
    code = re.search("```python\n(.*?)\n```\n", body, re.S)
    names = [node.value for node in ast.walk(ast.parse(code[1])) if isinstance(node, ast.Constant)]
    assert names == [NASTY] # a text of Python, in one line
    harmless(rendered(body.replace(code[0], "")), dict(h1=1, a=1)) # its title, and where the package is
    assert not obeyed(body)

def test_a_card_of_a_bank_shows_text():
    class Bank(SimpleNamespace):
        def __len__(self): return len(self.items)
    examples = items().assign(image_path=None, **{NASTY: "a column"})
    store = SimpleNamespace(meta=dict(source=dict(encoder=NASTY)))
    card = DemoBank.card(Bank(items=examples, encoder_name=NASTY, store=store, fingerprint="f"))
    harmless(rendered(card.split("\n---\n", 1)[1]), dict(h1=1))

# ---- Markdown ----------------------------------------------------------------------------------------------

@given(st.text(alphabet="a_ *`[]()!<>&|~$\\#\n-1.:/\x1b", max_size=30))
def test_markdown_shows_any_text_as_it_is(text):
    told = " ".join(printable(text).split())
    for written in (f"x {markdown_text(text)} x", f"x {markdown_code(text)} x"):
        read = Tags(rendered(f"| head |\n|---|\n| {written} |\n"))
        assert set(read.tags) <= {"table", "thead", "tbody", "tr", "th", "td", "span", "code"}
        assert " ".join(read.text.split()) == f"head x {told} x".replace("  ", " ")

# ---- terminals ---------------------------------------------------------------------------------------------

@given(st.text(alphabet=st.characters(), max_size=20))
def test_printable_hides_nothing_and_changes_nothing_else(text):
    shown = printable(text)
    assert not obeyed(shown)
    if not obeyed(text): assert shown == text

def test_json_stays_json_when_it_is_printed(capsys):
    say(json.dumps(dict(question=NASTY), ensure_ascii=False))
    out = capsys.readouterr().out
    assert json.loads(out) == dict(question=NASTY) and not obeyed(out)

@pytest.mark.parametrize("line", [
    ["check", "runs/\x1b[2J\rgood\u202e"],
    ["infer", "--out", "x", "--shots", "\x1b[31mtwo"],
    ["\x9b31mno command"],
    ["generate", "--config", "\x1b]0;title\x07.yaml", "--out", "x"],
])
def test_a_command_writes_out_what_a_terminal_would_obey(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try: status = main(line)
    except SystemExit as e: status = e.code
    said = capsys.readouterr()
    assert status == 2 and said.err and not obeyed(said.err + said.out)
    assert re.search(r"\\(u00|x)(1b|9b)", said.err)

def test_what_goes_wrong_with_hostile_data_is_written_out(capsys):
    door = read_door(["merge", "a", "--out", "b"])
    def fail(door): raise ValueError(f"question {NASTY} has the answer {NASTY}")
    assert carry_out(door, fail) == 2
    def warn(door):
        warnings.warn(f"the file {NASTY} is odd")
    assert carry_out(door, warn) == 0
    said = capsys.readouterr()
    assert "steal()" in said.err and said.err.count("\\u001b") >= 3 and not obeyed(said.err)

PRINTERS = {"print", "traceback.print_exc", "sys.stdout.write", "sys.stderr.write"}

def test_only_say_prints():
    "What a command prints goes through one door"
    for name in ("cli.py", "doors.py"):
        for node in ast.walk(ast.parse((PACKAGE/name).read_text())):
            if not isinstance(node, ast.FunctionDef) or node.name == "say": continue
            called = {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
            assert not called & PRINTERS, f"{name}: {node.name}"

# ---- spreadsheets ------------------------------------------------------------------------------------------

FORMULAS = (
    "=1+1", "+1", "-1", "@sum(a1)", "\t=1", "\r=1", "\n=1", "'=1", "''=1", "'", "it's", "a\r=1",
    "=cmd|' /C calc'!A0", "＝1+1", "＠sum(a1)",
)

def test_no_text_is_a_formula_and_all_come_back(tmp_path):
    df = pd.DataFrame({"text": [*FORMULAS, None], "=name": [-1.5]*len(FORMULAS) + [np.nan], "yes": True})
    df["kind"] = pd.Categorical(["-a", "b"]*(len(df)//2))
    path = write_csv(tmp_path/"a.csv", df)
    with open(path, newline="") as f: head, *rows = csv.reader(f)
    assert len(rows) == len(df)
    for cell in [*head, *(cell for row in rows for cell in row)]:
        assert not cell or cell[0] not in "=+-@＝＠\t\r\n" or cell == "-1.5", cell
    back = read_own_csv(path)
    assert list(back) == list(df) and back["=name"].dtype == float and back.yes.dtype == bool
    assert back.text.tolist()[:-1] == list(FORMULAS) and back.text.isna().tolist()[-1]
    assert back.kind.tolist() == df.kind.tolist()

@given(st.lists(st.text(alphabet="'=+-@\t\r\n\",; a", min_size=1, max_size=6), min_size=1, max_size=5))
def test_a_run_gives_back_any_text(tmp_path_factory, texts):
    run = Run.create(tmp_path_factory.mktemp("runs")/"r", {})
    df = pd.DataFrame(dict(text=["plain", *texts], number=np.arange(len(texts) + 1.)))
    run.save_frame("t.csv", df)
    assert run.frame("t.csv").to_dict("list") == df.to_dict("list")

def test_digits_are_those_that_were_asked_for(tmp_path):
    write_csv(tmp_path/"a.csv", pd.DataFrame(dict(x=[1/3], text="-")), digits=3)
    assert (tmp_path/"a.csv").read_text().splitlines() == ["x,text", "0.333,'-"]

def test_every_table_is_written_by_one_function():
    for path in sorted(PACKAGE.glob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = [ast.unparse(call.func) for call in calls]
        written = [name for name in names if name.endswith((".to_csv", "csv.writer", "csv.DictWriter"))]
        allowed = {"runs.py": 1, "cli.py": 1} # of cli: `Health.to_csv`
        assert len(written) == allowed.get(path.name, 0), path.name

# ---- figures -----------------------------------------------------------------------------------------------

FORMULA = r"what costs $\nothing_{} or 5 $?"

def drawn(axes):
    "Draw a figure, which reads its formulas"
    np.ravel(axes)[0].figure.canvas.draw()

def test_a_dollar_begins_no_formula_in_a_figure():
    "Names, questions and answers hold what matplotlib would take for a formula, and a broken one"
    told = items().assign(question=FORMULA, answer=FORMULA, answers=[[FORMULA]]*5, image_path=None)
    drawn(show_items(told, 2))
    prompt = Prompt(1, None, FORMULA, (Demo(2, None, FORMULA, FORMULA),))
    demos = pd.DataFrame(dict(answer=[FORMULA]))
    drawn(Picked(prompt, demos, [FORMULA], 0., []).show())
    row = dict(selector=FORMULA, shots=2, n=9, acc=.3, lo=.2, hi=.4, gap_closed=np.nan, changed=np.nan)
    drawn(plot_results(pd.DataFrame([row])))
    drawn(health({FORMULA: groups()}).plot())
    plt.close("all")
