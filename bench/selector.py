"""Training and proposing with the pointer selector, side by side with the plain way: one RCE epoch, beam-5
proposals from pools of 64 and from a whole split; the KL to a reference.

`python bench/selector.py [threads] [repeats] [queries] [demonstrations]` prints four tables. Setting: 800
queries x 16 stored sequences, S = 2, D = 512, H = 256, 1 layer, pools drawn from a training split of 9,009.
The plain way trains on one query at a time and encodes its candidates again for every sequence (as one
batch of 16, or one after the other); it proposes with a Python loop over candidates. It is timed on a part
of the queries and scaled. The KL of sequences of four is summed over all prefixes, or over 256 that are
drawn. Both sides alternate in one process; losses, gradients, proposals and their log-probabilities must
agree.
"""
import ctypes, gc, math, os, statistics, sys, threading, time
from pathlib import Path
import torch, pandas as pd
from leverplus.core import frozen, rng, seed_all
from leverplus.losses import kl_steps, rce_loss
from leverplus.selector import PointerSelector, Shared

D = 512
H = 256
K = 64
N = 16
S = 2
W = 5
BIG = 9009

def world(Q, U, seed=0):
    "Queries, demonstrations, pools as indices, stored sequences and rewards"
    seed_all(seed)
    index = torch.rand(Q, U).topk(K, -1).indices
    return (
        torch.randn(Q, D),
        torch.randn(U, D),
        index,
        torch.rand(Q, N, K).topk(S, -1).indices,
        torch.rand(Q, N),
    )

def policy(fold=False):
    "A selector whose parts are all switched on; no dropout, so that both sides compute the same numbers"
    seed_all(1)
    m = PointerSelector(D, H, dropout=0.0)
    m.fold = fold
    with torch.no_grad():
        m.gains.copy_(torch.tensor([1.0, 0.5]))
        m.step_emb.normal_(std=0.01)
    return m

# ---- training -------------------------------------------------------------------------------------------------------

def loss_plain(m, data, q):
    "One query; every sequence encodes the query and its candidates again"
    query, vecs, index, seqs, r = data
    c = vecs[index[q]][None]
    lp = torch.cat([m(query[q:q+1], c, None, seqs[q:q+1, n:n+1]) for n in range(N)], 1)
    return rce_loss(lp, r[q:q+1], torch.ones_like(lp, dtype=torch.bool))

def loss_repeated(m, data, q):
    "One query; its candidates are repeated and encoded once per sequence, the sequences being a batch"
    query, vecs, index, seqs, r = data
    lp = m(query[q].repeat(N, 1), vecs[index[q]].repeat(N, 1, 1), None, seqs[q][:, None]).T
    return rce_loss(lp, r[q:q+1], torch.ones_like(lp, dtype=torch.bool))

def loss_batch(m, data, i, shared):
    "A batch of queries, each encoded once; `shared`: each demonstration of the batch, too"
    query, vecs, index, seqs, r = data
    pools = Shared(vecs, index[i]) if shared else vecs[index[i]]
    lp = m(query[i], pools, None, seqs[i])
    return rce_loss(lp, r[i], torch.ones_like(lp, dtype=torch.bool))

def epoch(m, losses):
    opt = torch.optim.AdamW(m.parameters(), 1e-4)
    for f in losses:
        opt.zero_grad()
        f().backward()
        opt.step()

def same_gradients(data, looped):
    "Losses and gradients of the plain way, of batches and of shared batches agree on some queries"
    out = []
    i = torch.arange(looped)
    ways = [(False, f) for f in (loss_plain, loss_repeated)] + [
        (fold, lambda m, s=s: loss_batch(m, data, i, s))
        for fold, s in ((False, False), (True, False), (False, True))
    ]
    for fold, f in ways:
        m = policy(fold)
        losses = [f(m, data, q) / looped for q in range(looped)] if f in (loss_plain, loss_repeated) else [f(m)]
        for l in losses: l.backward()
        out.append((sum(l.item() for l in losses), [p.grad for p in m.parameters()]))
    for total, grads in out[1:]:
        assert abs(total - out[0][0]) < 1e-4, (total, out[0][0])
        for a, b in zip(grads, out[0][1]): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)

