"""Scoring on the embedded model: the reference against the shared scorer, side by side, equal answers asserted.

`python bench/scoring.py [prompts] [repeats]` prints three tables: speed (medians; ratios compare rows of
this run), FLOPs against the least there is to do, and where the remaining time goes.
"""
import dataclasses, statistics, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np, pandas as pd, torch
from PIL import Image
from leverplus.cost import count_flops, text_flops, vision_flops
from leverplus.lvlm import NaiveScorer, Targets, compare, load_lvlm
from leverplus.scorer import SharedScorer
from leverplus.prompt import prompter
from leverplus.rldata_generate import generate
from leverplus.settings import Guarding
from leverplus.vqa import answer_targets
from leverplus.world import read_islands, world

def work(n, A=8, S=2, seed=0, pool=64):
    "n prompts with S demonstrations out of one pool, A answers each: the true ones first, then other items' answers"
    items = read_islands()
    g = np.random.default_rng(seed)
    make = prompter(items)
    train = items[items.split == "train"]
    test = items[items.split == "test"]
    words = list(dict.fromkeys(train.answer))
    pool = g.choice(train.question_id.to_numpy(), pool, replace=False)
    prompts = [
        make(q, g.choice(pool, S, replace=False))
        for q in g.choice(test.question_id.to_numpy(), n, replace=False)
    ]
    texts = [
        list(dict.fromkeys([*answer_targets(items.answers[p.question_id])[0], *g.permutation(words)]))[:A]
        for p in prompts
    ]
    return prompts, [Targets(tuple(t), (1.,)*len(t)) for t in texts]

def ways(lvlm, prompts, targets):
    "name -> (maker of a scorer, does it start warm?)"
    def warm(**kw):
        s = SharedScorer(lvlm, **kw)
        s.run(prompts, targets)
        return lambda: s
    return {
        "naive, one prompt at a time": lambda: NaiveScorer(lvlm, batch_size=1),
        "naive, batches of 16": lambda: NaiveScorer(lvlm),
        "naive, batches of 64": lambda: NaiveScorer(lvlm, batch_size=64),
        "shared, cold": lambda: SharedScorer(lvlm),
        "shared, images known": warm(),
        "query, images known": warm(prefix_cache="query"),
        "global, cold": lambda: SharedScorer(lvlm, prefix_cache="global"),
        "global, warm": warm(prefix_cache="global"),
        "global, two demonstrations, warm": warm(prefix_cache="global", prefix_depth=2),
    }

def speed(lvlm, prompts, targets, repeats):
    times = {}
    said = {}
    made = ways(lvlm, prompts, targets)
    for _ in range(repeats):
        for k, new in made.items():
            scorer = new()
            t = time.perf_counter()
            out = scorer.run(prompts, targets)
            times.setdefault(k, []).append(time.perf_counter() - t)
            said.setdefault(k, out)
    ref = said["naive, one prompt at a time"]
    med = {k: statistics.median(t) for k, t in times.items()}
    for k, out in said.items():
        c = compare(out, ref)
        assert not c["failed"] and not c["text"] and c["logprob"] < 1e-3, (k, c)
    one = med["naive, one prompt at a time"]
    batched = min(t for k, t in med.items() if k.startswith("naive, batches"))
    rows = [
        (k, len(prompts) / med[k], one / med[k], batched / med[k], one / max(t), one / min(t))
        for k, t in times.items()
    ]
    return pd.DataFrame(
        rows, columns=["scorer", "prompts/s", "x one at a time", "x batched", "slowest x", "fastest x"]
    )

def groups(lvlm, repeats, queries=6):
    "Seconds to generate the demo's groups for some queries, files and all"
    world = world("islands")
    times = {}
    rows = {}
    for _ in range(repeats):
        for k, new in {
            "naive, one prompt at a time": lambda: NaiveScorer(lvlm, batch_size=1),
            "naive, batches of 16": lambda: NaiveScorer(lvlm),
            "shared": lambda: world("islands").scorer,
        }.items():
            with tempfile.TemporaryDirectory() as d:
                scorer = new()
                t = time.perf_counter()
                out = generate(
                    Path(d) / "run",
                    world.ids("train")[:queries],
                    world.items,
                    world.pools["train"],
                    scorer,
                    world.store,
                    guarding=Guarding(test=0),
                    progress=False,
                )
                times.setdefault(k, []).append(time.perf_counter() - t)
                rows[k] = out.rows
    assert all(
        (r.vqa_gt_prob - rows["shared"].vqa_gt_prob).abs().max() < 1e-4
        and (r.vqa_raw_generation == rows["shared"].vqa_raw_generation).all()
        for r in rows.values()
    )
    med = {k: statistics.median(t) for k, t in times.items()}
    one = med["naive, one prompt at a time"]
    return pd.DataFrame(
        [(k, len(rows[k]) / t, one / t, med["naive, batches of 16"] / t) for k, t in med.items()],
        columns=["groups of the demo", "rows/s", "x one at a time", "x batched"],
    )

