"""Is a selector that may show nothing better than always showing something, and than never? The spoilt islands.

`python bench/spoilt.py OUT [--seeds 0 1 2 3 4]` trains four selectors on the same stored groups (sequences of
0, 1 and 2 demonstrations; a selector that must show S of them learns from the rows that do) and asks the
reader about what they pick on dev and on test. OUT/groups keeps the groups and OUT/facts all answers, so a
run that was stopped goes on. The answers are written to `data/spoilt/picks.parquet`; `--table` prints the
table of page `93_spoilt` from there.

Objective, epochs and rate are those of the recipe `listwise`, for every row; nothing was chosen on test.
"""
import argparse
from pathlib import Path
import pandas as pd, torch
from leverplus.core import atomic_path, repo_path
from leverplus.dls import group_dls
from leverplus.infer import pick_model, pick_random, pick_similar, pick_zero
from leverplus.learner import MODEL, selector_learner
from leverplus.rldata_ask import FactCache, ask
from leverplus.rldata_generate import generate
from leverplus.rldata_merge import by_shots
from leverplus.settings import Guarding, Proposing
from leverplus.spoilt import SPOILT_PICKS, free_count_table, spoilt_world

COUNTS = dict(temperature={1.: 6}, random=6)
# row: (shots of the rows that it learns from, shots that it picks, settings of the model)
# None shots: as many as it likes
SELECTORS = {
    "always one": ((1,), 1, dict(max_shots=1)),
    "always two": ((2,), 2, dict(max_shots=2)),
    "one or two": ((1, 2), None, dict(max_shots=2, stop=True, min_shots=1)),
    "free": ((0, 1, 2), None, dict(max_shots=2, stop=True, min_shots=0)),
}

def stored_groups(world, out, split, seed, cache):
    "Groups of a split, the same for all selectors of a seed"
    proposing = Proposing(shots=(0, 1, 2), counts=COUNTS, seed=seed)
    pool = world.pools[split]
    return generate(
        out/"groups"/f"{split}-{seed}", list(pool), world.items, pool, world.scorer,
        world.store, proposing=proposing, guarding=Guarding(test=0), cache=cache, progress=False,
    )

def trained(world, groups, name, seed):
    "A selector, trained listwise on the rows that it can choose"
    shots, _, model = SELECTORS[name]
    train = by_shots(groups["train"], shots)
    dev = by_shots(groups["dev"], shots)
    dls = group_dls(train, dev, world.store, "soft_only", "mixed", bs=64, seed=seed, device="cpu")
    learn = selector_learner(dls, seed=seed, **(MODEL | model))
    with learn.no_bar(), learn.no_logging(): learn.fit_listwise(20, 3e-3, temp=.2)
    return learn.model

def judged(world, picks, split, cache):
    "What came of picks: a row per question"
    facts = ask(picks[["question_id", "pointer"]], world.scorer, world.items, cache)
    return pd.DataFrame(dict(
        selector=picks.selector.to_numpy(),
        seed=picks.draw.to_numpy(),
        split=split,
        question_id=picks.question_id.to_numpy(),
        image_id=world.items.image_id.loc[picks.question_id].to_numpy(),
        shown=picks.pointer.map(len).to_numpy(),
        acc=facts.vqa_acc_score.to_numpy(),
    ))

def baselines(world, split, seeds):
    "Picks of what learns nothing"
    pool = world.pools[split]
    picks = [pick_zero(pool)]
    for S in (1, 2):
        for seed in seeds:
            drawn = pick_random(pool, S, 1, seed)
            picks.append(drawn.assign(draw=seed, selector=f"random, {S}"))
        picks.append(pick_similar(pool, world.store, S, "mixed").assign(selector=f"similar, {S}"))
    return pd.concat(picks, ignore_index=True)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--seeds", type=int, nargs="+", default=range(5))
    p.add_argument("--table", action="store_true", help="print the table of what is stored, and do no more")
    args = p.parse_args()
    if args.table:
        print(free_count_table(pd.read_parquet(repo_path(SPOILT_PICKS))).round(3).to_string())
        return
    torch.set_num_threads(1)
    world = spoilt_world(device="cpu")
    cache = FactCache(args.out/"facts")
    rows = [judged(world, baselines(world, split, args.seeds), split, cache) for split in ("dev", "test")]
    for seed in args.seeds:
        groups = {split: stored_groups(world, args.out, split, seed, cache) for split in ("train", "dev")}
        for name in SELECTORS:
            model = trained(world, groups, name, seed)
            for split in ("dev", "test"):
                pool = world.pools[split]
                S = SELECTORS[name][1]
                picks = pick_model(model, pool, world.store, S, name=name, draw=seed, other_pool=True)
                rows.append(judged(world, picks, split, cache))
                here = rows[-1]
                shown = here.shown.value_counts().to_dict()
                print(seed, name, split, f"{here.acc.mean():.3f}", shown, flush=True)
    every = pd.concat(rows, ignore_index=True)
    with atomic_path(repo_path(SPOILT_PICKS)) as tmp: every.to_parquet(tmp, index=False)

if __name__ == "__main__": main()
