"The house rules, read from the files without running them"
import ast, configparser, io, json, re, subprocess, sys, tokenize
from functools import lru_cache
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT / "nbs", ROOT / "leverplus"
sys.path.insert(0, str(ROOT/".ci"))
from directives import LINE as DIRECTIVE, directives

BY_HAND = {"all", "__main__"} # modules that no notebook makes
FRONT_DOORS = {"demo", "cli", "doors", "__main__"} # programs: they may print
# what leverplus/all.py leaves out: programs, and the making of the embedded models
NOT_IN_ALL = (FRONT_DOORS - BY_HAND) | {"tiny"}
GENERATED = {"__init__", "_modidx"} # written by nbdev itself
MODULES = sorted(p for p in LIB.rglob("*.py"))
REFERENCE = [p for p in sorted(NBS.glob("*.ipynb")) if p.name[0] not in "_."]
TUTORIALS = [p for p in sorted((NBS/"tutorials").glob("*.ipynb")) if p.name[0] not in "_."]
NOTEBOOKS = REFERENCE + TUTORIALS
KILOBYTES = {p: 500 if p in TUTORIALS else 150 for p in NOTEBOOKS}
MACHINE_PATH = re.compile(
    r"(?<![\w.\-/:+])/(?:home|root|Users|work|tmp|opt|mnt|private|var/folders)/\w|\b[A-Z]:\\\\?Users\b"
)
# where the name to install differs from the name to import
DISTRIBUTION = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "cv2": "opencv-python"}
# calls that do work, and so never stand in a constant's value
WORKING = {
    "print",
    "open",
    "exec",
    "eval",
    "input",
    "load",
    "from_pretrained",
    "seed",
    "manual_seed",
    "read_json",
    "read_csv",
    "read_parquet",
}

def ident(p): return p.relative_to(ROOT).as_posix()
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=ident)
each_module = pytest.mark.parametrize("path", MODULES, ids=ident)

@lru_cache(None)
def cells(path):
    "Cells of a notebook: (number, type, source, outputs)"
    join = lambda s: s if isinstance(s, str) else "".join(s)
    nb = json.loads(path.read_text(encoding="utf8"))
    return [(i, c["cell_type"], join(c["source"]), c.get("outputs", [])) for i, c in enumerate(nb["cells"])]

def code(path): return [(i, s, directives(s)) for i, kind, s, _ in cells(path) if kind == "code"]

def default_exp(path): return next((d["default_exp"] for _, _, d in code(path) if "default_exp" in d), None)
def exports(d): return any(k.startswith("export") for k in d)

@lru_cache(None)
def settings():
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf8")
    return cfg["DEFAULT"]

# ---- modules and notebooks ---------------------------------------------------------------------------------

def test_modules_are_what_the_notebooks_export():
    made = {p.relative_to(LIB).with_suffix("").as_posix().replace("/", ".") for p in MODULES} - GENERATED
    homes = {}
    for p in NOTEBOOKS:
        if name := default_exp(p): homes.setdefault(name, []).append(p.name)
    twice = {k: v for k, v in homes.items() if len(v) > 1}
    assert not twice, f"one notebook = one module, but {twice}"
    assert made - BY_HAND == set(homes), (
        f"left behind in leverplus/ without a notebook: {sorted(made - BY_HAND - set(homes))}; "
        f"not exported yet: {sorted(set(homes) - made)}"
    )
    assert not BY_HAND & set(homes), f"hand-written, but also exported: {sorted(BY_HAND & set(homes))}"

def test_only_numbered_notebooks_export():
    wrong = [
        ident(p) for p in NOTEBOOKS if default_exp(p) and (p in TUTORIALS or not re.match(r"\d\d_", p.name))
    ]
    assert not wrong, f"these export modules, but are tutorials or have no number NN_: {wrong}"

@each_notebook
def test_exports_import_only_lower_numbers(path):
    homes = {default_exp(p): p.name for p in REFERENCE if default_exp(p)}
    wrong = []
    for i, source, d in code(path):
        if not exports(d): continue
        for name in leverplus_modules(ast.parse(source)):
            if name not in homes:
                wrong.append(f"cell {i} imports leverplus.{name}, which no notebook exports")
            elif homes[name] >= path.name:
                wrong.append(f"cell {i} imports leverplus.{name} from {homes[name]}")
    assert not wrong, f"{path.name} may import only from lower numbers: " + "; ".join(wrong)