# ---- proposing ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def beam_plain(m, enc, b):
    "Beam search of one query: for each beam and each candidate compute a score"
    pool = enc.cands[b if len(enc.cands) > 1 else 0]
    sim = enc.sim[b]
    (a, g) = m.gains.tolist()
    beams = [((), 0.0, enc.query[b])]
    for t in range(S):
        grown = []
        for seq, lp, state in beams:
            ask = torch.nn.functional.normalize(state + m.step_emb[t], dim=-1)
            scores = {}
            for k in range(len(pool)):
                if k not in seq: scores[k] = (a*m.prior_scale*sim[k] + g*(ask @ pool[k])/m.pointer_temp).item()
            top = max(scores.values())
            norm = top + math.log(sum(math.exp(s - top) for s in scores.values()))
            grown += [((*seq, k), lp + s - norm, state) for k, s in scores.items()]
        beams = [
            (seq, lp, m.update(state[None], pool[seq[-1]][None])[0])
            for seq, lp, state in sorted(grown, key=lambda x: -x[1])[:W]
        ]
    return [x[0] for x in beams], [x[1] for x in beams]

def same_beams(plain, found):
    for (seqs, lp), s, l in zip(plain, *found):
        torch.testing.assert_close(l, torch.tensor(lp), atol=1e-3, rtol=1e-4)
        assert [tuple(x) for x in s.tolist()] == seqs or min(abs(x - y) for x, y in zip(lp, lp[1:])) < 1e-4, (
            s,
            seqs,
        )

# ---- staying near ---------------------------------------------------------------------------------------------------

def kl(m, ref, xb, limit, seed=0):
    "Mean KL of sequences of four, and its gradient"
    enc = m.encode(*xb)
    old = ref.encode(*xb)
    mask = torch.ones(xb[1].shape[:2], dtype=torch.bool)
    out = (
        kl_steps(
            lambda p: m.step_logp(enc, p),
            torch.no_grad()(lambda p: ref.step_logp(old, p)),
            mask,
            4,
            limit,
            rng("bench", seed),
        )
        .sum(-1)
        .mean()
    )
    m.zero_grad()
    out.backward()
    return out.item()

# ---- timing ---------------------------------------------------------------------------------------------------------

def rss(): return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def once(fn):
    "(seconds, MiB of resident memory beyond what was there at its highest, sampled every 2 ms, result)"
    gc.collect()
    try: ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError: pass
    stop = threading.Event()
    before = rss()
    top = [before]
    def watch():
        while not stop.wait(.002): top[0] = max(top[0], rss())
    w = threading.Thread(target=watch)
    w.start()
    t = time.perf_counter()
    out = fn()
    s = time.perf_counter() - t
    stop.set()
    w.join()
    return s, top[0] - before, out

def table(jobs, repeats, check=None):
    """Run jobs (name, share of the queries it does, queries, function) in turn, `repeats` times; ratios are
    against the first, round by round
    """
    runs = {name: [] for name, *_ in jobs}
    for _ in range(repeats):
        outs = []
        for name, n, fn in jobs:
            s, mib, out = once(fn)
            runs[name].append((1000 * s / n, mib))
            outs.append(out)
        if check: check(outs)
    base = [x for x, _ in runs[jobs[0][0]]]
    rows = []
    for name, xs in runs.items():
        ms = [x for x, _ in xs]
        ratio = [b / x for b, x in zip(base, ms)]
        rows.append(
            (
                name,
                statistics.median(ms),
                min(ms),
                max(ms),
                statistics.median(ratio),
                min(ratio),
                max(ratio),
                max(m for _, m in xs),
            )
        )
    cols = ["", "ms/query", "(fastest)", "(slowest)", "ratio", "(least)", "(most)", "MiB"]
    print(pd.DataFrame(rows, columns=cols).to_string(index=False, float_format="%.3g"), "\n")

