"""Prompts per second: the reference scorer against the shared one, side by side on the embedded model, equal answers asserted.

`python bench/scoring.py [prompts] [repeats]` prints a table of medians; ratios compare rows of one run.
"""
import statistics, sys, time
import numpy as np, pandas as pd, torch
from leverplus.lvlm import NaiveScorer, SharedScorer, Targets, load_lvlm
from leverplus.prompt import prompter
from leverplus.vqa import answer_targets
from leverplus.world import read_islands

def work(n, A=8, S=2, seed=0):
    "n prompts with S demonstrations, A answers each: the true ones first, then other items' answers"
    items, g = read_islands(), np.random.default_rng(seed)
    make, train, test = prompter(items), items[items.split == "train"], items[items.split == "test"]
    words = list(dict.fromkeys(train.answer))
    prompts = [make(q, g.choice(train.question_id.to_numpy(), S, replace=False)) for q in g.choice(test.question_id.to_numpy(), n, replace=False)]
    texts = [list(dict.fromkeys([*answer_targets(items.answers[p.question_id])[0], *g.permutation(words)]))[:A] for p in prompts]
    return prompts, [Targets(tuple(t), (1.,)*len(t)) for t in texts]

def main(n=48, repeats=3):
    lvlm = load_lvlm(); prompts, targets = work(n)
    ways = {"naive, one prompt at a time": lambda: NaiveScorer(lvlm, batch_size=1), "naive, batches of 16": lambda: NaiveScorer(lvlm),
            "shared, cold": lambda: SharedScorer(lvlm), "shared, images known": None}
    warm = SharedScorer(lvlm); warm.run(prompts, targets); ways["shared, images known"] = lambda: warm
    times, said = {k: [] for k in ways}, {}
    for _ in range(repeats):
        for k, new in ways.items():
            scorer, t = new(), time.perf_counter(); out = scorer.run(prompts, targets); times[k].append(time.perf_counter() - t)
            said.setdefault(k, out)
    ref = said["naive, one prompt at a time"]
    for k, out in said.items():
        assert [s.text for s in out] == [s.text for s in ref], k
        assert max(abs(a - b) for s, r in zip(out, ref) for a, b in zip(s.logprobs, r.logprobs)) < 1e-3, k
    base = statistics.median(times["naive, one prompt at a time"])
    rows = [(k, n/statistics.median(t), base/statistics.median(t), base/max(t), base/min(t)) for k, t in times.items()]
    print(f"{n} prompts, 2 demonstrations, 8 answers, greedy text; {torch.get_num_threads()} threads; median of {repeats}")
    print(pd.DataFrame(rows, columns=["scorer", "prompts/s", "ratio", "ratio (slowest)", "ratio (fastest)"]).round(1).to_string(index=False))

if __name__ == "__main__": main(*map(int, sys.argv[1:]))