@each_notebook
def test_demonstrations_import_only_lower_numbers_or_say_why(path):
    homes = {default_exp(p): p.name for p in REFERENCE if default_exp(p)}
    if not default_exp(path): pytest.skip("a tutorial or the index looks back on all pages")
    said = [source for _, kind, source, _ in cells(path) if kind == "markdown"]
    wrong = []
    for i, source, d in code(path):
        if exports(d): continue
        for name in leverplus_modules(python(source)):
            page = homes.get(name)
            if page is None or page <= path.name: continue
            if not says_why(said, Path(page).stem): wrong.append(f"cell {i} imports leverplus.{name} from {page}")
    assert not wrong, (
        f"{path.name}: {'; '.join(wrong)}: show it with lower pages, or say why not in a paragraph"
        " with the words `later page` and the page's name"
    )

def says_why(texts, page):
    "Does a paragraph of `texts` name `page` as a later page?"
    paragraphs = [p for t in texts for p in re.split(r"\n\s*\n", t)]
    return any("later page" in p and page in p for p in paragraphs)

def python(source):
    "Syntax tree of a cell without its magics"
    plain = [line for line in source.splitlines() if not re.match(r"\s*[%!]", line)]
    return ast.parse("\n".join(plain))

def leverplus_modules(tree):
    "Modules of this package that a syntax tree imports, at any depth"
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            yield from (a.name.split(".")[1] for a in n.names if a.name.startswith("leverplus."))
        if isinstance(n, ast.ImportFrom):
            if n.level: yield n.module or "(relative import)"
            elif n.module == "leverplus": yield from (a.name for a in n.names)
            elif (n.module or "").startswith("leverplus."): yield n.module.split(".")[1]

# ---- what a page looks like --------------------------------------------------------------------------------

@each_notebook
def test_page_opens_with_title_and_purpose(path):
    _, kind, source, _ = cells(path)[0]
    assert kind == "markdown" and re.match(
        r"# \S", source
    ), f"{path.name}: the first cell must open with '# title'"
    assert re.search(
        r"^> \S", source, re.M
    ), f"{path.name}: the first cell needs a line '> purpose in one line'"

@each_notebook
def test_stored_outputs_are_small(path):
    size = sum(len(json.dumps(outs, ensure_ascii=False).encode()) for _, _, _, outs in cells(path)) / 1000
    assert size < KILOBYTES[path], (
        f"{path.name}: {size:.0f} kB of outputs, at most {KILOBYTES[path]}:"
        " smaller figures (5,3), fewer of them, tables .head()"
    )

@each_notebook
def test_stored_outputs_hold_no_error(path):
    wrong = [i for i, _, _, outs in cells(path) if any(o["output_type"] == "error" for o in outs)]
    assert not wrong, f"{path.name}: stored tracebacks in cells {wrong}; show an error with test_fail instead"

@each_notebook
def test_flagged_cells_come_last(path):
    slow = set(settings()["tst_flags"].split())
    flagged = [bool(slow & d.keys()) for _, s, d in code(path) if s.strip()]
    first = flagged.index(True) if True in flagged else len(flagged)
    assert all(
        flagged[first:]
    ), f"{path.name}: code without a flag follows a cell flagged {sorted(slow)}; flagged cells go last"

@each_notebook
def test_export_is_line_one_and_has_no_target(path):
    for i, source, _ in code(path):
        for n, line in enumerate(source.splitlines()):
            if (m := DIRECTIVE.match(line)) and m[1].startswith("export"):
                assert n == 0, (
                    f"{path.name} cell {i}: `#| export` stands on line {n + 1}; below other lines it may be"
                    " ignored, put it on line 1"
                )
                assert not m[
                    2
                ], f"{path.name} cell {i}: `#| export {m[2]}`: one notebook = one module, drop the target"

@each_notebook
def test_exported_cells_only_define(path):
    for i, source, d in code(path):
        if exports(d):
            wrong = [
                f"line {n.lineno}: {ast.unparse(n).splitlines()[0][:60]}"
                for n in ast.parse(source).body
                if not defines(n)
            ]
            assert not wrong, f"{path.name} cell {i} is exported and does work at import: {wrong}"

def defines(node):
    "Is this statement an import, a definition, a docstring, or a constant that costs nothing to make?"
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    if not isinstance(node, (ast.Assign, ast.AnnAssign)): return False
    called = (n.func for n in ast.walk(node) if isinstance(n, ast.Call))
    return not {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in called} & WORKING

# ---- how code is written -----------------------------------------------------------------------------------

COLUMNS = 120
BY_PEOPLE = [
    *(LIB/f"{name}.py" for name in sorted(BY_HAND | {"__init__"})),
    ROOT/"setup.py",
    *(p for folder in ("tests", ".ci", "bench") for p in sorted((ROOT/folder).glob("*.py"))),
]

