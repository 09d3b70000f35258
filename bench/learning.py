"""What each objective learns: one table, the same stored groups for all, seeds of proposals, weights and batches.

`python bench/learning.py OUT [--world islands] [--seeds 0 1 2 3 4] [--suites ...] [--methods ...] [--recipes ...]`
trains every method on every suite of a world and appends what it picks on dev and on test, with the language
model's verdicts, to OUT/picks/*.parquet, one file per (suite, method, seed); what is there is not done again, so
several processes may share OUT once the groups of a seed are made. `--table dev` prints the gap closed on dev with
intervals over queries and seeds; `--table test` the same on test, and counts the look; `--store FILE` writes what
the tables need. Settings of the methods were chosen on dev. `bench/folds.py` judges the same methods on training
questions that they have not seen.

A method is one of METHODS, or with `--recipes` a recipe by its name (page 71), called `recipe NAME` in the table. A
name with ", by accuracy" behind it (`--methods "sft, by accuracy"`) chooses its epochs by the accuracy of greedy
picks on dev. Where neither methods nor recipes are named, all methods are trained. What several rows begin with,
such as a warm-up, is trained once per seed and kept in OUT/kept.

Suites of the islands, 900 training and 250 dev queries, K = 16, S = 2: `dense-soft` 12 sequences per query, half of
the similarity prior, half random, reward = VQA accuracy with its parts; `sparse-hard` 12 drawn uniformly, reward
0/1; `starved` reward 0/1, live groups are 1 % of all; `ragged` 2..40 sequences per query, reward as dense-soft.
`joint` is dense-soft with 12 sequences of each of 1, 2, 3 and 4 shots for 450 training queries, one model for all;
`joint sparse-hard`, `joint starved` and `joint ragged` alike. For one and two shots the oracle is exact; for three
and four it is the best that `best_found` finds, a lower bound.

`--world blind_okvqa --root DIR --pools text` takes the groups that lie there, whose suites are `pairs` (16 of two
demonstrations per query), `singles` (all 16 of one) and `pairs and singles`, reward = VQA accuracy. Its dev groups are
exhaustive. Nobody can be asked there, so methods that ask while they train have no row. `--numbers FILE` writes
the row of page 35.

`--pools` of the islands: random, or such as `mixed`, of which a half was retrieved (a quarter by text, a quarter by
image).
"""
import argparse, contextlib, os, time, warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
import numpy as np, pandas as pd, torch
from leverplus.callback_onpolicy import Drawing, Feedback, GreedyLoss
from leverplus.core import atomic_path, read_json, rng, write_json
from leverplus.dls import group_dls
from leverplus.evaluate import count_look, majority_vote, pick_oracle, score_picks, seeds_table
from leverplus.groups import RLData
from leverplus.infer import pick_mmr, pick_model, pick_random, pick_rule, pick_similar, rule_of
from leverplus.learner import selector_learner
from leverplus.recipes import RECIPES, recipe, recipe_learner
from leverplus.earlier_recipes import EARLIER
from leverplus.rldata_ask import FactCache, ask
from leverplus.rldata_generate import generate
from leverplus.settings import Proposing, Rewarding
from leverplus.world import WORLDS, ask_everything, world, world_numbers

# behind a method's name: epochs are chosen by the LVLM's accuracy on dev, of what greedy picks, and not by
# regret on its stored groups
ACC = ", by accuracy"
NET = dict(d_hidden=64, n_layers=0, state="none", match="net", n_match=8)
# the plain selector: the defaults of `PointerSelector`, not those of `selector_learner`
PLAIN = dict(match="none")

# ---- suites ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Suite:
    "Groups of one kind"
    shots: tuple  # shot counts, one model for all
    reward: str  # what it is trained on

PAIR, EVERY = (2,), (1, 2, 3, 4)
PROPOSED = {  # groups that are asked for here
    "dense-soft": Suite(PAIR, "soft_only"),
    "sparse-hard": Suite(PAIR, "hard_only"),
    "starved": Suite(PAIR, "hard_only"),
    "ragged": Suite(PAIR, "soft_only"),
    "joint": Suite(EVERY, "soft_only"),
    "joint sparse-hard": Suite(EVERY, "hard_only"),
    "joint starved": Suite(EVERY, "hard_only"),
    "joint ragged": Suite(EVERY, "soft_only"),
}
STORED = {  # groups that lie in a world
    "pairs": Suite(PAIR, "soft_only"),
    "singles": Suite((1,), "soft_only"),
    "pairs and singles": Suite((1, 2), "soft_only"),
}
SUITES = PROPOSED | STORED

