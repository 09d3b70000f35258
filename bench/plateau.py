"""How long RCE takes to its plateau, against the usual procedure at the same number of epochs.

`python bench/plateau.py [threads] [seeds] [epochs]`: 800 queries x 16 stored sequences, S = 2, K = 64, D =
512, H = 256, 1 layer, on the tensor world of `03_synth`, whose rule has to be learned. A run is `fit_rce`
with everything that belongs to it (schedules, statistics, validation on 200 other queries, best epoch). The
plateau is the first epoch that has 98 % of the fall in validation regret that the whole run has. The
usual procedure, one query at a time with candidates encoded again per sequence, is timed on 40 queries
and scaled to as many epochs: nobody waits for it.
"""
import statistics, sys, time, warnings
import torch
from leverplus.learner import selector_learner
from leverplus.losses import rce_loss
from leverplus.synth import quiet, synth_dls

# the world has 16 dimensions, turned into 512
D = 512
H = 256
K = 64
N = 16
S = 2
LOW = 16

def run(seed, epochs):
    "(seconds to the plateau, its epoch, regret at start, there and at best, the Learner)"
    dls = synth_dls(800, 200, 64, seed, d=LOW, K=K, N=N, shots=S, device="cpu")
    up = torch.linalg.qr(torch.randn(D, LOW, generator=torch.Generator().manual_seed(seed)))[0].T
    for dl in dls.loaders:
        dl.create_batch = lambda b, f=dl.create_batch: (lambda x: (x[0] @ up, x[1] @ up, *x[2:]))(f(b))
    learn = selector_learner(dls, seed=seed, d_hidden=H, n_layers=1, dropout=0.0)
    learn.model.fold = True
    with quiet(learn), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = float(learn.validate()[0])
        start = time.perf_counter()
        learn.fit_rce(epochs, 3e-3, temp=0.1, best=False)
        took = time.perf_counter() - start
    v = learn.history.frame.valid_loss.cummin()
    there = int((v <= before - 0.98 * (before - v.min())).to_numpy().argmax())
    return took * (there+1) / epochs, there+1, before, float(v[there]), float(v.min()), learn

def plain(learn, looped=40):
    "Seconds per epoch of 800 queries, the usual way"
    query, cands, mask, seqs, sm, r, ok = learn.dls.train.one_batch()
    m = learn.model.train()
    m.fold = False
    opt = torch.optim.AdamW(m.parameters(), 1e-4)
    looped = min(looped, len(query))
    start = time.perf_counter()
    for q in range(looped):
        lp = m(query[q].repeat(N, 1), cands[q].repeat(N, 1, 1), None, seqs[q][:, None]).T
        opt.zero_grad()
        rce_loss(lp, r[q : q + 1], ok[q : q + 1]).backward()
        opt.step()
    return (time.perf_counter() - start) / looped * 800

def main(threads=1, seeds=5, epochs=20):
    torch.set_num_threads(threads)
    rows = []
    print(__doc__.split("\n")[0], f"{threads} thread(s), {epochs} epochs, {seeds} seeds\n")
    print(
        "| seed | epochs to the plateau | regret: start, there, best | seconds, ours | seconds, plain | ratio"
        " |\n|---|---|---|---|---|---|"
    )
    for seed in range(seeds):
        t, n, a, b, c, learn = run(seed, epochs)
        p = plain(learn) * n
        rows.append((t, p))
        print(f"| {seed} | {n} | {a:.3f}, {b:.3f}, {c:.3f} | {t:.1f} | {p:.0f} | {p/t:.0f}x |", flush=True)
    med = [statistics.median(x) for x in zip(*rows)]
    print(f"| median | | | {med[0]:.1f} | {med[1]:.0f} | {statistics.median(p/t for t, p in rows):.0f}x |")

if __name__ == "__main__": main(*map(int, sys.argv[1:]))
