"""Proposals: all queries of a batch at once, against a loop over candidates, in one process.

`python bench/proposals.py [queries] [queries of the loop] [repeats] [threads]` prints queries per second
and ratios (medians; beside them the least and the most that the repeats allow) for the default
counts (beam 5, temperatures 1.0 and 1.3 two each, random 1, retrieval 5), pools of 64, two shots, D = 512.
Beam and retrieval are decided by arithmetic alone, and both sides must propose the same; the rest is drawn,
and both sides must draw as many different sequences.
"""
import math, random, statistics, sys, time
import numpy as np, pandas as pd, torch
from leverplus.embed import EmbedStore
from leverplus.pools import Pool
from leverplus.rldata_propose import propose
from leverplus.selector import PointerSelector
from leverplus.settings import COUNTS

def world(n, K=64, D=512, demos=4000, seed=0):
    "Pool and store of `n` queries over `demos` demonstrations"
    g = np.random.default_rng(seed)
    x = torch.from_numpy(g.normal(size=(n + demos, D // 2))).float()
    y = torch.from_numpy(g.normal(size=(n + demos, D // 2))).float()
    pool = Pool({i: n + np.sort(g.choice(demos, K, replace=False)) for i in range(n)})
    return pool, EmbedStore(range(n + demos), x, y)

def _next(cos, prefix, scale, temp):
    "Probability of each candidate behind `prefix`, one candidate after the other"
    e = {k: math.exp(scale * c / temp) for k, c in enumerate(cos) if k not in prefix}
    z = sum(e.values())
    return {k: v/z for k, v in e.items()}

def loop(pool, store, queries, S=2, scale=10., seed=0):
    "The same proposals, the plain way: query by query, candidate by candidate"
    rows = []
    r = random.Random(seed)
    for q in queries:
        v = store.get(q, "mixed").tolist()
        cos = [sum(a * b for a, b in zip(v, store.get(c, "mixed").tolist())) for c in pool[q]]
        K = len(cos)
        had = set()
        def add(seq, method, T=math.nan):
            if seq in had: return False
            had.add(seq)
            rows.append((q, tuple(pool[q][k] for k in seq), method, T))
            return True
        beams = [((), 0.)]
        for _ in range(S):
            grown = [
                (s + (k,), lp + math.log(p)) for s, lp in beams for k, p in _next(cos, s, scale, 1.0).items()
            ]
            beams = sorted(grown, key=lambda x: -x[1])[:COUNTS["beam"]]
        for s, _ in beams: add(s, "beam")
        sets = sorted(
            ((cos[i] + cos[j], (j, i) if cos[i] >= cos[j] else (i, j)) for i in range(K) for j in range(i)),
            key=lambda x: -x[0],
        )
        found = 0
        for _, s in sets:
            found += add(s, "retrieval")
            if found == COUNTS["retrieval"]: break
        def draw(n, method, scale, T):
            found = 0
            while found < n:
                s = ()
                for _ in range(S):
                    p = _next(cos, s, scale, T)
                    s += tuple(r.choices(list(p), list(p.values())))
                found += add(s, method, T)
        for T, n in COUNTS["temperature"].items(): draw(n, "sample", scale, T)
        draw(COUNTS["random"], "random", 0., 1.)
    return pd.DataFrame(rows, columns=["question_id", "pointer", "gen_method", "temperature"])

def single(pool, store, queries, policy=None):
    return propose(pool, store, queries, policy=policy, batch_size=1)
def batched(pool, store, queries, policy=None): return propose(pool, store, queries, policy=policy)

def timed(fn, queries, repeats):
    "(seconds per query of each repeat, last result)"
    times = []
    for _ in range(repeats):
        t = time.perf_counter()
        out = fn(queries)
        times.append((time.perf_counter() - t) / len(queries))
    return times, out

def same(a, b, methods):
    "Assert that two frames propose the same sequences by `methods`"
    pick = lambda f: {
        q: list(zip(g.gen_method, g.pointer)) for q, g in f[f.gen_method.isin(methods)].groupby("question_id")
    }
    x = pick(a)
    y = pick(b)
    assert x == y, next((q, x[q], y.get(q)) for q in x if x[q] != y.get(q))

def main(n=800, looped=20, repeats=3, threads=1):
    torch.set_num_threads(threads)
    pool, store = world(n)
    queries = list(range(n))
    part = list(range(looped))
    model = PointerSelector(512, 256).eval()
    rows = []
    for name, policy in (("similarity prior", None), ("selector, H = 256", model)):
        jobs = {} if policy else {"plain: a loop over candidates": (lambda qs: loop(pool, store, qs), part)}
        jobs |= {
            "one query at a time": (lambda qs, p=policy: single(pool, store, qs, p), queries[:100]),
            "batches of 256": (lambda qs, p=policy: batched(pool, store, qs, p), queries),
        }
        done = {k: timed(f, qs, repeats) for k, (f, qs) in jobs.items()}
        base = next(iter(done.values()))[0]
        full = done["batches of 256"][1]
        same(
            done["one query at a time"][1],
            full[full.question_id < 100],
            ["beam", "retrieval", "sample", "random"],
        )
        if not policy:
            plain = done["plain: a loop over candidates"][1]
            mine = full[full.question_id < looped]
            same(plain, mine, ["beam", "retrieval"])
            assert (
                plain.groupby(["question_id", "gen_method"])
                .size()
                .equals(mine.groupby(["question_id", "gen_method"]).size().rename(None))
            )
        rows += [
            (
                name,
                k,
                1 / statistics.median(t),
                statistics.median(base) / statistics.median(t),
                min(base) / max(t),
                max(base) / min(t),
            )
            for k, (t, _) in done.items()
        ]
    print(
        f"{n} queries, pools of 64, S = 2, D = 512,"
        f" {sum(COUNTS['temperature'].values()) + COUNTS['beam'] + COUNTS['random'] + COUNTS['retrieval']}"
        f" proposals each; {threads} thread(s)"
    )
    print(
        pd.DataFrame(rows, columns=["policy", "", "queries/s", "ratio", "(least)", "(most)"]).to_string(
            index=False, float_format="%.3g"
        )
    )

if __name__ == "__main__": main(*map(int, sys.argv[1:]))