def cut(data, keep): return RLData(data.rows[np.asarray(keep)].reset_index(drop=True), data.pool)

def number(data):
    "Each row's place among the rows of its query, method and shot count"
    return data.rows.groupby(["question_id", "gen_method", data.rows.pointer.map(len)]).cumcount().to_numpy()

def dense(data):
    "Six sequences of each method; twelve where there is one: of single shots the prior has drawn every candidate"
    shots = data.rows.pointer.map(len)
    methods = data.rows.groupby(["question_id", shots]).gen_method.transform("nunique").to_numpy()
    return cut(data, number(data) < np.where(methods == 1, 12, 6))

def ragged(data, seed):
    "Two to forty sequences of each query"
    g = rng("learning", "ragged", seed)
    n = {q: g.integers(2, 41) for q in data.queries}
    drawn = data.rows.assign(u=g.random(len(data.rows)))
    order = drawn.groupby("question_id").u.rank(method="first").to_numpy()
    return cut(data, order <= data.rows.question_id.map(n).to_numpy())

def starved(data, seed):
    "Groups of which one in a hundred is live"
    g = rng("learning", "starved", seed)
    data = dense(data)
    live = data.rows.groupby("question_id").vqa_acc_score.agg(lambda acc: acc.max() > acc.min())
    flat = live.index[~live]
    few = g.permutation(live.index[live])[: max(1, round(len(flat) / 99))]
    return cut(data, data.rows.question_id.isin([*flat, *few]))

def training_groups(name, data, seed):
    "The training groups of a suite, of one shot count"
    if name == "sparse-hard": return data
    if name == "ragged": return ragged(data, seed)
    if name == "starved": return starved(data, seed)
    return dense(data)

def of_shots(data, S): return cut(data, data.rows.pointer.map(len) == S)

def one_behind_the_other(parts):
    "Groups of several shot counts as one"
    return RLData(pd.concat([part.rows for part in parts], ignore_index=True), parts[0].pool)

def proposed_suite(name, train, dev, seed):
    "The groups (train, dev) of a suite out of those that were proposed"
    kind = name.removeprefix("joint").strip() or "dense-soft"
    made = [training_groups(kind, of_shots(train, S), seed) for S in train.shots]
    judged = [dense(of_shots(dev, S)) for S in train.shots]
    return one_behind_the_other(made), one_behind_the_other(judged)

# ---- what a run of this program shares ---------------------------------------------------------------------

class Bench:
    "A world, a folder, and what was asked of the world"
    def __init__(self, world, out):
        self.world = world
        self.out = out
        self.facts = {}

    @property
    def splits(self):
        "Splits that can be judged"
        known = self.world.pools if self.world.can_ask else self.world.exhaustive
        return [split for split in ("dev", "test") if split in known]

    @property
    def suites(self): return STORED if self.world.stored.groups else PROPOSED

    @property
    def kinds(self):
        "Embeddings by which similarity may pick"
        items = self.world.items
        pictures = "image_path" in items and items.image_path.notna().any()
        return ("image", "text", "mixed") if pictures else ("text",)

    @cached_property
    def bank(self): return self.world.items[self.world.items.split == "train"]

    def everything(self, split):
        "Exhaustive facts of one and two shots: stored in the world, or asked once"
        if split not in self.facts: self.facts[split] = self._everything(split)
        return self.facts[split]

    def _everything(self, split):
        if split in self.world.exhaustive: return self.world.facts(split)
        file = self.out/"facts"/f"{split}.parquet"
        if not file.exists():
            cache = FactCache(self.out/"facts"/f"{split}-parts")
            made = ask_everything(self.world, (split,), (1, 2), cache)[split]
            whole = FactCache()
            whole.add(made)
            whole.save(file)
        return FactCache(file).to_frame()

    def proposed(self, seed, split, shots=(2,), n=20, queries=None, prior=True):
        "Up to n sequences of the prior and n random ones that it has not drawn; or n random ones alone"
        counts = dict(temperature={1.0: n}, random=n) if prior else dict(random=n)
        name = f"{split}-{'-'.join(map(str, shots))}-{n}-{seed}{'' if prior else '-random'}"
        w = self.world
        return generate(
            self.out/"groups"/name, w.ids(split)[:queries], w.items, w.pools[split], w.scorer, w.store,
            proposing=Proposing(shots=shots, counts=counts, seed=seed), asking=w.asking,
            cache=FactCache(self.out/"facts"/split),
        )

    def groups(self, name, seed):
        "The groups (train, dev) of a suite"
        shots = SUITES[name].shots
        if name in STORED: return self.world.groups("train", shots), self.world.groups("dev", shots)
        joint = name.startswith("joint")
        queries = 450 if joint else None
        n = 6 if name == "joint" else 20
        if "sparse-hard" in name: train = self.proposed(seed, "train", shots, 12, queries, prior=False)
        else: train = self.proposed(seed, "train", shots, n, queries)
        dev = self.proposed(seed, "dev", shots, 6 if joint else n, queries)
        return proposed_suite(name, train, dev, seed)

    def judge(self, split, picks):
        "Picks of one shot count with the verdicts on them"
        facts = self.everything(split)
        if picks.shots.iloc[0] > 2:
            cache = FactCache(self.out/"facts"/f"{split}-more")
            facts = ask(picks, self.world.scorer, self.world.items, cache, self.world.asking)
        return score_picks(picks, facts).assign(split=split)

