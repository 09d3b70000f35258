"""What is installed: two records that say the same, versions that were tested, a wheel that works far from the
checkout, doors that open at once
"""
import configparser, os, re, subprocess, sys
from pathlib import Path
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def ini():
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(ROOT/"settings.ini", encoding="utf8")
    return cfg["DEFAULT"]

@pytest.fixture(scope="module")
def toml():
    tomllib = pytest.importorskip(
        "tomllib", reason="Python 3.11 brings it; the other tests of this file need it"
    )
    return tomllib.loads((ROOT/"pyproject.toml").read_text(encoding="utf8"))

def requirements(lines): return {Requirement(line).name: Requirement(line) for line in lines}


# ---- one truth, written twice ------------------------------------------------------------------------------

def test_settings_and_pyproject_say_the_same(ini, toml):
    project, nbdev = toml["project"], toml["tool"]["nbdev"]
    assert requirements(ini["requirements"].split()) == requirements(project["dependencies"])
    for extra, reqs in project["optional-dependencies"].items():
        assert requirements(ini[f"{extra}_requirements"].split()) == requirements(reqs), extra
    assert dict(s.split("=") for s in ini["console_scripts"].split()) == project["scripts"]
    assert (ini["lib_name"], ini["description"], ini["keywords"].split(), ini["git_url"]) == (
        project["name"],
        project["description"],
        project["keywords"],
        project["urls"]["Repository"],
    )
    assert project["requires-python"] == ">=" + ini["min_python"]
    assert project["authors"] == [dict(name=ini["author"], email=ini["author_email"])]
    for key in ("lib_path", "nbs_path", "doc_path", "tst_flags", "branch", "title"):
        assert str(nbdev[key]) == ini[key], key
    for key in (
        "recursive",
        "put_version_in_init",
        "clean_ids",
        "clear_all",
        "jupyter_hooks",
        "custom_sidebar",
    ):
        assert str(nbdev[key]) == ini[key], key

def test_version_stands_once(ini):
    from leverplus import __version__
    assert __version__ == ini["version"] # nbdev 2.4 writes it from here; pyproject.toml reads the package's


# ---- versions ----------------------------------------------------------------------------------------------

def pins(name):
    "{distribution: version} of a constraints file, markers aside"
    lines = (ROOT/name).read_text(encoding="utf8").splitlines()
    found = [re.fullmatch(r"([\w-]+)==([\w.]+)(?:; .*)?", line) for line in lines if line and line[0] != "#"]
    assert all(found), name
    return {m[1]: Version(m[2]) for m in found}

def pinned_requirements(ini):
    "What a constraints file names: all but the extra for clusters"
    return [r for kind in ("requirements", "dev_requirements", "smol_requirements") for r in ini[kind].split()]

@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_constraints_pin_every_requirement(ini, name):
    wanted = requirements(pinned_requirements(ini))
    pinned = pins(name)
    assert wanted.keys() <= pinned.keys(), wanted.keys() - pinned.keys()
    for n, r in wanted.items():
        assert r.specifier.contains(pinned[n]), f"{name}: {n}=={pinned[n]}, wanted {r.specifier}"

def test_lower_bounds_are_what_was_tested(ini):
    pinned = pins("constraints-oldest.txt")
    for r in requirements(pinned_requirements(ini)).values():
        least = [s.version for s in r.specifier if s.operator == ">="]
        assert least, f"{r}: the oldest set has {pinned[r.name]}"
        assert Version(least[0]) == pinned[r.name], f"{r}: the oldest set has {pinned[r.name]}"


# ---- the wheel ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A folder with the unpacked wheel alone"
    import shutil, zipfile
    tree = tmp_path_factory.mktemp("tree")
    out = tmp_path_factory.mktemp("site")
    for name in ("leverplus", "data", "models"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tree / name)
    build = "from setuptools import build_meta; import sys; print(build_meta.build_wheel(sys.argv[1]))"
    r = subprocess.run([sys.executable, "-c", build, str(out)], cwd=tree, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-3000:]
    wheel = next(out.glob("*.whl"))
    zipfile.ZipFile(wheel).extractall(out/"site")
    return out/"site"

