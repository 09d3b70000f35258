"""Every notebook runs from top to bottom: nbdev's runner, one process, without the cells flagged in
settings.ini (`test_tutorials.py`: the long ones)
"""
import configparser, importlib, os, pkgutil, signal, sys
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

def patched_classes():
    "Classes of the package and of fastai that its pages may add methods to, with all modules loaded"
    import leverplus
    names = [f"leverplus.{module.name}" for module in pkgutil.iter_modules(leverplus.__path__)]
    found = [value for name in names for value in vars(importlib.import_module(name)).values()]
    return {cls for cls in found if isinstance(cls, type) and cls.__module__.split(".")[0] in ("leverplus", "fastai")}

def put_back(cls, had):
    "The attributes that a class had: a page patches its own methods in, which look for names in the page"
    for name, value in list(vars(cls).items()):
        if name.startswith("__"): continue   # Python's own notes
        if name not in had: delattr(cls, name)
        elif value is not had[name]: setattr(cls, name, had[name])

@pytest.fixture
def clean_process():
    """Put back what a notebook run changes in this process: main module, paths, environment, plot backend,
    torch's switches, methods of classes
    """
    # it patches torch.Tensor (test_eq on tensors!), so have it there for every notebook, in any order
    import fastai.basics
    import matplotlib, torch
    from IPython.core.interactiveshell import InteractiveShell
    main = sys.modules["__main__"]
    methods = {cls: dict(vars(cls)) for cls in patched_classes()}
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
    for cls, had in methods.items(): put_back(cls, had)
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

def test_methods_of_a_page_do_not_stay(clean_process):
    "As after a page that patches what the package patches, too"
    from fastai.learner import Learner
    had = dict(vars(Learner))
    Learner.fit_recipe = lambda self: "of a page"
    Learner.only_of_a_page = None
    put_back(Learner, had)
    assert Learner.fit_recipe is had["fit_recipe"] and not hasattr(Learner, "only_of_a_page")

@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p not in LONG], ids=page)
def test_notebook(path, clean_process, capsys): walk(path, capsys)