# ---- methods -----------------------------------------------------------------------------------------------

class Trial:
    "One suite and seed: what the methods below start from"
    def __init__(self, bench, name, seed):
        self.bench = bench
        self.world = bench.world
        self.plain = getattr(self.world.store, "plain", self.world.store)  # evidence is read by recipes alone
        self.name = name
        self.seed = seed
        self.shots = SUITES[name].shots
        self.mode = SUITES[name].reward
        self.keep = bench.out/"kept"
        self.bank = bench.bank  # answered questions of which a warm-up makes pools
        self.choose_by = None
        self.train, self.dev = bench.groups(name, seed)
        several = len(self.shots) > 1
        self.split = dict(split_shots=True) if several else {}
        self.epochs = 8 if several else 20  # several shot counts have so many times the rows

    def train_by(self, method):
        "The learner that a method has trained"
        name = method.removesuffix(ACC)
        self.choose_by = None
        if name != method: self.choose_by = self.by_accuracy()
        learn = METHODS[name](self) if name in METHODS else self.recipe(name.removeprefix("recipe "))
        if self.choose_by is not None and not self.feedback.known:
            raise ValueError(f"{method}: no stage of {name} chooses an epoch, so this would be {name} again")
        return learn

    def by_accuracy(self):
        "A score for epochs: what greedy picks on dev; the same facts serve all seeds"
        facts = self.bench.everything("dev")
        scorer = self.world.scorer if self.world.can_ask else None
        rewarding = Rewarding(reward="soft_only")
        self.feedback = Feedback(scorer, self.world.items, facts, rewarding, self.world.asking)
        return GreedyLoss(self.feedback, self.world.pools["dev"], self.world.store, self.shots)

    def learner(self, mode=None, **model):
        dls = group_dls(self.train, self.dev, self.plain, mode or self.mode, bs=64, seed=self.seed)
        return selector_learner(dls, seed=self.seed, wd=.05, choose_by=self.choose_by, **model or PLAIN)

    def recipe(self, name, **changes):
        "A recipe by its name; with `keep`, stages that others have trained alike are not trained again"
        r = recipe(name, RECIPES | EARLIER, data=dict(reward=self.mode), **changes)
        store = self.world.store if name in ("ours", "evidence") else self.plain
        learn = recipe_learner(
            self.train, self.dev, store, r, self.seed, choose_by=self.choose_by, items=self.bank
        )
        return learn.fit_recipe(kept=self.keep)

    def warm(self, sampler="random"):
        "A learner after the warm-up, which knows nothing of the groups but their shot counts; made once per seed"
        learn = self.learner(**NET)
        n = 64 if len(self.shots) > 1 else 256
        return learn.fit_warmup(self.bank, self.plain, 15, best=False, n=n, sampler=sampler, kept=self.keep)

def warm_alike(t): return t.warm(t.world.pools["train"].recipe["sampler"])
def listwise(t, learn): return learn.fit_listwise(t.epochs, 3e-3, temp=.2, **t.split)

def on_policy(t, learn, objective, lr, rounds=10, G=12):
    "As many different questions to the LVLM as the stored groups have rows, at most, and the greedy sequences"
    bs = 32 // len(t.shots)  # 32 groups per batch
    drawing = Drawing(
        G=G, shots=t.shots, queries_per_round=len(t.train.queries) // rounds, bs=bs, patience=None, seed=t.seed,
    )
    cache = FactCache(t.bench.out/"facts"/"train")
    feedback = Feedback(t.world.scorer, t.world.items, cache, Rewarding(reward=t.mode), t.world.asking)
    return learn.fit_onpolicy(feedback, t.world.store, rounds, lr, objective, drawing)

