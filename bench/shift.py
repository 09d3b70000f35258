"""Does a lead hold beyond where it was learned, and what is it made of? Larger pools, another reader, controls.

`python bench/shift.py OUT --world islands [--parts pools transfer controls] [--seeds 0 1 2]`, or
`--world blind_okvqa --root DIR` with the parts `order`, `controls` and `pools`, trains selectors on stored groups and
asks about what they pick. The answers go into small files beside the world's other results: `shift.parquet` (pools),
`transfer.parquet`, `controls.parquet` and `order.parquet`; `formats.json` says how far float32 and bfloat16 agree.
`tutorials/07_beyond` shows them as tables. OUT keeps groups, answers and what was trained, so a run that was stopped
goes on; files keep the rows of other selectors.

Islands: 600 training questions with random pools of 16, six pairs of the similarity prior and six random ones each,
and as many of 100 dev questions, by which epochs are chosen; 200 test questions are asked about. `transfer` trains on
300 of these questions, on the answers of either reader.

Blind OKVQA: the stored pairs of 1,140 training questions, a tenth of which choose epochs; nothing is asked for
them. `order` takes what is stored of all dev questions. For the rest SmolLM2 (the extra `smol`) is asked about the
first `--questions` dev questions, in float32, which takes a second or two a prompt on two cores.

Most selectors are the default model, trained listwise on accuracy (20 epochs, 3e-3, temp .2), after a warm-up (15
epochs, 64 sequences a query) where its name says so. `ours` is the default recipe; in `ours, pools of 64` it learns
from the same stored sequences, but sees them in the pools of 64 that it is meant for. Nothing here was tuned.
"""
import argparse
from dataclasses import replace
from pathlib import Path
import pandas as pd, torch
from leverplus.controls import CONTROLS, ask_controls, ask_shift, copied
from leverplus.core import atomic_path, repo_path, write_json
from leverplus.dls import group_dls
from leverplus.evaluate import score_picks
from leverplus.groups import RLData
from leverplus.infer import pick_model, pick_random, pick_similar
from leverplus.learner import selector_learner
from leverplus.pools import Pool, make_pool
from leverplus.recipes import recipe_learner
from leverplus.rldata_ask import FactCache, ask
from leverplus.rldata_generate import generate
from leverplus.rldata_merge import split
from leverplus.settings import Guarding, Proposing
from leverplus.world import world

S = 2
SIZES = (16, 64, 256, "all")
# row: pool size of its warm-up; None: no warm-up
SELECTORS = {"listwise": None, "warm-up, listwise": 16, "warm-up of 64, listwise": 64}
# row: size of the pools in which the default recipe sees stored sequences; None: those that they were drawn from
OURS = {"ours": None, "ours, pools of 64": 64}
READERS = dict(tiny="models/tiny-qwen2.5-vl", credulous="models/tiny-qwen2.5-vl-credulous")
COUNTS = dict(temperature={1.: 6}, random=6)

# ---- the two worlds ----------------------------------------------------------------------------------------

class Place:
    "A world, what was asked there, and selectors that are trained once"
    def __init__(self, world, out, split, questions):
        self.world = world
        self.out = out
        self.split = split
        self.cache = FactCache(out/"facts")
        self.asked = world.ids(split)[:questions]
        self.made = {}

    @property
    def pool(self): return self.world.pools[self.split].only(self.asked)

    @property
    def bank(self): return self.world.items[self.world.items.split == "train"]

    def selector(self, name, seed):
        "Trained once"
        if (name, seed) not in self.made:
            self.made[name, seed] = self.train(name, seed)
            print(f"{self.world.name}, {self.out.name}: {name}, seed {seed} is trained", flush=True)
        return self.made[name, seed]

    def train(self, name, seed):
        "A selector by its name"
        train, choose = self.groups(seed)
        bank = self.bank[~self.bank.question_id.isin(choose.queries)]
        if name in OURS: return self.by_recipe(train, choose, bank, seed, OURS[name])
        return self.listwise(train, choose, bank, seed, SELECTORS[name])

    def by_recipe(self, train, choose, bank, seed, K):
        "The default recipe, on pools of K if that is said"
        if K is not None: train, choose = (self.widened(groups, K) for groups in (train, choose))
        learn = recipe_learner(train, choose, self.world.store, "ours", seed, items=bank)
        with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
        return learn.model.eval()

    def widened(self, groups, K):
        "The same sequences in pools of K"
        asked = self.world.items.loc[groups.queries]
        wide = make_pool(asked, self.bank, K, self.sampler, self.world.store)
        ids = {q: tuple(dict.fromkeys([*groups.pool[q], *wide[q]]))[:K] for q in groups.queries}
        return RLData(groups.rows, Pool(ids, wide.recipe), groups.manifest)

    def listwise(self, train, choose, bank, seed, warm):
        "The default model, listwise, after a warm-up in pools of `warm` if that is said"
        w = self.world
        dls = group_dls(train, choose, w.store, "soft_only", kind=self.kind, bs=64, seed=seed, device="cpu")
        learn = selector_learner(dls, seed=seed)
        with learn.no_bar(), learn.no_logging():
            kept = self.out/"kept"
            if warm is not None: learn.fit_warmup(bank, w.store, 15, best=False, K=warm, n=64, kept=kept)
            learn.fit_listwise(20, 3e-3, temp=.2, kept=kept)
        return learn.model.eval()

    def picks(self, names, seeds, ids=None):
        "What random, similarity and selectors pick out of the pools that they were trained for"
        pool = self.pool if ids is None else self.world.pools[self.split].only(ids)
        near = pick_similar(pool, self.world.store, S, self.kind).assign(selector="similar")
        picks = [pick_random(pool, S, self.draws), near]
        for name in names:
            for seed in seeds:
                model = self.selector(name, seed)
                picks.append(pick_model(model, pool, self.world.store, S, self.kind, name, seed))
        return pd.concat(picks, ignore_index=True)