def written(path):
    "Pieces of code that people write in a file: (where, source)"
    if path.suffix == ".ipynb": return [(f"cell {i}", source) for i, source, _ in code(path)]
    return [("file", path.read_text(encoding="utf8"))]

def joined_lines(source):
    "Numbers of the lines on which a `;` joins statements"
    plain = "\n".join("" if re.match(r"\s*[%!]", line) else line for line in source.splitlines())
    tokens = list(tokenize.generate_tokens(io.StringIO(plain).readline))
    ends = tokenize.NEWLINE, tokenize.COMMENT # a `;` at the end of a line joins nothing, it hides a cell's value
    pairs = zip(tokens, tokens[1:])
    return sorted({t.start[0] for t, after in pairs if t.string == ";" and after.type not in ends})

@pytest.mark.parametrize("path", NOTEBOOKS + BY_PEOPLE, ids=ident)
def test_one_statement_a_line(path):
    wrong = [f"{where} line {n}" for where, source in written(path) for n in joined_lines(source)]
    assert not wrong, f"{ident(path)}: statements joined by `;` in {', '.join(wrong)}"

@pytest.mark.parametrize("path", NOTEBOOKS + BY_PEOPLE, ids=ident)
def test_lines_can_be_read_without_scrolling(path):
    wrong = [
        f"{where} line {n} ({len(line)})"
        for where, source in written(path)
        for n, line in enumerate(source.splitlines(), 1)
        if len(line) > COLUMNS
    ]
    assert not wrong, f"{ident(path)}: more than {COLUMNS} columns in {', '.join(wrong)}"

# ---- modules -----------------------------------------------------------------------------------------------

@each_module
def test_public_definitions_have_a_docstring(path):
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    bare = [n.name for n in ast.parse(path.read_text(encoding="utf8")).body
            if isinstance(n, kinds) and not n.name.startswith("_") and not ast.get_docstring(n)]
    assert not bare, f"{path.name}: no docstring: {bare}"

@each_module
def test_no_print_in_library_code(path):
    if path.stem in FRONT_DOORS: pytest.skip("a program may print")
    lines = [n.lineno for n in ast.walk(ast.parse(path.read_text(encoding="utf8")))
             if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print"]
    assert not lines, f"{path.name}: print on lines {lines}; return the value, let the notebook show it"

@each_module
def test_nothing_that_is_read_runs_code(path):
    "Models of transformers come through `load_part`; no pickles, no `eval`"
    tree = ast.parse(path.read_text(encoding="utf8"))
    inside = {n for f in ast.walk(tree) if getattr(f, "name", "") == "load_part" for n in ast.walk(f)}
    theirs = of_transformers(tree)
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and n not in inside]
    wrong = [f"line {n.lineno}: {ast.unparse(n)[:80]}" for n in calls if runs_code(n, theirs)]
    assert not wrong, f"{path.name}: {wrong}"

def of_transformers(tree):
    "Names that a module imports from transformers"
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    imports = [n for n in imports if (n.module or "").startswith("transformers")]
    return {a.asname or a.name for n in imports for a in n.names} | {"transformers"}

def runs_code(call, theirs):
    "May this call run what lies in a file?"
    said = ast.unparse(call.func)
    given = {k.arg: ast.unparse(k.value) for k in call.keywords}
    if said.split(".")[0] in theirs and said.endswith((".from_pretrained", ".from_config")): return True
    if said == "torch.load": return given.get("weights_only") != "True"
    if said in ("np.load", "numpy.load"): return "allow_pickle" in given
    of, _, how = said.rpartition(".")
    reads = of in ("pickle", "yaml", "joblib", "dill") and re.fullmatch("(full_|unsafe_)?loads?(_all)?|Unpickler", how)
    return bool(reads) or said in ("eval", "exec", "pd.read_pickle", "load_learner")

@pytest.mark.parametrize("code, wrong", [
    ("from transformers import AutoModel\nAutoModel.from_pretrained('a')", True),
    ("import transformers\ntransformers.AutoConfig.from_pretrained('a', trust_remote_code=False)", True),
    ("Picker.from_pretrained('a')", False),
    ("torch.load('a')", True),
    ("torch.load('a', weights_only=True)", False),
    ("np.load('a', allow_pickle=True)", True),
    ("np.load('a')", False),
    ("yaml.load('a', Loader)", True),
    ("yaml.safe_load('a')", False),
    ("model.eval()", False),
    ("eval('a')", True),
])
def test_what_runs_code_is_known(code, wrong):
    tree = ast.parse(code)
    theirs = of_transformers(tree)
    assert any(runs_code(n, theirs) for n in ast.walk(tree) if isinstance(n, ast.Call)) == wrong

