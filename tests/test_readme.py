"""What README shows is what happens: its code runs as it stands, in order, in a fresh process, and no warning
of ours appears
"""
import json, os, re, shlex, subprocess, sys, warnings
from pathlib import Path
import pytest
import own_warnings
from leverplus.doors import read_door

ROOT = Path(__file__).resolve().parent.parent
TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT/".ci"))
from directives import directives
PATH = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
STRICT = "import own_warnings; own_warnings.install()\n"


def blocks(kind):
    "Fenced blocks of README, in order"
    return re.findall(rf"^```{kind}\n(.*?)^```", (ROOT/"README.md").read_text(encoding="utf8"), re.M | re.S)

def python(code, folder, **env):
    "What a fresh process says, stdout and stderr; it must end well"
    env = dict(os.environ, PYTHONPATH=PATH, HF_HUB_OFFLINE="1", MPLBACKEND="Agg", **env)
    env.pop("TQDM_DISABLE", None)
    r = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env=env,
        stdin=subprocess.DEVNULL,
    )
    assert r.returncode == 0, r.stdout[-1000:] + r.stderr[-4000:]
    return r.stdout + r.stderr

def index_cells():
    "Code of the index: (what README shows of it, all that makes README)"
    cells = json.loads((ROOT/"nbs"/"index.ipynb").read_text(encoding="utf8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    used = [s for s in sources if "hide" not in directives(s)]
    return [s for s in used if directives(s).get("echo") != "false"], used

def run_blocks(folder):
    "Run all code of README in an empty folder, that of its table and figure too; what it prints"
    return python(STRICT + "\n".join(index_cells()[1]), folder)

def test_readme_shows_the_code_that_is_run():
    def plain(source):
        return "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip()
    assert [b.strip() for b in blocks("python")] == [plain(source) for source in index_cells()[0]]
    assert len(blocks("python")) == 2

def test_python_blocks_run_and_say_nothing(tmp_path):
    assert run_blocks(tmp_path).strip() == "" # tables are values, not prints; and no bar, no warning
    assert (tmp_path/"runs"/"quick").is_dir()

def test_commands_exist():
    "Every `make` target, every door and every file that the shell blocks name"
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    targets = [line.split()[1] for line in lines if line.startswith("make ")]
    assert {"demo", "test", "gpu"} <= set(targets)
    for target in targets: subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
    for line in lines:
        if not line.startswith("leverplus"): continue
        words = shlex.split(line)
        if words[1].startswith("-"):
            env = dict(os.environ, PYTHONPATH=PATH)
            subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True, env=env)
        else: read_door(words[1:]) # exits with 2 for a word that it does not know
    for name in re.findall(r"-c (\S+)", " ".join(lines)): assert (ROOT/name).is_file(), name

def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#:\s]+)\)", (ROOT/"README.md").read_text(encoding="utf8"))
    assert all((ROOT/t).exists() for t in targets), targets


# ---- no warning of ours at a door --------------------------------------------------------------------------

LINES = (
    "generate --n 6 --split train --test 2 --window 3 --out runs/train",
    "generate --lvlm mock --n 6 --split dev --test 0 --quiet --out runs/dev",
    "train runs/train --dev runs/dev --objective rce --epochs 1 --bs 4 --out runs/rce --seed 1",
)

def test_generate_and_train_say_nothing(tmp_path):
    code = (
        "own_warnings.at_the_doors()\nfrom leverplus.__main__ import main\nfor line in {lines!r}: assert"
        " main(line.split()) == 0, line"
    )
    said = python(STRICT + code.format(lines=LINES), tmp_path, OMP_NUM_THREADS="1")
    assert "checkpoint runs/rce" in said
    assert "Loading weights" not in said

def library(name, source):
    "A module that stands for somebody's library"
    module = {"__name__": name}
    exec(source, module)
    return module

@pytest.mark.parametrize(
    "caller,ours",
    [
        ("leverplus.lvlm", True),
        ("__main__", True),
        ("transformers.generation", False),
        ("leverplusplus", False),
    ],
)
def test_whose_warning_it_is(monkeypatch, caller, ours):
    """The caller decides, however deep inside the library the complaint is made; a warning of the caller's own
    counts too
    """
    lib = library(
        "torch.jit",
        "import warnings\ndef deep(): warnings.warn('old argument', FutureWarning)\ndef f(): deep()",
    )
    user = library(caller, "import warnings\ndef use(f): f()\ndef own(): warnings.warn('mine', UserWarning)")
    with warnings.catch_warnings():
        own_warnings.install()
        for act in (lambda: user["use"](lib["f"]), user["own"]):
            if ours:
                with pytest.raises((FutureWarning, UserWarning), match="old argument|mine"): act()
            else: act()