def large(n=6, side=476):
    """A copy of the embedded model that takes images of 289 visual tokens, and n prompts of three of them,
    eight answers each
    """
    lvlm = load_lvlm()
    d = Path(tempfile.mkdtemp())
    g = np.random.default_rng(0)
    big = {}
    prompts, targets = work(n, seed=1)
    lvlm.image_processor.size = dict(shortest_edge=56 * 56, longest_edge=side * side)
    for p in prompts:
        for im in p.images:
            if im not in big:
                big[im] = str(d / f"{len(big)}.png")
                Image.fromarray(g.integers(256, size=(side, side, 3), dtype=np.uint8)).save(big[im])
    new = lambda x: dataclasses.replace(x, image=big[x.image])
    return lvlm, [dataclasses.replace(new(p), demos=tuple(map(new, p.demos))) for p in prompts], targets

def floor(scorer, prompts, targets):
    """FLOPs of encoding every distinct image once and running every prompt once, nothing else; attention
    counted whole, as torch's counter does
    """
    cfg = scorer.lvlm.model.config
    f = scorer.vision([im for p in prompts for im in p.images])
    return sum(
        vision_flops(cfg, 4 * t * h * w) for t, h, w in {k: g for _, g, k in f.values()}.values()
    ), sum(text_flops(cfg, len(scorer._row(p, t, f).ids), causal=False) for p, t in zip(prompts, targets))

def flops(cases):
    rows = []
    for name, lvlm, prompts, targets in cases:
        vision, prefill = floor(SharedScorer(lvlm), prompts, targets)
        n = len(prompts)
        naive = NaiveScorer(lvlm, batch_size=1)
        for k, kw, warm in (
            ("shared, cold", {}, False),
            ("shared, images known", {}, True),
            ("query, cold", dict(prefix_cache="query"), False),
            ("global, warm", dict(prefix_cache="global"), True),
        ):
            s = SharedScorer(lvlm, **kw)
            if warm: s.run(prompts, targets)
            f = count_flops(lambda: s.run(prompts, targets))
            least = prefill + (0 if warm else vision)
            st = s.stats
            rows.append((name, k, f/n/1e6, f/least, st.padded/st.ran - 1, st.padded_nodes/st.nodes - 1))
        # the reference is dear: three prompts stand for all
        f = count_flops(lambda: naive.run(prompts[:3], targets[:3])) / 3
        rows.append((name, "naive", f/1e6, f*n/(prefill + vision), 0., 0.))
    return pd.DataFrame(
        rows, columns=["prompts", "scorer", "MFLOP/prompt", "of the least", "prompt padding", "node padding"]
    )

def peak(way, n):
    "Most memory of a process that scores n prompts one way, beyond what it has with the model loaded: MB"
    out = subprocess.run(
        [sys.executable, __file__, "--peak", way, str(n)], capture_output=True, text=True, check=True
    ).stdout
    return float(out.split()[-1])

def peak_main(way, n):
    prompts, targets = work(n)
    lvlm = load_lvlm()
    status = lambda key: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key))
    new = {
        "naive, batches of 16": lambda: NaiveScorer(lvlm),
        "shared": lambda: SharedScorer(lvlm),
        "global": lambda: SharedScorer(lvlm, prefix_cache="global"),
    }[way]
    # Linux: forget the peak so far
    new().run(prompts[:1], targets[:1])
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS:")
    new().run(prompts, targets)
    print((status("VmHWM:") - before) / 1e3)

def main(n=96, repeats=3):
    lvlm = load_lvlm()
    prompts, targets = work(n)
    show = lambda f, d=1: print(f.round(d).to_string(index=False), "\n")
    print(
        f"{n} prompts, 2 demonstrations out of a pool of 64, 8 answers, greedy text;"
        f" {torch.get_num_threads()} threads; median of {repeats}"
    )
    show(speed(lvlm, prompts, targets, repeats))
    show(groups(lvlm, repeats))
    print("FLOPs by torch's counter against the least there is to do: every image once, every prompt once")
    show(flops([("embedded", lvlm, prompts, targets), ("3 images of 289 tokens", *large())]), 2)
    print("Memory beyond the loaded model (MB), each in a process of its own")
    show(
        pd.DataFrame(
            [(w, peak(w, n)) for w in ("naive, batches of 16", "shared", "global")], columns=["scorer", "MB"]
        )
    )
    s = SharedScorer(lvlm)
    s.run(prompts, targets)
    s.stats.seconds.clear()
    for _ in range(repeats): s.run(prompts, targets)
    total = sum(s.stats.seconds.values())
    print("Where the time goes, images known (%)")
    show(pd.DataFrame([{k: 100 * t / total for k, t in s.stats.seconds.items()}]), 0)

if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]: peak_main(sys.argv[2], int(sys.argv[3]))
    else: main(*map(int, sys.argv[1:]))