def mended(t):
    """The reports' RCE + GRPO with four defects of the second stage mended: old policy and reference from its
    start, an exact KL, no cut by reward, no dropout
    """
    cbs = dict((c, {}) if isinstance(c, str) else c for c in recipe("plan5-as-run", EARLIER)["stages"][1]["cbs"])
    del cbs["TopKCurriculum"]
    cbs["GRPO"] |= dict(old=None, refresh="epoch", dropout=False)
    cbs["KLToRef"] |= dict(ref="start", estimator="exact")
    return t.recipe("plan5-as-run", stage=dict(n_epoch=3, cbs=[list(c) for c in cbs.items()]))

METHODS = {
    "sft": lambda t: t.learner().fit_sft(t.epochs, 1e-3, **t.split),
    "rce (reports)": lambda t: t.recipe("rce-only"),
    "rce + grpo (reports)": lambda t: t.recipe("plan5-as-run", stage=dict(n_epoch=3)),
    "rce": lambda t: t.learner().fit_rce(10, 3e-3, temp=.1, **t.split),
    "rce + grpo": lambda t: t.learner().fit_rce(10, 3e-3, temp=.1, **t.split).fit_grpo(10, 1e-3, **t.split),
    "listwise hard": lambda t: listwise(t, t.learner("hard_only")),
    "listwise soft": lambda t: listwise(t, t.learner("soft_only")),
    "net, listwise": lambda t: listwise(t, t.learner(**NET)),
    "warm-up": lambda t: t.warm(),
    "warm-up, sft": lambda t: t.warm().fit_sft(t.epochs, 1e-3, **t.split),
    "warm-up, rce": lambda t: t.warm().fit_rce(10, 1e-3, temp=.1, **t.split),
    "warm-up, grpo": lambda t: t.warm().fit_grpo(20, 1e-3, **t.split),
    "warm-up, listwise": lambda t: listwise(t, t.warm()),
    "warm-up in such pools": warm_alike,  # another than "warm-up" where pools are not random
    "warm-up in such pools, listwise": lambda t: listwise(t, warm_alike(t)),
    "on-policy rloo": lambda t: on_policy(t, t.learner(), "rloo", 1e-3),
    "on-policy grpo": lambda t: on_policy(t, t.learner(), "grpo", 1e-3),
    "warm-up, on-policy": lambda t: on_policy(t, t.warm(), "rloo", 1e-3),
    "warm-up, listwise, on-policy": lambda t: on_policy(t, listwise(t, t.warm()), "rloo", 3e-4),
    "reports, all four": mended,
    "reports, rce alone": lambda t: t.recipe("plan5-as-run", stage=dict(n_epoch=0)),
    "reports, no flat groups": lambda t: t.recipe("plan5-as-run", rce=dict(skip_flat=True), stage=dict(n_epoch=3)),
}
ASK = [m for m in METHODS if "on-policy" in m]  # these need somebody who can be asked while they train

# ---- rows without training ---------------------------------------------------------------------------------

def best_found(bench, split, S, width=8):
    """Facts of what a search finds: the best sequences of S-1, with every other candidate before and behind; a
    query whose accuracy is 1 is not searched any further
    """
    parents = bench.everything(split) if S == 3 else best_found(bench, split, S - 1, width)
    parents = parents[parents.pointer.map(len) == S - 1]
    parents = parents.sort_values(["vqa_acc_score", "vqa_gt_prob"], ascending=False, kind="stable")
    parents = parents.groupby("question_id").head(width)
    place = parents.groupby("question_id").cumcount()
    cache = FactCache(bench.out/"facts"/f"{split}-search")
    w = bench.world
    solved = set()
    found = []
    for lot in range(0, width, 2):
        todo = parents[place.isin((lot, lot + 1)) & ~parents.question_id.isin(solved)]
        pairs = longer(todo, w.pools[split])
        found.append(ask(pairs, w.scorer, w.items, cache, w.asking, window=4096, progress=True))
        solved |= set(found[-1].question_id[found[-1].vqa_acc_score == 1])
    return pd.concat(found, ignore_index=True).drop_duplicates(["question_id", "pointer"], ignore_index=True)