def python(site, code, *words):
    "What a process far from the checkout prints, with the unpacked wheel in front of everything"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(
        PYTHONPATH=str(site), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"
    )
    r = subprocess.run(
        [sys.executable, *(["-c", code] if code else []), *words],
        cwd=site.parent,
        capture_output=True,
        text=True,
        env=env,
    )
    assert r.returncode == 0, r.stderr[-3000:]
    return r.stdout

def test_the_wheel_brings_the_world(site):
    code = ("import leverplus, torch; from leverplus.world import world; w = world('islands', device='cpu'); "
            "print(leverplus.__file__, len(w.items), len(w.facts()), w.items.image_path.iloc[0])")
    package, items, facts, image = python(site, code).split()
    assert Path(package).is_relative_to(site)
    assert Path(image).is_relative_to(site)
    assert (int(items), int(facts)) == (2150, 257_000)

def test_the_wheel_brings_the_templates(site):
    "Every template of the checkout, and they are those that are used"
    def names(package): return sorted(p.name for p in (package/"templates").iterdir())
    assert names(site/"leverplus") == names(ROOT/"leverplus")
    code = "import leverplus.markup as m; print(m.__file__, m.Preformatted('1<2').html())"
    module, said = python(site, code).split()
    assert Path(module).is_relative_to(site)
    assert said == "<pre>1&lt;2</pre>"

def test_the_wheel_works_at_the_doors(site):
    from leverplus import __version__
    assert python(site, None, "-m", "leverplus", "--version").strip() == f"leverplus {__version__}"
    plan = python(site, None, "-m", "leverplus", "generate", "--dry-run", "--out", "runs/try")
    assert "plan of leverplus generate" in plan
    assert not (site.parent/"runs").exists()

def test_without_the_world_it_says_where_to_get_it(site, tmp_path):
    import shutil
    bare = tmp_path/"site"
    shutil.copytree(site, bare, ignore=shutil.ignore_patterns("embedded"))
    code = (
        "from leverplus.world import world\ntry: world()\nexcept FileNotFoundError as e: print(e)"
    )
    said = python(bare, code)
    assert "islands" in said
    assert "comes with the wheel of leverplus and with a checkout" in said

def test_entry_points_of_the_wheel(site):
    text = next(site.glob("leverplus-*.dist-info/entry_points.txt")).read_text()
    assert "leverplus = leverplus.__main__:main" in text
    assert "leverplus-demo = leverplus.demo:main" in text


# ---- what is imported when ---------------------------------------------------------------------------------

HEAVY = {"torch", "pandas", "numpy", "fastai", "fastcore", "transformers", "matplotlib", "pyarrow"}

def test_nothing_heavy_before_a_command_is_carried_out():
    "`import leverplus`, all help, --version and words that are wrong import nothing that takes its time"
    show = f"import sys; print(sorted({HEAVY!r} & set(sys.modules)))"
    lines = "--help", "--version", "nonsense", "", "train --help", "infer --out x --limit 0", "eval --nonsense"
    first = (
        f"import contextlib, io\nfrom leverplus.__main__ import main\nfor line in {lines!r}:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()),"
        " contextlib.redirect_stderr(io.StringIO()): main(line.split())\n"
    )
    for code in ("import leverplus\n", "import leverplus.settings\n", first):
        assert python(ROOT, code + show).strip() == "[]"

def test_the_first_page_names_every_door(capsys):
    from leverplus.doors import DOORS, STATUS, answer
    with pytest.raises(SystemExit) as e: answer(["--help"])
    first = capsys.readouterr().out
    assert e.value.code == 0
    for name, door in DOORS.items():
        assert re.search(rf"^  {name} +{door.__doc__[0].lower()}{re.escape(door.__doc__[1:])}$", first, re.M), name
    for code, means in STATUS.items(): assert f"{code}  {means}" in first
    with pytest.raises(SystemExit) as e: answer(["trian"])
    assert e.value.code == 2
    assert "'trian' is no command" in capsys.readouterr().err

def test_both_ways_in_are_the_same_door():
    from leverplus.__main__ import main
    with pytest.raises(SystemExit) as e: main(["check", "--help"])
    assert e.value.code == 0
    assert main(["check", "nowhere"]) == 2
