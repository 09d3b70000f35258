"""What needs a GPU, in one go: `python .ci/gpu.py` (`make gpu` calls it). Under eight minutes on one card; no
network, no nbdev.

1. the tests in the group `gpu` (tests/test_gpu.py), in as many processes as there are cores, up to eight,
   if pytest-xdist is there
2. bench/gpu_scoring.py: Qwen2.5-VL-3B from its config; its table is printed and stored in runs/gpu_scoring.json

Words behind the script go to the bench. The exit status is 1 if either fails; both run.
"""
import importlib.util, os, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORES = min(8, os.cpu_count() or 1)
# every row of the table, from fewer prompts than its defaults
BENCH = ("--prompts", "128", "--naive", "4", "--minutes", "5")


def main():
    if not importlib.util.find_spec("torch"):
        wanted = "name an environment that has it: make gpu VENV=path"
        sys.exit(f"make gpu: {sys.executable} has no torch; {wanted}")
    import torch
    if not torch.cuda.is_available():
        sys.exit("make gpu: torch sees no GPU here; `make test` is what runs without one")
    env = {
        **os.environ,
        "LEVERPLUS_GPU": "1",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "2",
    }
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    spread = ["-n", str(CORES)] if importlib.util.find_spec("xdist") and CORES > 1 else []

    def run(*words):
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL).returncode

    tests = run("-m", "pytest", "-q", "-rs", "--durations=10", "tests/test_gpu.py", *spread)
    bench = run("bench/gpu_scoring.py", *BENCH, "--out", "runs/gpu_scoring.json", *sys.argv[1:])
    sys.exit(int(bool(tests or bench)))

if __name__ == "__main__": main()