def test_code_of_models_is_never_trusted():
    "The one call by which models come in says so"
    tree = ast.parse((LIB/"checkpoints.py").read_text(encoding="utf8"))
    load_part = next(n for n in tree.body if getattr(n, "name", "") == "load_part")
    calls = [n for n in ast.walk(load_part) if isinstance(n, ast.Call)]
    calls = [n for n in calls if ast.unparse(n.func).endswith(".from_pretrained")]
    assert len(calls) == 1
    assert {k.arg: ast.unparse(k.value) for k in calls[0].keywords}["trust_remote_code"] == "False"

def test_settings_list_every_import():
    norm = lambda s: re.sub(r"[-_.]+", "-", s).lower()
    listed = {norm(re.split(r"[<>=!~\[; ]", r)[0]) for r in wanted_anywhere()}
    missing = {}
    for p in MODULES:
        for name in third_party(ast.parse(p.read_text(encoding="utf8"))):
            if norm(DISTRIBUTION.get(name, name)) not in listed: missing.setdefault(name, []).append(p.name)
    assert not missing, f"imported, but not in settings.ini's requirements: {missing}"

def wanted_anywhere():
    "What the package requires, and what its extras do, those of developers aside"
    names = [key for key in settings() if key == "requirements" or key.endswith("_requirements")]
    return [r for key in names if key != "dev_requirements" for r in settings()[key].split()]

def third_party(tree):
    "Top-level packages that a syntax tree imports, at any depth, beyond the standard library and this package"
    names = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): names |= {a.name.split(".")[0] for a in n.names}
        if isinstance(n, ast.ImportFrom) and not n.level: names.add(n.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"leverplus"}

def public(path):
    "Names in a module's `__all__`"
    body = ast.parse(path.read_text(encoding="utf8")).body
    return next(
        (
            ast.literal_eval(n.value)
            for n in body
            if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"
        ),
        [],
    )

COMMON = """ask balance cases change check choose compare confidence cosine filter frozen group look mark merge mine
mode normalise pick picture plain rng rounds several source split subsets summarise sweep tiers truth unit verdict
K MODEL DATA TABLE""".split()

def test_all_brings_what_a_person_types():
    "Some 150 names, each of its own module, in the order of the notebooks; none that is a variable of everybody's"
    imports = [n for n in ast.parse((LIB/"all.py").read_text(encoding="utf8")).body if isinstance(n, ast.ImportFrom)]
    names = [a.name for n in imports for a in n.names]
    assert 120 <= len(names) <= 160, len(names)
    assert not [a.asname for n in imports for a in n.names if a.asname]
    twice = sorted({name for name in names if names.count(name) > 1})
    assert not twice, f"two modules for each of {twice}"
    assert not set(names) & set(COMMON), sorted(set(names) & set(COMMON))
    for n in imports:
        module = n.module.removeprefix("leverplus.")
        lost = {a.name for a in n.names} - set(public(LIB/f"{module}.py"))
        assert not lost, f"leverplus.{module} has no {sorted(lost)}"
    pages = {default_exp(p): p.name for p in REFERENCE}
    order = [pages[n.module.removeprefix("leverplus.")] for n in imports]
    assert order == sorted(order)

def test_no_two_modules_give_the_same_name():
    homes = {}
    for p in MODULES:
        if p.stem in NOT_IN_ALL: continue
        for name in public(p): homes.setdefault(name, []).append(p.stem)
    twice = {k: v for k, v in homes.items() if len(v) > 1}
    assert not twice, f"one name, one thing: {twice}"

# ---- every file --------------------------------------------------------------------------------------------

def shipped_files():
    "Files that git tracks or would add; without git, the folders of the package"
    r = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True
    )
    if r.returncode == 0: files = [ROOT/f for f in r.stdout.splitlines()]
    else:
        files = [
            p
            for d in ("nbs", "leverplus", "tests", ".ci", "bench", "data", "models")
            for p in (ROOT / d).rglob("*")
            if "__pycache__" not in p.parts
        ]
    return [p for p in files if p.is_file()]

def test_no_machine_paths():
    wrong = []
    for p in shipped_files():
        data = p.read_bytes()
        if b"\0" in data[:8192]: continue
        for n, line in enumerate(data.decode("utf8", errors="replace").splitlines(), 1):
            if m := MACHINE_PATH.search(line):
                wrong.append(f"{ident(p)}:{n}: {line[max(0, m.start() - 20):m.end() + 40].strip()}")
    assert not wrong, "paths of one machine (in a notebook show path.name):\n" + "\n".join(wrong[:20])

