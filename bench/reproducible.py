"""What the same numbers cost on a GPU: training with kernels that add in a fixed order against training with
torch's defaults.

    python bench/reproducible.py        needs a CUDA device; half a minute

Each row trains one selector four times with one seed, twice each way, in turns: seconds are medians,
`moved` is the largest difference of a weight between two trainings with the same seed.
"""
import contextlib, statistics, sys, time
from pathlib import Path
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from leverplus import learner as module
from leverplus.learner import selector_learner
from leverplus.synth import quiet, synth_dls

ROWS = {
    "attention over 64 candidates, RCE": (dict(d_hidden=128, n_heads=4), "fit_rce", 64),
    "attention over 64 candidates, GRPO": (dict(d_hidden=128, n_heads=4), "fit_grpo", 64),
    "attention over 512 candidates, RCE": (dict(d_hidden=128, n_heads=4), "fit_rce", 512),
    "attributes (net), 64 candidates, listwise": (
        dict(match="net", n_layers=0, state="none"),
        "fit_listwise",
        64,
    ),
}

def train(kw, stage, K, steady):
    "(seconds, weights) of one training"
    was = module.reproducible
    if not steady: module.reproducible = lambda device: contextlib.nullcontext()
    try:
        learn = selector_learner(
            synth_dls(512, 64, 32, K=(K, K), N=(8, 8), shots=(2,), device=torch.device("cuda")), **kw
        )
        torch.cuda.synchronize()
        start = time.perf_counter()
        with quiet(learn): getattr(learn, stage)(n_epoch=4, lr=3e-3, watch=None, best=False)
        torch.cuda.synchronize()
        return time.perf_counter() - start, torch.cat(
            [p.detach().flatten() for p in learn.model.parameters()]
        )
    finally: module.reproducible = was

def main():
    if not torch.cuda.is_available():
        print("this bench compares CUDA kernels, and torch sees no GPU here")
        return
    print(f"{torch.cuda.get_device_name()}, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}\n")
    print(
        f"{'selector and stage':44s} {'defaults s':>10s} {'steady s':>9s} {'ratio':>6s}"
        f" {'moved, defaults':>16s} {'moved, steady':>14s}"
    )
    for name, (kw, stage, K) in ROWS.items():
        train(kw, stage, K, True) # warm-up
        runs = {way: [] for way in (False, True)}
        for _ in range(2):
            for way in runs: runs[way].append(train(kw, stage, K, way))
        seconds = {way: statistics.median(t for t, _ in done) for way, done in runs.items()}
        moved = {way: float((done[0][1] - done[1][1]).abs().max()) for way, done in runs.items()}
        print(
            f"{name:44s} {seconds[False]:10.2f} {seconds[True]:9.2f} {seconds[True]/seconds[False]:6.2f}"
            f" {moved[False]:16.1e} {moved[True]:14.1e}",
            flush=True,
        )

if __name__ == "__main__": main()