def main(threads=1, repeats=3, Q=800, U=BIG):
    torch.set_num_threads(threads)
    data = world(Q, U)
    query, vecs, index, *_ = data
    print(
        f"{Q} queries x {N} sequences, S = {S}, D = {D}, H = {H}, 1 layer, {U:,} demonstrations; {threads}"
        " thread(s)\n"
    )
    same_gradients(data, min(8, Q))
    looped = min(40, Q)
    share = {B: statistics.fmean(len(i.unique())/i.numel() for i in index.split(B)) for B in (32, 128, Q)}
    print(
        "distinct demonstrations per candidate of a batch: "
        + ", ".join(f"{100*s:.0f} % of batches of {B}" for B, s in share.items())
    )
    def plain(f):
        m = policy()
        epoch(m, [lambda q=q: f(m, data, q) for q in range(looped)])
    jobs = [
        ("plain: a query at a time, candidates repeated per sequence", looped, lambda: plain(loss_repeated)),
        ("plainer: a sequence at a time", looped, lambda: plain(loss_plain)),
    ]
    for B, fold, shared in (
        (32, False, False),
        (128, False, False),
        (32, True, False),
        (128, True, False),
        (32, True, True),
        (128, True, True),
        (Q, True, True),
    ):
        name = (
            f"encoded once, B = {B}"
            + (", folded" if fold else "")
            + (", demonstrations shared" if shared else "")
        )
        def job(B=B, fold=fold, shared=shared):
            m = policy(fold)
            epoch(m, [lambda i=i: loss_batch(m, data, i, shared) for i in torch.randperm(Q).split(B)])
        jobs.append((name, Q, job))
    print("one RCE epoch, K = 64: forward, loss, backward, AdamW")
    table(jobs, repeats)
    m = policy().eval()
    f = frozen(m)
    f.fold = True
    with torch.no_grad():
        def naive(n):
            return [beam_plain(m, m.encode(query[q : q + 1], vecs[index[q]][None]), 0) for q in range(n)]
        def batched(m, B):
            return [
                torch.cat(x)
                for x in zip(
                    *(
                        m.beam(m.encode(query[i : i + B], vecs[index[i : i + B]]), S, W)
                        for i in range(0, Q, B)
                    )
                )
            ]
        looped = min(20, Q)
        jobs = [
            ("plain: a loop over candidates", looped, lambda: naive(looped)),
            ("batched, B = 128", Q, lambda: batched(m, 128)),
            ("batched, B = 128, folded", Q, lambda: batched(f, 128)),
            (
                "batched, demonstrations shared by all queries",
                Q,
                lambda: m.beam(m.encode(query, Shared(vecs, index)), S, W),
            ),
        ]
        print("beam-5 proposals, K = 64")
        table(jobs, repeats, lambda outs: [same_beams(outs[0], o) for o in outs[1:]])
        enc = m.encode(query[:2], vecs)
        jobs = [
            (
                "plain: a loop over candidates, encoded before",
                2,
                lambda: [beam_plain(m, enc, b) for b in range(2)],
            ),
            ("batched, one pool, with its encoding", Q, lambda: m.beam(m.encode(query, vecs), S, W)),
        ]
        print(f"beam-5 proposals, K = {U:,}: the whole split")
        table(jobs, repeats, lambda outs: same_beams(outs[0], outs[1]))
    i = torch.arange(min(32, Q))
    ref = policy()
    xb = query[i], vecs[index[i, :16]]
    with torch.no_grad(): ref.gains.copy_(torch.tensor([.5, 1.]))
    jobs = [
        (name, len(i), lambda n=n: kl(m, ref, xb, n))
        for name, n in (("all 3,360 prefixes", 3360), ("256 of them, drawn", 256), ("64 of them, drawn", 64))
    ]
    print(f"KL to a reference and its gradient, K = 16, S = 4, a batch of {len(i)}")
    table(jobs, repeats)
    true = kl(m, ref, xb, 3360)
    print(
        ", ".join(
            f"{n} drawn: {100*statistics.stdev(kl(m, ref, xb, n, s) for s in range(10))/true:.1f} %"
            for n in (256, 64)
        )
        + " of the KL is the spread of one estimate"
    )

if __name__ == "__main__": main(*map(int, sys.argv[1:]))