def test_rules_would_notice():
    "The rules' own instruments, on small wrong examples"
    assert joined_lines("a = 'x;y' # ;\nb = 1; c = 2\n%time d; e\nplot(); # hidden\nplot();") == [2]
    assert says_why(["One.\n\n`f` comes from a later page, `70_learner`."], "70_learner")
    assert not says_why(["A later page.\n\nSee `70_learner`."], "70_learner")
    home = "/" + "home/me/data"
    assert MACHINE_PATH.search(f'"{home}"')
    assert not MACHINE_PATH.search("https://x.org" + home)
    assert not MACHINE_PATH.search("../shared/" + "work/a")
    assert not any(map(defines, ast.parse("print(1)\nfor i in x: pass\ny = open('f')\nz.fit()").body))
    assert all(map(defines, ast.parse("import os\nA = re.compile('a')\nB: int = 3\ndef f(): print(1)").body))
    assert list(
        leverplus_modules(
            ast.parse(
                "def f():\n from leverplus.vqa import a\n import leverplus.data, os\nfrom leverplus import x"
            )
        )
    ) == ["x", "vqa", "data"]
    assert directives("#| export\n#| slow\nx = 1\n#| hide") == {"export": "", "slow": ""}
    assert directives("# a\n#| export") == {}

# ---- files -------------------------------------------------------------------------------------------------

WRITES = {"write_text", "write_bytes", "to_csv", "to_parquet", "savefig", "save_file", "write_table", "ParquetWriter"}
SAFE = {"atomic_path", "sealed_path"} # inside such a block a temporary file is written
# a line is added to the end of these, whole or not at all for whoever reads them
APPENDED = {("callback_track", "append"), ("sweep", "append_row"), ("core", "_note_seal")}
# what these are given is the temporary file
TEMPORARY = {("core", "atomic_path"), ("core", "_no_more"), ("checkpoints", "_add_comment")}
# no file at all: a picture in memory; and tables that a method of our own writes, which is called `to_csv`
OTHERS = {("report", "_svg"), ("cli", "do_check")}

def _writes(call):
    "Does this call write a file?"
    f = call.func
    name = f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "")
    if name in WRITES: return True
    if name == "save" and isinstance(f, ast.Attribute) and getattr(f.value, "id", "") == "torch": return True
    modes = [a.value for a in call.args[:2] if isinstance(a, ast.Constant)] + [
        k.value.value for k in call.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)
    ]
    modes = [m for m in modes if isinstance(m, str) and re.fullmatch(r"[rwaxbt+]{1,3}", m)]
    return name == "open" and any(set(m) & set("wax+") for m in modes)

def _plain_writes(node, safe=False, where=""):
    "(function, line) of all calls that write a file, and not a temporary one"
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): where = node.name
    if isinstance(node, ast.With):
        for item in node.items:
            yield from _plain_writes(item.context_expr, safe, where)
            called = getattr(item.context_expr, "func", None)
            safe = safe or getattr(called, "id", "") in SAFE
        for child in node.body: yield from _plain_writes(child, safe, where)
        return
    if isinstance(node, ast.Call) and not safe and _writes(node): yield where, node.lineno
    for child in ast.iter_child_nodes(node): yield from _plain_writes(child, safe, where)

@each_module
def test_every_write_is_atomic(path):
    "Files are written under a temporary name, so that a kill, a full disk or a link at their place does no harm"
    tree = ast.parse(path.read_text(encoding="utf8"))
    found = {(path.stem, where): line for where, line in _plain_writes(tree)}
    allowed = APPENDED | TEMPORARY | OTHERS
    here = {one for one in allowed if one[0] == path.stem}
    assert here <= found.keys(), f"{here - found.keys()}: an exception that nothing needs any more"
    plain = [f"{path.name}:{line} in {where}" for (module, where), line in found.items()
             if (module, where) not in allowed]
    assert not plain, f"{plain}: write inside `with atomic_path(...)`, or `sealed_path` if it is read again"

def test_the_rule_about_writes_sees_them():
    lines = [
        "def f(p):",
        "p.write_text('x')",
        "with atomic_path(p) as tmp: tmp.write_text('x')",
        "with sealed_path(p) as tmp, open(tmp, 'wb') as out: out.write(b'x')",
        "open(p, 'w')",
        "open(p)",
    ]
    assert list(_plain_writes(ast.parse("\n    ".join(lines)))) == [("f", 2), ("f", 5)]
