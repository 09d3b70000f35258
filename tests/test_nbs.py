"""Every notebook runs from top to bottom: nbdev's runner, one process, without the cells flagged in
settings.ini (`test_tutorials.py`: the long ones)
"""
import configparser, os, signal, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
sys.path.insert(0, str(ROOT/".ci"))
from directives import flags_off

# without index: README is made from it, and `test_readme.py` runs its code
NOTEBOOKS = [
    p
    for d in (NBS, NBS / "tutorials")
    for p in sorted(d.glob("*.ipynb"))
    if p.name[0] not in "_." and p.stem != "index"
]
LONG = [p for p in NOTEBOOKS if p.parent.name == "tutorials" or p.stem == "92_demo"]
page = lambda p: p.relative_to(NBS).with_suffix("").as_posix()

def flags():
    "The cell flags that tests skip: those of settings.ini whose cells cannot run here"
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf8")
    return sorted(flags_off(cfg["DEFAULT"]["tst_flags"].split()))

@pytest.fixture
def clean_process():
    """Put back what a notebook run changes in this process: main module, paths, environment, plot backend,
    torch's switches
    """
    # it patches torch.Tensor (test_eq on tensors!), so have it there for every notebook, in any order
    import fastai.basics
    import matplotlib, torch
    from IPython.core.interactiveshell import InteractiveShell
    main = sys.modules["__main__"]
    path = list(sys.path)
    env = dict(os.environ)
    instance = InteractiveShell._instance
    rc = matplotlib.rcParams.copy()
    hooks = (sys.displayhook, sys.excepthook)
    threads = torch.get_num_threads()
    # nbdev 3 puts a handler of its own there, which ends the process
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, on_ctrl_c)
    InteractiveShell._instance = instance
    sys.modules["__main__"] = main
    sys.path[:] = path
    sys.displayhook, sys.excepthook = hooks
    os.environ.clear()
    os.environ.update(env)
    matplotlib.use("Agg", force=True)
    matplotlib.rcParams.update(rc)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)

def walk(path, capsys):
    from nbdev.test import test_nb
    ok, _ = test_nb(path, skip_flags=flags(), basepath=ROOT)
    assert ok, f"{path.relative_to(ROOT)} failed:\n{capsys.readouterr().err[-6000:]}"

@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p not in LONG], ids=page)
def test_notebook(path, clean_process, capsys): walk(path, capsys)