def longer(rows, pool):
    "Pairs with another candidate before and behind"
    pairs = {}
    for q, pointer in zip(rows.question_id, rows.pointer):
        for c in pool[q]:
            if c in pointer: continue
            pairs[q, (c, *pointer)] = None
            pairs[q, (*pointer, c)] = None
    return pd.DataFrame(list(pairs), columns=["question_id", "pointer"])

def mean_of(facts, S, split):
    "Random demonstrations, exactly: the mean over all sequences"
    own = facts[facts.pointer.map(len) == S]
    mean = own.groupby("question_id")[["vqa_acc_score", "vqa_gt_prob"]].mean().reset_index()
    return mean.assign(
        selector="random", shots=S, draw=0, pointer=[()]*len(mean), vqa_pred_answer="", eval_failed=False,
        split=split,
    )

def baselines(bench, shots):
    "What needs no training, once"
    for S in shots:
        file = bench.out/"picks"/f"baselines-{S}.parquet"
        if file.exists(): continue
        save(file, [row for split in bench.splits for row in untrained(bench, split, S)])

def untrained(bench, split, S):
    "Scored rows that need no training: similarity, MMR, the vote of what is nearest, random, oracle"
    w = bench.world
    pool = w.pools[split]
    near = [pick_similar(pool, w.store, S, kind) for kind in bench.kinds]
    picks = [*near, pick_mmr(pool, w.store, S, bench.kinds[-1])]
    picks.append(pick_rule(rule_of("vote", w.store, w.items, kind=bench.kinds[-1]), pool, S, "vote"))
    if not w.can_ask:  # a regression wants stored groups that all seeds share
        rule = rule_of("logistic", w.store, w.items, w.groups("train", (1, 2)), bench.kinds[-1])
        picks.append(pick_rule(rule, pool, S, "logistic"))
    rows = [bench.judge(split, f) for f in picks]
    rows.append(majority_vote(near[-1], w.items).assign(split=split))
    if S <= 2:
        facts = bench.everything(split)
        return [*rows, bench.judge(split, pick_oracle(facts, S, pool)), mean_of(facts, S, split)]
    more = best_found(bench, split, S)
    oracle = score_picks(pick_oracle(more, S), more).assign(split=split)
    return [*rows, bench.judge(split, pick_random(pool, S, draws=5)), oracle]

# ---- runs and tables ---------------------------------------------------------------------------------------

def save(file, frames):
    frame = pd.concat(frames, ignore_index=True)
    with atomic_path(file) as tmp: frame.assign(pointer=frame.pointer.map(list)).to_parquet(tmp)

def picks_file(bench, suite, method, seed):
    return bench.out/"picks"/f"{suite}_{method.replace(', ', '-').replace(' ', '_')}_{seed}.parquet"

@contextlib.contextmanager
def quietly():
    "Without the line per epoch that is welcome elsewhere"
    with warnings.catch_warnings(), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        warnings.simplefilter("ignore")
        yield

def run(bench, seeds, suites, methods):
    "Train and judge what is not there yet"
    baselines(bench, sorted({S for name in suites for S in SUITES[name].shots}))
    for seed in seeds:
        for name in suites:
            left = [m for m in methods if not picks_file(bench, name, m, seed).exists()]
            if not left: continue
            trial = Trial(bench, name, seed)
            for method in left: run_one(trial, method)

def run_one(trial, method):
    "Train one method and store what it picks"
    bench = trial.bench
    start = time.perf_counter()
    with quietly(): model = trial.train_by(method).model.eval()
    took = time.perf_counter() - start
    rows = []
    for split in bench.splits:
        for S in trial.shots:
            picks = pick_model(model, bench.world.pools[split], bench.world.store, S, name=method, draw=trial.seed)
            rows.append(bench.judge(split, picks).assign(suite=trial.name, seconds=took))
    save(picks_file(bench, trial.name, method, trial.seed), rows)
    dev = 100*rows[0].vqa_acc_score.mean()
    print(f"{trial.name:12} {method:22} seed {trial.seed}: dev accuracy {dev:.1f}, {took:.0f} s", flush=True)

def load(out, split):
    "All picks of a split; baselines belong to every suite"
    f = pd.concat([pd.read_parquet(p) for p in sorted((out/"picks").glob("*.parquet"))], ignore_index=True)
    f = f[f.split == split]
    return f.assign(pointer=f.pointer.map(tuple))

