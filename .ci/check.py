"""All checks, in order, from the checkout this file lies in: `python .ci/check.py` (`make test` calls it).

1. `nbdev_export` changes nothing    2. `nbdev_clean` changes nothing    3. README.md is what nbs/index.ipynb makes
4. `pytest -q` on the CPU, in as many processes as there are cores, up to eight, a file never in two: the
   rules, the notebooks, then the rest (tests/conftest.py holds that order)
5. where there is a GPU, the tests in the group `gpu` on it

Steps 1-3 work on a copy in a temporary folder and compare files: your working tree, committed or not, is
only read. They hold with nbdev 2.4 and with nbdev 3: of `_modidx.py`, which the two write differently, only
the symbols are compared. Words behind the script go to pytest.
"""
import ast, hashlib, os, shutil, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = "nbs", "leverplus", "README.md", "settings.ini", "pyproject.toml", "setup.py"
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1"}
ENV.pop("IN_TEST", None)  # nbdev_export does nothing where it is set
CORES = min(8, os.cpu_count() or 1)
# two processes with two threads each on two cores wait for each other: ten times slower
if CORES > 1:
    ENV["OMP_NUM_THREADS"] = "1"
# in the order of tests/conftest.py
SPREAD = ["-n", str(CORES), "--dist", "loadfile", "--no-loadscope-reorder"] if CORES > 1 else []
REMEDY = "run `make export`, look at the change, commit it (edit the notebook, never the generated file)"

STEPS = {
    "nbdev_export": ["-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"],
    "nbdev_clean": ["-c", "from nbdev.clean import nbdev_clean; nbdev_clean()"],
    "README": [str(ROOT/".ci"/"readme.py"), "--root", "."],
}

def copy_tree(to):
    "Copy what the three steps read and write into folder `to`"
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_*.ipynb")
    for name in COPIED:
        p = ROOT/name
        if p.is_dir(): shutil.copytree(p, to/name, ignore=skip)
        elif p.exists(): shutil.copy2(p, to/name)

def content(path):
    "What is compared of a file: its bytes; of `_modidx.py` the symbols of every module that has any"
    if path.name != "_modidx.py": return path.read_bytes()
    index = ast.literal_eval(path.read_text(encoding="utf8").split("d = ", 1)[1])
    symbols = [(module, sorted(names.items())) for module, names in index["syms"].items() if names]
    return repr(sorted(symbols)).encode()

def hashes(root):
    "Relative path -> sha256 of every file below `root`"
    files = (p for p in sorted(root.rglob("*")) if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(root).as_posix(): hashlib.sha256(content(p)).hexdigest() for p in files}

def changed(before, after):
    "Lines that name the files in which two `hashes` differ"
    def word(name):
        if name not in before: return "missing from the checkout"
        if name not in after: return "should not be there"
        return "differs"
    every = sorted(before.keys() | after.keys())
    return [f"  {name}: {word(name)}" for name in every if before.get(name) != after.get(name)]

def no_diff(name, args):
    "Run one step in a fresh copy; the files it changed, as lines"
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        copy_tree(d)
        before = hashes(d)
        env = {**ENV, "PYTHONPATH": str(d)}
        quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        r = subprocess.run([sys.executable, *args], cwd=d, env=env, **quiet)
        if r.returncode: sys.exit(f"{name} failed:\n{r.stdout}")
        return changed(before, hashes(d))

def pytest(*words, **env):
    "Run pytest; its exit status"
    command = [sys.executable, "-m", "pytest", "-q", *words]
    return subprocess.run(command, cwd=ROOT, env={**ENV, **env}, stdin=subprocess.DEVNULL).returncode

def gpu_is_there():
    "Is there a GPU that torch can use?"
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL).returncode == 0

def main():
    for name, args in STEPS.items():
        t = time.time()
        lines = no_diff(name, args)
        if lines:
            sys.exit("\n".join([f"{name} changes files of this checkout:", *lines, f"To do: {REMEDY}."]))
        print(f"{name}: no difference ({time.time() - t:.0f} s)", flush=True)
    status = pytest(*SPREAD, *sys.argv[1:])
    if gpu_is_there(): status = status or pytest("tests/test_gpu.py", *SPREAD, LEVERPLUS_GPU="1")
    sys.exit(status)

if __name__ == "__main__": main()
