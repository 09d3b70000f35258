"""Health check and rewards on a million rows, side by side with a plain per-row loop on fewer; parquet on the way.

`python bench/health.py [rows] [rows of the loop] [repeats]` prints three tables: seconds and memory beyond
the data on all rows (medians), the loop against the columns on the same fewer rows (equal numbers asserted,
ratio of medians), and what saving and loading take. Rows of 30 per query, two shots, pools of 64.
"""
import ctypes, math, os, statistics, sys, tempfile, threading, time
from pathlib import Path
import numpy as np, pandas as pd
from leverplus.groups import RLData
from leverplus.pools import Pool
from leverplus.rewards import REWARDS, reward, z_score
from leverplus.rldata_check import health

def world(n, group=30, K=64, seed=0):
    """n rows of facts like those of a real run: 30 per query, accuracies {0, .6, 1}, probabilities that know
    something, 1 % failed
    """
    g = np.random.default_rng(seed)
    q = np.arange(n) // group
    code = np.tile(g.permutation(K * (K - 1))[:group], -(-n // group))[:n]
    a, b = code // (K - 1), code % (K - 1)
    b += b >= a
    ids = 10**6 + np.arange(K)
    failed = g.uniform(size=n) < 0.01
    ok = lambda x: np.where(failed, np.nan, x)
    base = g.beta(0.5, 1.0, size=q[-1] + 1)[q]
    acc = ok(np.where(g.uniform(size=n) < base, g.choice([0.6, 1.0], n), 0.0))
    p = ok(np.clip(0.6 * (acc > 0) + 0.4 * g.beta(1, 3, size=n), 0, 1))
    kind = (np.arange(n) % group) * 5 // group
    text = np.array([f"answer {i}" for i in range(5000)], dtype=object)[g.integers(0, 5000, n)]
    text[failed] = None
    rows = pd.DataFrame(
        dict(
            question_id=q,
            pointer=list(zip(ids[a].tolist(), ids[b].tolist())),
            gen_method=np.array(["beam", "retrieval", "sample", "sample", "random"], dtype=object)[kind],
            beam_rank=np.where(kind == 0, np.arange(n) % group, np.nan),
            temperature=np.select([kind == 2, kind == 3], [1.0, 1.3], np.nan),
            logprob_score=np.where(kind == 1, np.nan, -g.exponential(5, n)),
            similarity_score=g.uniform(size=n),
            vqa_pred_answer=text,
            vqa_raw_generation=text,
            vqa_correct=ok((acc > 0) * 1.0),
            vqa_acc_score=acc,
            vqa_gt_prob=p,
            vqa_rel_token_f1=acc,
            vqa_rel_edit_sim=acc,
            vqa_rel_score=acc,
            vqa_eval_mode=np.where(failed, None, "official"),
            eval_failed=failed,
            error=np.where(failed, "OSError: image truncated", None),
            scorer="bench",
        )
    )
    rows["vqa_gt_logprobs"] = [None if f else (-1., -2.) for f in failed]
    return RLData(rows, Pool({i: ids for i in range(q[-1] + 1)}))

def loop(data):
    "What `health` counts, the plain way: one row after the other, one query after the other"
    groups, sources = {}, {}
    for r in data.rows.itertuples():
        groups.setdefault(r.question_id, []).append(r)
        name = r.gen_method if math.isnan(r.temperature) else f"{r.gen_method} T={r.temperature:g}"
        s = sources.setdefault(name, [0, 0])
        if not r.eval_failed:
            s[0] += 1
            s[1] += r.vqa_correct > 0
    zero = []
    live = []
    std = []
    oracle = []
    pick = []
    nll = []
    acc = []
    p = []
    for q, rows in groups.items():
        good = [r for r in rows if not r.eval_failed]
        K = len(data.pool[q])
        nll.append(
            statistics.fmean(math.log(math.factorial(K) // math.factorial(K - len(r.pointer))) for r in rows)
        )
        if not good: continue
        rew = [r.vqa_correct + r.vqa_acc_score for r in good]
        zero.append(not any(r.vqa_correct > 0 for r in good))
        live.append(max(rew) - min(rew) > 1e-6)
        s = statistics.stdev(rew) if len(rew) > 1 else 0.0
        std.append(s / max(s, 0.1) if live[-1] else 0.0)
        oracle.append(max(r.vqa_acc_score for r in good))
        pick += [r.vqa_acc_score for r in rows if r.beam_rank == 0 and not r.eval_failed]
        acc += [r.vqa_acc_score for r in good]
        p += [r.vqa_gt_prob for r in good]
    return dict(
        pct_zero_positive_query=100 * statistics.fmean(zero),
        live_groups=sum(live),
        adv_std=statistics.fmean(std),
        oracle_in_data=statistics.fmean(oracle),
        model_pick=statistics.fmean(pick),
        uniform_nll=statistics.fmean(nll),
        spearman=rank_correlation(acc, p),
    ), {k: v[1] / v[0] for k, v in sources.items()}

def rank_correlation(x, y):
    "Spearman, the plain way"
    def ranks(v):
        order = sorted(range(len(v)), key=v.__getitem__)
        out = [0.]*len(v)
        i = 0
        while i < len(v):
            j = i
            while j + 1 < len(v) and v[order[j+1]] == v[order[i]]: j += 1
            for k in order[i:j+1]: out[k] = (i + j) / 2
            i = j + 1
        return out
    return statistics.correlation(ranks(x), ranks(y))

def rewards_loop(data, mode):
    "Rewards, the plain way"
    one = (
        (lambda r: 2 * r.vqa_correct + r.vqa_gt_prob)
        if mode == "hard01_plus_gtprob"
        else (lambda r: r.vqa_correct + r.vqa_acc_score)
    )
    return np.array([math.nan if r.eval_failed else one(r) for r in data.rows.itertuples()])

def rss(): return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def tidy():
    "Hand freed memory back, so that what a job takes can be seen (glibc; elsewhere the figure may be too small)"
    try: ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError: pass

def timed(fn, repeats):
    "(median seconds, fastest, slowest, MiB of peak memory beyond what was there, result)"
    times, peak = [], 0.
    for k in range(repeats):
        tidy()
        stop = threading.Event()
        before = rss()
        top = [before]
        def watch():
            while not stop.wait(.005): top[0] = max(top[0], rss())
        w = threading.Thread(target=watch)
        w.start()
        t = time.perf_counter()
        out = fn()
        times.append(time.perf_counter() - t)
        stop.set()
        w.join()
        peak = max(peak, top[0] - before)
        if k < repeats - 1: del out
    return statistics.median(times), min(times), max(times), peak, out

def main(n=1_000_000, small_n=60_000, repeats=5):
    data = world(n)
    small = world(small_n)
    show = lambda rows, cols: print(
        pd.DataFrame(rows, columns=cols).to_string(index=False, float_format="%.3g"), "\n"
    )
    jobs = {
        "health, hard_plus_soft": lambda: health(data),
        "health, hard01_plus_gtprob": lambda: health(data, "hard01_plus_gtprob"),
        **{f"reward, {m}": lambda m=m: reward(data.rows, m) for m in REWARDS if m not in ("hybrid",)},
    }
    r = reward(data.rows)
    jobs["z_score of rewards"] = lambda: z_score(r, data.rows.question_id)
    cols = ["s (median)", "(fastest)", "(slowest)", "MiB beyond the data"]
    print(f"{n:,} rows, {len(data.queries):,} queries")
    show([(k, *timed(f, repeats)[:4]) for k, f in jobs.items()], ["", *cols])
    rows = []
    plain, by_source = loop(small)
    fast = health(small)
    for k, v in plain.items():
        assert abs(fast.frame.at["data", k] - v) < 1e-9, (k, v, fast.frame.at["data", k])
    assert all(abs(fast.sources.set_index("source").rate[k] - v) < 1e-12 for k, v in by_source.items())
    for name, slow, quick in (
        ("health", lambda: loop(small), lambda: health(small)),
        *(
            (f"reward, {m}", (lambda m=m: rewards_loop(small, m)), (lambda m=m: reward(small.rows, m)))
            for m in ("hard_plus_soft", "hard01_plus_gtprob")
        ),
    ):
        a = timed(slow, repeats)
        b = timed(quick, repeats)
        if name != "health": np.testing.assert_allclose(a[4], b[4])
        rows.append((name, a[0], b[0], a[0]/b[0], a[1]/b[2], a[2]/b[1]))
    print(f"{small_n:,} rows, the loop against the columns")
    show(rows, ["", "loop, s", "columns, s", "ratio", "(least)", "(most)"])
    with tempfile.TemporaryDirectory() as d:
        path = data.save(Path(d) / "data")
        size = sum(f.stat().st_size for f in path.rglob("*.parquet")) / 2**20
        print(f"parquet, {size:.0f} MiB")
        show(
            [
                (k, *timed(f, repeats)[:4])
                for k, f in {
                    "load": lambda: RLData.load(path, check=False),
                    "load and validate": lambda: RLData.load(path),
                    "save": lambda: data.save(path),
                }.items()
            ],
            ["", *cols],
        )

if __name__ == "__main__": main(*map(int, sys.argv[1:]))