KEPT = ["suite", "selector", "shots", "draw", "split", "question_id", "vqa_acc_score", "eval_failed", "seconds"]
SMALL = dict(
    suite="category", selector="category", split="category", shots="int8", draw="int8", vqa_acc_score="float32"
)

def store(bench, file):
    "The scores alone, small enough to be kept beside the pages"
    f = pd.concat([load(bench.out, split) for split in bench.splits], ignore_index=True)
    with atomic_path(file) as tmp: f[KEPT].astype(SMALL).to_parquet(tmp, compression="zstd")

def store_numbers(bench, file, pools):
    "What choosing is worth in a world of stored groups, beside what the file says of other pools"
    split = bench.splits[-1]
    known = read_json(file) if file.exists() else {}
    groups = bench.world.groups("train").rows
    known[f"OKVQA, {pools} pools, {split}"] = world_numbers(bench.world, split, groups, kind=bench.kinds[-1])
    write_json(file, known, indent=1)

def of_suite(scored, suite): return scored[scored.suite.isna() | (scored.suite == suite)]

def print_tables(bench, split, suites):
    "The gap closed, a table per suite and shot count"
    scored = load(bench.out, split)
    if split == "test": print(f"look number {count_look(bench.out, scored)} at the test split")
    for name in suites:
        own = of_suite(scored, name)
        rivals = [m for m in ("sft", "rce (reports)", "rce + grpo (reports)") if m in set(own.selector)]
        for S in SUITES[name].shots:
            table = seeds_table(own, S, bench.world.items, rivals)
            print(f"\n{name}, S = {S}\n{table.round(3).to_string()}")

# ---- the door ----------------------------------------------------------------------------------------------

def new_parser(doc):
    "A parser with what any program asks for that trains methods in a world"
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--world", default="islands", choices=list(WORLDS))
    p.add_argument("--root", type=Path, help="folder of a world that is not embedded")
    p.add_argument("--pools", help="random | text | image | mixed; default: those that the world has by itself")
    p.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--methods", nargs="*", choices=[*METHODS, *(m + ACC for m in METHODS)], help="by name, see METHODS")
    p.add_argument("--recipes", nargs="+", default=[], choices=[*RECIPES, *EARLIER], help="recipes of page 71, by name")
    return p

def parser():
    p = new_parser(__doc__)
    p.add_argument("--suites", nargs="+", choices=list(SUITES), help="default: those of one shot count, of this world")
    p.add_argument("--store", type=Path, help="write what the tables need into this parquet file, and stop")
    p.add_argument("--numbers", type=Path, help="write the row of page 35 into this JSON file, and stop")
    p.add_argument("--table", choices=["dev", "test"])
    return p

def opened(p, a):
    "The world, and the folder, which may hold runs of no other"
    options = dict(root=a.root, pools=a.pools)
    w = world(a.world, **{name: value for name, value in options.items() if value is not None})
    made_of = dict(world=w.name, fingerprint=w.fingerprint)
    file = a.out/"world.json"
    there = read_json(file) if file.exists() else made_of
    if there != made_of: p.error(f"{a.out} holds runs in world {there}: take another folder")
    write_json(file, made_of)
    return Bench(w, a.out)

def wanted_suites(p, a, bench):
    "Suites that were named, or those of one shot count"
    suites = a.suites or [name for name, suite in bench.suites.items() if len(suite.shots) == 1]
    odd = [name for name in suites if name not in bench.suites]
    if odd: p.error(f"suites {', '.join(odd)}: world {bench.world.name} has {', '.join(bench.suites)}")
    return suites

def wanted_methods(p, a, bench):
    "Methods that were named, and recipes; all that can be trained in this world if nothing was"
    named = a.methods
    if named is None: named = [] if a.recipes else [m for m in METHODS if bench.world.can_ask or m not in ASK]
    asks = [m for m in named if m.removesuffix(ACC) in ASK]
    if asks and not bench.world.can_ask: p.error(f"{', '.join(asks)}: world {bench.world.name} has nobody to ask")
    return [*named, *(f"recipe {name}" for name in a.recipes)]

def main():
    p = parser()
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    bench = opened(p, a)
    suites = wanted_suites(p, a, bench)
    if a.store: store(bench, a.store)
    elif a.numbers: store_numbers(bench, a.numbers, a.pools or "text")
    elif a.table: print_tables(bench, a.table, suites)
    else: run(bench, a.seeds, suites, wanted_methods(p, a, bench))

if __name__ == "__main__": main()
