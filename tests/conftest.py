"""Every test: this checkout's leverplus, no window, no network, the same draws each time; rules first, then notebooks

A test means the same on every machine, so a GPU is out of sight: everything runs on the CPU, child
processes included. The group `gpu` (test_gpu.py) is the other way round: it runs where LEVERPLUS_GPU=1 asks
for it (`make gpu`, and `make test` on a machine with a GPU).
"""
import os, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.update(HF_HUB_OFFLINE="1", MPLBACKEND="Agg", TQDM_DISABLE="1")
ON_GPU = os.environ.get("LEVERPLUS_GPU") == "1"
if not ON_GPU: os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path.insert(0, str(ROOT))

import matplotlib, pytest
from hypothesis import HealthCheck, settings
matplotlib.use("Agg")

settings.register_profile(
    "leverplus",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("leverplus")

# what takes longest begins first, so that no process waits for it at the end
FIRST = (
    "test_rules.py", "test_readme.py", "test_nbs.py", "test_tutorials.py", "test_demo.py", "test_callbacks.py",
    "test_cli.py", "test_loops.py", "test_generate.py", "test_training.py", "test_exactness.py",
)

def pytest_collection_modifyitems(items):
    """Cheap rules first, then what takes longest, then the rest, whatever order they were collected in; no GPU,
    no `gpu` tests
    """
    if not ON_GPU:
        asleep = pytest.mark.skip(reason="needs a GPU: run `make gpu`")
        for item in items:
            if item.get_closest_marker("gpu"): item.add_marker(asleep)
    items.sort(key=lambda it: FIRST.index(it.path.name) if it.path.name in FIRST else len(FIRST))

@pytest.fixture(autouse=True)
def quiet_neighbours():
    "No test inherits another's random state or open figures, nor its working folder"
    import matplotlib.pyplot as plt
    from leverplus.core import seed_all
    seed_all(0)
    cwd = os.getcwd()
    yield
    plt.close("all")
    os.chdir(cwd)

@pytest.fixture(scope="session")
def okvqa():
    "Folder of the real OKVQA text files beside the checkout; the test is skipped where there is none"
    path = ROOT.parent/"shared"/"data"/"okvqa"
    if not path.is_dir(): pytest.skip("no OKVQA files in ../shared/data/okvqa")
    return path

@pytest.fixture(scope="session")
def blind_okvqa():
    "Folder of the second world beside the checkout; the test is skipped where there is none"
    path = ROOT.parent/"shared"/"data"/"blind_okvqa"
    if not path.is_dir(): pytest.skip("no second world in ../shared/data/blind_okvqa")
    return path
