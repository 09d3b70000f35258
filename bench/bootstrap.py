"""Paired bootstrap: all selectors under the same resamples, as one matrix product per block, side by side with
plain loops.

`python bench/bootstrap.py [queries] [selectors] [resamples] [resamples of the loops]` prints a table:
seconds of CPU (one thread), and what this means for all resamples. The loops run on fewer resamples and are
scaled; their numbers are asserted equal for equal draws. Memory is the peak of the process beyond what it
had before.
"""
import resource, statistics, sys, time
import numpy as np
from leverplus.core import rng
from leverplus.statistics import Bootstrap, boot_means

def scores(n, k, seed=0):
    "[n, k] accuracies in {0, .6, 1} of k selectors that answer most queries alike"
    g = np.random.default_rng(seed)
    base = g.choice([0, 0.6, 1], n, p=[0.45, 0.10, 0.45])
    return np.stack([np.where(g.random(n) < .1, g.permutation(base), base) for _ in range(k)], 1)

def python_loop(x, draws):
    "One resample, one selector, one query after the other"
    rows = x.T.tolist()
    return np.array([[sum(r[i] for i in d) / len(d) for r in rows] for d in draws.tolist()])

def numpy_loop(x, draws):
    "One resample after the other, all selectors indexed at once"
    return np.array([x[d].mean(0) for d in draws])

def timed(f, *args):
    t = time.process_time()
    out = f(*args)
    return out, time.process_time() - t

def main(n=5046, k=20, n_resamples=10_000, n_loop=100, repeats=3):
    x = scores(n, k)
    boot_means(x, bootstrap=Bootstrap(10))
    bootstrap = Bootstrap(n_resamples)
    had = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    runs = [timed(boot_means, x, None, bootstrap) for _ in range(repeats)]
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - had) / 1024
    ours = statistics.median(t for _, t in runs)
    draws = rng("bootstrap", 0).integers(n, size=(n_loop, n))
    table = []
    for name, loop, m in (
        ("plain loop (Python)", python_loop, max(1, n_loop // 20)),
        ("loop over resamples (numpy)", numpy_loop, n_loop),
    ):
        got, t = timed(loop, x, draws[:m])
        assert np.allclose(got, runs[0][0][:m], atol=1e-12), name
        table.append((name, m, t, t*n_resamples/m))
    image = np.arange(n) // 2
    clustered = statistics.median(timed(boot_means, x, image, bootstrap)[1] for _ in range(repeats))
    table += [
        ("`boot_means`", n_resamples, ours, ours),
        ("`boot_means`, two queries an image", n_resamples, clustered, clustered),
    ]
    print(
        f"{n_resamples:,} paired resamples of {n:,} queries x {k} selectors; median of {repeats}; peak memory"
        f" of `boot_means` beyond the data: {peak:.0f} MB\n"
    )
    print("| way | resamples run | CPU seconds | for all | times slower |\n|---|---|---|---|---|")
    for name, m, t, whole in table: print(f"| {name} | {m:,} | {t:.2f} | {whole:,.1f} | {whole/ours:,.1f} |")

if __name__ == "__main__": main(*map(int, sys.argv[1:]))
