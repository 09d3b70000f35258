"""Our own engine against a served model, side by side: the same prompts, model and machine, equal answers asserted.

`LEVERPLUS_SERVED=.served python bench/served.py [prompts] [repeats]` (`make served` sets the environment up)
prints prompts per second, texts alone and with all answers: medians, and ratios to the shared scorer of the
same run. The model is the tiny one: what is compared here is how much work an answer takes (requests, passes),
not how well an engine uses a card.
"""
import statistics, sys, tempfile, time
from pathlib import Path
import numpy as np, pandas as pd, torch
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/"tests")]
from engine import Engine, engine_python
from leverplus.lvlm import NaiveScorer, Targets, compare, load_lvlm
from leverplus.prompt import prompter
from leverplus.scorer import SharedScorer
from leverplus.served import ServedScorer
from leverplus.vqa import answer_targets
from leverplus.world import read_islands

def work(n, A=8, S=2, seed=0):
    "n prompts of S demonstrations, A answers each: the true ones first, then other items' answers"
    items = read_islands()
    g = np.random.default_rng(seed)
    make = prompter(items)
    train = items[items.split == "train"]
    ids = train.question_id.to_numpy()
    words = list(dict.fromkeys(train.answer))
    prompts = [make(q, g.choice(ids[ids != q], S, replace=False)) for q in g.choice(ids, n, replace=False)]
    texts = [
        list(dict.fromkeys([*answer_targets(items.answers[p.question_id])[0], *g.permutation(words)]))[:A]
        for p in prompts
    ]
    return prompts, [Targets(tuple(t), (1.,)*len(t)) for t in texts]

def seconds(make, prompts, targets):
    "(seconds, what was said, the scorer) of a fresh scorer"
    scorer = make()
    start = time.perf_counter()
    said = scorer.run(prompts, targets)
    return time.perf_counter() - start, said, scorer

def table(url, prompts, targets, repeats):
    lvlm = load_lvlm(device="cpu")
    outline = load_lvlm(weights=False)
    def served(**kw): return lambda: ServedScorer(url, lvlm=outline, dtype="float32", **kw)
    def shared_warm():
        scorer = SharedScorer(lvlm)
        scorer.run(prompts, targets)
        return scorer
    ways = {
        "naive, batches of 16": lambda: NaiveScorer(lvlm),
        "shared, cold": lambda: SharedScorer(lvlm),
        "shared, images known": shared_warm,
        "served, by steps": served(way="steps"),
        "served, by steps, one request at once": served(way="steps", at_once=1),
        "served, by prompt_logprobs": served(way="prompt"),
    }
    rows = []
    for what, asked in dict(texts=None, answers=targets).items():
        times = {name: [] for name in ways}
        first = None
        for _ in range(repeats):
            for name, make in ways.items():
                t, said, scorer = seconds(make, prompts, asked)
                first = first or said
                found = compare(first, said)
                assert (found["failed"], found["text"]) == (0, 0) and found["logprob"] < 1e-2, (name, found)
                requests = scorer.stats.requests if isinstance(scorer, ServedScorer) else None
                times[name].append(t)
                rows.append(dict(what=what, way=name, requests=requests, seconds=t))
    frame = pd.DataFrame(rows).groupby(["what", "way"], sort=False).median()
    frame["prompts/s"] = len(prompts)/frame.seconds
    frame["requests/prompt"] = frame.requests/len(prompts)
    base = frame["prompts/s"].xs("shared, images known", level="way")
    frame["x shared"] = frame["prompts/s"]/base.reindex(frame.index.get_level_values("what")).to_numpy()
    return frame[["prompts/s", "x shared", "requests/prompt"]]

def main(n=200, repeats=3):
    if engine_python() is None:
        print("nothing measured: no environment that serves (`make served`)")
        return
    torch.set_num_threads(2)
    prompts, targets = work(int(n))
    with tempfile.TemporaryDirectory() as folder, Engine(Path(folder)/"log", threads=2) as engine:
        frame = table(engine.url, prompts, targets, int(repeats))
    said = frame.to_string(float_format=lambda x: f"{x:.2f}", na_rep="")
    what = f"{n} prompts, two demonstrations, eight answers; medians of {repeats}; vLLM on the CPU, two threads each"
    print(f"{what}\n\n{said}")

if __name__ == "__main__": main(*sys.argv[1:])