class Islands(Place):
    "The embedded world with one of its readers"
    sampler = "random"
    kind = "mixed"
    draws = 3

    def __init__(self, out, reader="tiny", n_train=600):
        super().__init__(world("islands", lvlm=READERS[reader], device="cpu"), out/reader, "test", 200)
        self.n_train = n_train

    def groups(self, seed):
        "Training groups, and those by which epochs are chosen; asked for once"
        return self.proposed("train", self.n_train, seed), self.proposed("dev", 100, seed)

    def proposed(self, split, n, seed):
        "Groups of the first n questions of a split"
        w = self.world
        return generate(
            self.out/"groups"/f"{split}-{n}-{seed}", w.ids(split)[:n], w.items, w.pools[split], w.scorer, w.store,
            proposing=Proposing(shots=(S,), counts=COUNTS, seed=seed), guarding=Guarding(test=0), cache=self.cache,
            progress=False,
        )

class Blind(Place):
    "Real questions, with stored answers"
    sampler = "text"
    kind = "text"
    draws = 1

    def __init__(self, out, root, questions):
        super().__init__(world("blind_okvqa", root=root, pools="text"), out, "dev", questions)
        self.stored = self.world.known()
        self.pairs = self.world.groups("train", shots=(S,))

    def groups(self, seed):
        "Training groups, and a tenth by which epochs are chosen"
        return split(self.pairs, (.9, .1), seed, self.world.items)

def with_smol(place):
    "The same, with SmolLM2 to be asked"
    from leverplus.scorer import SharedScorer
    from leverplus.smol import load_smol
    place.world = replace(place.world, scorer=SharedScorer(load_smol(device="cpu")))
    return place

# ---- what is asked -----------------------------------------------------------------------------------------

def pools(place, names, seeds):
    "The same selectors with larger pools"
    w = place.world
    models = {name: [place.selector(name, seed) for seed in seeds] for name in names}
    asked = w.items.loc[place.asked]
    return ask_shift(
        models, asked, place.bank, w.store, w.scorer, SIZES, S, place.sampler, asking=w.asking, cache=place.cache,
        draws=place.draws, kind=place.kind,
    )

def controls(place, picks):
    "The same demonstrations with one thing changed"
    w = place.world
    return ask_controls(picks, w.scorer, w.items, place.pool, w.store, CONTROLS, w.asking, place.cache)

def order(place, names, seeds):
    "As shown and reversed, of all questions of which every pair is stored"
    w = place.world
    picks = place.picks(names, seeds, w.ids(place.split))
    both = "as_shown", "reversed"
    return ask_controls(picks, None, w.items, w.pools[place.split], w.store, both, w.asking, place.stored)

def transfer(places, name, seeds):
    "Each reader about what was picked by selectors of both"
    rows = []
    for reader, place in places.items():
        w = place.world
        for teacher, other in places.items():
            picks = other.picks([name], seeds)
            if teacher != reader: picks = picks[picks.selector == name]
            facts = ask(picks, w.scorer, w.items, place.cache, w.asking)
            scored = score_picks(picks, facts.drop_duplicates(["question_id", "pointer"]))
            trained_on = scored.selector.map({name: teacher})
            scored = scored.assign(asked=reader, trained_on=trained_on, copied=copied(scored, w.items))
            rows.append(scored)
    return pd.concat(rows, ignore_index=True)

def agreement(one, other):
    "How alike two frames of facts about the same rows are"
    same_text = one.vqa_pred_answer.to_numpy() == other.vqa_pred_answer.to_numpy()
    same_score = one.vqa_acc_score.to_numpy() == other.vqa_acc_score.to_numpy()
    ranks = pd.Series(one.vqa_gt_prob.to_numpy()).corr(pd.Series(other.vqa_gt_prob.to_numpy()), method="spearman")
    return dict(prompts=len(one), text=same_text.mean(), accuracy=same_score.mean(), probability=ranks)

def formats(place, other):
    "The same prompts in float32 and in bfloat16, which `other` knows or can be asked"
    w = place.world
    picks = place.picks([], [])
    if w.name != "islands": picks = picks[picks.selector == "similar"]
    ours = ask(picks, w.scorer, w.items, place.cache, w.asking)
    theirs = other(picks)
    return {name: round(float(value), 4) for name, value in agreement(ours, theirs).items()}

# ---- the door ----------------------------------------------------------------------------------------------

KEPT = (
    "selector", "shots", "draw", "question_id", "K", "control", "asked", "trained_on", "vqa_acc_score", "copied",
    "eval_failed",
)

def before(file, scored):
    "Rows of other selectors that were asked before"
    if not file.exists(): return scored[:0]
    there = pd.read_parquet(file)
    return there[~there.selector.isin(scored.selector)]

def save(name, world, folder, scored):
    "What the tables need, small enough to be kept beside the pages; other selectors' rows stay"
    kept = scored[[column for column in KEPT if column in scored]]
    kept = kept.assign(image_id=world.items.image_id.loc[kept.question_id].to_numpy())
    if "K" in kept: kept["K"] = kept.K.astype(str)
    file = repo_path("data", folder)/f"{name}.parquet"
    kept = pd.concat([kept, before(file, kept)], ignore_index=True)
    texts = {c: "category" for c in ("selector", "K", "control", "asked", "trained_on") if c in kept}
    small = kept.astype(texts | dict(shots="int8", draw="int8", vqa_acc_score="float32"))
    with atomic_path(file) as tmp: small.to_parquet(tmp, compression="zstd")
    print(f"{file.name}: {len(small)} rows of {small.question_id.nunique()} questions", flush=True)

def few(picks):
    "Without the second and third draw of random demonstrations"
    return picks[(picks.selector != "random") | (picks.draw == 0)]

def run_islands(a):
    "All parts of the embedded world"
    place = Islands(a.out)
    def keep(name, scored): save(name, place.world, "islands", scored)
    if "pools" in a.parts: keep("shift", pools(place, a.selectors, a.seeds))
    if "controls" in a.parts: keep("controls", controls(place, few(place.picks(a.selectors, a.seeds))))
    if "formats" in a.parts:
        half = world("islands", device="cpu", dtype=torch.bfloat16)
        told = formats(place, lambda picks: ask(picks, half.scorer, half.items, None, half.asking))
        write_json(repo_path("data", "islands", "formats.json"), told, indent=1)
    if "transfer" in a.parts:
        places = {reader: Islands(a.out, reader, 300) for reader in READERS}
        keep("transfer", transfer(places, "listwise", a.seeds))

def run_blind(a):
    "All parts of the second world; only `order` asks nobody"
    place = Blind(a.out, a.root, a.questions)
    def keep(name, scored): save(name, place.world, "blind_okvqa_results", scored)
    names = a.selectors
    if "order" in a.parts: keep("order", order(place, names, a.seeds))
    if {"controls", "formats", "pools"} & set(a.parts): place = with_smol(place)
    if "controls" in a.parts:
        picks = place.picks([], [])
        keep("controls", controls(place, picks[picks.selector == "similar"]))
    if "formats" in a.parts:
        told = formats(place, lambda picks: ask(picks, None, place.world.items, place.stored))
        write_json(repo_path("data", "blind_okvqa_results", "formats.json"), told, indent=1)
    if "pools" in a.parts: keep("shift", pools(place, names, a.seeds[:1]))

PARTS = ["order", "controls", "formats", "pools", "transfer"]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--world", default="islands", choices=["islands", "blind_okvqa"])
    p.add_argument("--root", type=Path, help="folder of the second world")
    p.add_argument("--parts", nargs="+", choices=PARTS, help="default: all")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--selectors", nargs="+", choices=[*SELECTORS, *OURS], default=["listwise"])
    p.add_argument("--questions", type=int, default=40, help="questions of the second world that SmolLM2 is asked")
    a = p.parse_args()
    torch.set_num_threads(1)
    a.parts = a.parts or PARTS
    if a.world == "islands": return run_islands(a)
    if a.root is None: p.error("--world blind_okvqa needs --root")
    run_blind(a)

if __name__ == "__main__": main()
