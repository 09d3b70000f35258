"""What each objective learns: one table, the same stored groups for all, seeds of proposals, weights and batches.

`python bench/learning.py OUT [--seeds 0 1 2 3 4] [--suites ...] [--methods ...]` trains every method on
every suite of the embedded world and appends what it picks on dev and on test, with the LVLM's verdicts, to
OUT/picks/*.parquet, one file per (suite, method, seed); what is there is not done again, so several
processes may share OUT once the groups of a seed are made. `python bench/learning.py OUT --table dev`
prints the gap closed on dev with intervals over queries and seeds; `--table test` the same on test, and
counts the look. Settings of the methods were chosen on dev. A method's name with ", by accuracy" behind it
(`--methods "sft, by accuracy"`) chooses its epochs by the accuracy of greedy picks on dev.

Suites, 900 training and 250 dev queries, K = 16, S = 2: `dense-soft` 12 sequences per query, half of the
similarity prior, half random, reward = VQA accuracy with its parts; `sparse-hard` 12 drawn uniformly,
reward 0/1; `starved` reward 0/1, live groups are 1 % of all; `ragged` 2..40 sequences per query, reward as
dense-soft. `joint` is dense-soft with 12 sequences of each of 1, 2, 3 and 4 shots for 450 training queries,
one model for all; `joint sparse-hard`, `joint starved` and `joint ragged` alike. `--sampler mixed` does the
same with pools of which a half was retrieved (a quarter by text, a quarter by image). For one and two shots
the oracle is exact; for three and four it is the best that `best_found` finds, a lower bound.
"""
import argparse, contextlib, os, time, warnings
from pathlib import Path
import numpy as np, pandas as pd, torch
from leverplus.callback_onpolicy import Drawing, Feedback, GreedyLoss
from leverplus.core import atomic_path, read_json, rng, write_json
from leverplus.dls import group_dls
from leverplus.evaluate import count_look, pick_oracle, score_picks, seeds_table
from leverplus.groups import RLData
from leverplus.infer import pick_mmr, pick_model, pick_random, pick_similar
from leverplus.learner import selector_learner
from leverplus.pools import SAMPLERS
from leverplus.recipes import RECIPES, recipe, recipe_learner
from leverplus.earlier_recipes import EARLIER
from leverplus.rldata_ask import FactCache, ask
from leverplus.rldata_generate import generate
from leverplus.settings import Proposing, Rewarding
from leverplus.world import all_pointers, load_world

SUITES = {
    "dense-soft": "soft_only",
    "sparse-hard": "hard_only",
    "starved": "hard_only",
    "ragged": "soft_only",
}
SUITES |= {"joint": "soft_only"} | {f"joint {s}": mode for s, mode in SUITES.items() if s != "dense-soft"}
# behind a method's name: epochs are chosen by the LVLM's accuracy on dev, of what greedy picks, and not by
# regret on its stored groups
ACC = ", by accuracy"
NET = dict(d_hidden=64, n_layers=0, state="none", match="net", n_match=8)
# the plain selector: the defaults of `PointerSelector`, not those of `selector_learner`
PLAIN = dict(match="none")

def base_groups(world, out, seed, split, shots=(2,), n=20, queries=None, prior=True):
    """Up to n sequences of the prior and n random ones that it has not drawn, per query and of each shot
    count; or n random ones alone
    """
    counts = dict(temperature={1.0: n}, random=n) if prior else dict(random=n)
    return generate(
        out / "groups" / f"{split}-{'-'.join(map(str, shots))}-{n}-{seed}{'' if prior else '-random'}",
        world.ids(split)[:queries],
        world.items,
        world.pools[split],
        world.scorer,
        world.store,
        proposing=Proposing(shots=shots, counts=counts, seed=seed),
        cache=FactCache(out / "facts" / split),
    )

def cut(data, keep): return RLData(data.rows[np.asarray(keep)].reset_index(drop=True), data.pool)

def number(data):
    "Each row's place among the rows of its query, method and shot count"
    return data.rows.groupby(["question_id", "gen_method", data.rows.pointer.map(len)]).cumcount().to_numpy()

def suite(name, train, dev, seed):
    "The groups (train, dev) of a suite"
    # one shot: the prior has drawn every candidate
    alone = lambda d: (
        d.rows.groupby(["question_id", d.rows.pointer.map(len)]).gen_method.transform("nunique") == 1
    ).to_numpy()
    dense = lambda d: cut(d, number(d) < np.where(alone(d), 12, 6))
    if name.startswith("joint "): return _joint(name.removeprefix("joint "), train, dev, seed)
    if name in ("dense-soft", "joint"): return dense(train), dense(dev)
    if name == "sparse-hard": return train, dense(dev)
    g = rng("learning", name, seed)
    if name == "ragged":
        n = {q: g.integers(2, 41) for q in train.queries}
        order = train.rows.assign(u=g.random(len(train.rows))).groupby("question_id").u.rank(method="first")
        return cut(train, order.to_numpy() <= train.rows.question_id.map(n).to_numpy()), dense(dev)
    data = dense(train)
    spread = data.rows.groupby("question_id").vqa_acc_score.agg(lambda a: a.max() > a.min())
    flat = spread.index[~spread]
    live = g.permutation(spread.index[spread])[: max(1, round(len(flat) / 99))]
    return cut(data, data.rows.question_id.isin([*flat, *live])), dense(dev)

def _joint(name, train, dev, seed):
    "The same suite for each shot count, one behind the other"
    per = [
        suite(name, *(cut(d, d.rows.pointer.map(len) == S) for d in (train, dev)), seed) for S in train.shots
    ]
    return [
        RLData(pd.concat([x[i].rows for x in per], ignore_index=True), d.pool)
        for i, d in enumerate((train, dev))
    ]

class Trial:
    "One suite and seed: what the methods below start from"
    def __init__(self, world, out, name, seed):
        self.world = world
        self.out = out
        self.name = name
        self.seed = seed
        self.mode = SUITES[name]
        self.choose_by = None
        joint = name.startswith("joint")
        shots, queries = ((1, 2, 3, 4), 450) if joint else ((2,), None)
        n = 6 if name == "joint" else 20
        groups = [
            base_groups(
                world,
                out,
                seed,
                "train",
                *((shots, 12, queries, False) if "sparse-hard" in name else (shots, n, queries))
            ),
            base_groups(world, out, seed, "dev", shots, 6 if joint else n, queries),
        ]
        self.train, self.dev = suite(name, *groups, seed)
        # `joint` has twice the rows
        self.split, self.epochs = (dict(split_shots=True), 8) if joint else ({}, 20)

    def train_by(self, method):
        "The learner that a method has trained"
        name = method.removesuffix(ACC)
        self.choose_by = None
        if name != method: # the same facts of dev serve all seeds
            feedback = Feedback(
                self.world.scorer, self.world.items, everything(self.world, self.out, "dev"),
                Rewarding(reward="soft_only"),
            )
            self.choose_by = GreedyLoss(
                feedback, self.world.pools["dev"], self.world.store, shots_of(self.name)
            )
        learn = METHODS[name](self)
        if self.choose_by is not None and not feedback.known:
            raise ValueError(f"{method}: no stage of {name} chooses an epoch, so this would be {name} again")
        return learn

    def learner(self, mode=None, **model):
        dls = group_dls(self.train, self.dev, self.world.store, mode or self.mode, bs=64, seed=self.seed)
        return selector_learner(dls, seed=self.seed, wd=.05, choose_by=self.choose_by, **model or PLAIN)

    def recipe(self, name, **changes):
        r = recipe(name, RECIPES | EARLIER, data=dict(reward=self.mode), **changes)
        learn = recipe_learner(self.train, self.dev, self.world.store, r, self.seed, choose_by=self.choose_by)
        return learn.fit_recipe()

    def warm(self, sampler="random"):
        "A learner after the warm-up, which knows nothing of the groups but their shot counts; made once per seed"
        file = (
            self.out
            / "warm"
            / f"{'joint' if self.split else 'pairs'}-{self.seed}{'' if sampler == 'random' else '-' + sampler}.pt"
        )
        learn = self.learner(**NET)
        if file.exists():
            learn.model.load_state_dict(torch.load(file))
            return learn
        items = self.world.items
        items = items[items.split == "train"]
        learn.fit_warmup(
            items, self.world.store, 15, best=False, n=64 if self.split else 256, sampler=sampler
        )
        with atomic_path(file) as tmp: torch.save(learn.model.state_dict(), tmp)
        return learn

def warm_alike(t): return t.warm(t.world.pools["train"].recipe["sampler"])
def listwise(t, learn): return learn.fit_listwise(t.epochs, 3e-3, temp=.2, **t.split)
def on_policy(t, learn, objective, lr, rounds=10, G=12):
    "As many different questions to the LVLM as the stored groups have rows, at most, and the greedy sequences"
    # 32 groups per batch
    w = t.world
    shots = shots_of(t.name)
    bs = 32 // len(shots)
    drawing = Drawing(
        G=G, shots=shots, queries_per_round=len(t.train.queries) // rounds, bs=bs, patience=None, seed=t.seed,
    )
    feedback = Feedback(w.scorer, w.items, FactCache(t.out / "facts" / "train"), Rewarding(reward=t.mode))
    return learn.fit_onpolicy(feedback, w.store, rounds, lr, objective, drawing)

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
    "warm-up in such pools": warm_alike, # another than "warm-up" with `--sampler` alone
    "warm-up in such pools, listwise": lambda t: listwise(t, warm_alike(t)),
    "on-policy rloo": lambda t: on_policy(t, t.learner(), "rloo", 1e-3),
    "on-policy grpo": lambda t: on_policy(t, t.learner(), "grpo", 1e-3),
    "warm-up, on-policy": lambda t: on_policy(t, t.warm(), "rloo", 1e-3),
    "warm-up, listwise, on-policy": lambda t: on_policy(t, listwise(t, t.warm()), "rloo", 3e-4),
    "reports, all four": mended,
    "reports, rce alone": lambda t: t.recipe("plan5-as-run", stage=dict(n_epoch=0)),
    "reports, no flat groups": lambda t: t.recipe("plan5-as-run", rce=dict(skip_flat=True), stage=dict(n_epoch=3)),
}

def everything(world, out, split, _made={}):
    "Exhaustive facts of dev or test, one and two shots"
    if split not in _made:
        file = (
            world.facts_file
            if split == "test" and world.pools[split].recipe["sampler"] == "random"
            else out / "facts" / f"{split}.parquet"
        )
        if not file.exists():
            cache = FactCache()
            ask(
                all_pointers(world.pools[split], (1, 2)),
                world.scorer,
                world.items,
                cache,
                window=4096,
                progress=True,
            )
            cache.save(file)
        _made[split] = FactCache(file).to_frame()
    return _made[split]

def judge(world, out, split, picks):
    "Picks of one shot count with the LVLM's verdicts"
    if picks.shots.iloc[0] <= 2: return score_picks(picks, everything(world, out, split)).assign(split=split)
    cache = FactCache(out / "facts" / f"{split}-more")
    ask(picks, world.scorer, world.items, cache)
    return score_picks(picks, cache.to_frame()).assign(split=split)

def best_found(world, out, split, S, width=8):
    """Facts of what a search finds: the best sequences of S-1, with every other candidate before and behind; a
    query whose accuracy is 1 is not searched any further
    """
    parents = everything(world, out, split) if S == 3 else best_found(world, out, split, S - 1, width)
    parents = parents[parents.pointer.map(len) == S - 1]
    parents = (
        parents.sort_values(["vqa_acc_score", "vqa_gt_prob"], ascending=False, kind="stable")
        .groupby("question_id")
        .head(width)
    )
    place, pool, cache, solved = (
        parents.groupby("question_id").cumcount(),
        world.pools[split],
        FactCache(out / "facts" / f"{split}-search"),
        set(),
    )
    found = []
    for lot in range(0, width, 2):
        todo = parents[place.isin((lot, lot+1)) & ~parents.question_id.isin(solved)]
        pairs = [
            (q, s)
            for q, p in zip(todo.question_id, todo.pointer)
            for c in pool[q]
            if c not in p
            for s in ((c, *p), (*p, c))
        ]
        pairs = pd.DataFrame(list(dict.fromkeys(pairs)), columns=["question_id", "pointer"])
        found.append(ask(pairs, world.scorer, world.items, cache, window=4096, progress=True))
        solved |= set(found[-1].question_id[found[-1].vqa_acc_score == 1])
    return pd.concat(found, ignore_index=True).drop_duplicates(["question_id", "pointer"], ignore_index=True)

def mean_of(facts, S, split):
    "Random demonstrations, exactly: the mean over all sequences"
    f = facts[facts.pointer.map(len) == S]
    m = f.groupby("question_id")[["vqa_acc_score", "vqa_gt_prob"]].mean().reset_index()
    return m.assign(
        selector="random",
        shots=S,
        draw=0,
        pointer=[()] * len(m),
        vqa_pred_answer="",
        eval_failed=False,
        split=split,
    )

def save(file, frames):
    frame = pd.concat(frames, ignore_index=True)
    with atomic_path(file) as tmp: frame.assign(pointer=frame.pointer.map(list)).to_parquet(tmp)

def baselines(world, out, shots):
    "What needs no training, once"
    for S in shots:
        if (file := out/"picks"/f"baselines-{S}.parquet").exists(): continue
        done = []
        for split in ("dev", "test"):
            pool = world.pools[split]
            facts = everything(world, out, split)
            done += [
                judge(world, out, split, f)
                for f in (
                    *(pick_similar(pool, world.store, S, k) for k in ("image", "text", "mixed")),
                    pick_mmr(pool, world.store, S),
                )
            ]
            if S <= 2:
                done += [judge(world, out, split, pick_oracle(facts, S, pool)), mean_of(facts, S, split)]
            else:
                done += [
                    judge(world, out, split, pick_random(pool, S, draws=5)),
                    score_picks(pick_oracle(more := best_found(world, out, split, S), S), more).assign(
                        split=split
                    ),
                ]
        save(file, done)

def shots_of(suite): return (1, 2, 3, 4) if suite.startswith("joint") else (2,)

def run(world, out, seeds, suites, methods):
    baselines(world, out, sorted({S for s in suites for S in shots_of(s)}))
    for seed in seeds:
        for name in suites:
            trial = None
            for m in methods:
                if (
                    file := out / "picks" / f"{name}_{m.replace(', ', '-').replace(' ', '_')}_{seed}.parquet"
                ).exists():
                    continue
                trial = trial or Trial(world, out, name, seed)
                start = time.perf_counter()
                done = []
                # a line per epoch, elsewhere welcome
                with warnings.catch_warnings(), open(os.devnull, "w") as null, contextlib.redirect_stdout(
                    null
                ):
                    warnings.simplefilter("ignore")
                    model = trial.train_by(m).model.eval()
                took = time.perf_counter() - start
                for split in ("dev", "test"):
                    for S in shots_of(name):
                        done.append(
                            judge(
                                world,
                                out,
                                split,
                                pick_model(model, world.pools[split], world.store, S, name=m, draw=seed),
                            ).assign(suite=name, seconds=took)
                        )
                save(file, done)
                print(
                    f"{name:12} {m:22} seed {seed}: dev accuracy {100*done[0].vqa_acc_score.mean():.1f},"
                    f" {took:.0f} s",
                    flush=True,
                )

def load(out, split):
    "All picks of a split; baselines belong to every suite"
    f = pd.concat([pd.read_parquet(p) for p in sorted((out / "picks").glob("*.parquet"))], ignore_index=True)
    f = f[f.split == split]
    return f.assign(pointer=f.pointer.map(tuple))

def store(out, file):
    "The scores alone, small enough to be kept beside the pages"
    f = pd.concat([load(out, s) for s in ("dev", "test")], ignore_index=True)[
        [
            "suite",
            "selector",
            "shots",
            "draw",
            "split",
            "question_id",
            "vqa_acc_score",
            "eval_failed",
            "seconds",
        ]
    ]
    with atomic_path(file) as tmp:
        f.astype(
            dict(
                suite="category",
                selector="category",
                split="category",
                shots="int8",
                draw="int8",
                vqa_acc_score="float32",
            )
        ).to_parquet(tmp, compression="zstd")

def of_suite(scored, suite): return scored[scored.suite.isna() | (scored.suite == suite)]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--suites", nargs="+", default=list(SUITES)[:4], choices=list(SUITES))
    p.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=[*METHODS, *(m + ACC for m in METHODS)]
    )
    p.add_argument(
        "--sampler",
        default="random",
        choices=list(SAMPLERS),
        help="of the pools; other than random in a folder of its own",
    )
    p.add_argument("--store", type=Path, help="write what the tables need into this parquet file, and stop")
    p.add_argument("--table", choices=["dev", "test"])
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    world = load_world(sampler=a.sampler)
    if (
        was := read_json(a.out / "pools.json") if (a.out / "pools.json").exists() else dict(sampler=a.sampler)
    ) != dict(sampler=a.sampler):
        p.error(f"{a.out} holds runs with pools {was}: take another folder")
    write_json(a.out/"pools.json", dict(sampler=a.sampler))
    if a.store: return store(a.out, a.store)
    if a.table is None: return run(world, a.out, a.seeds, a.suites, a.methods)
    scored = load(a.out, a.table)
    if a.table == "test": print(f"look number {count_look(a.out, scored)} at the test split")
    for name in a.suites:
        for S in shots_of(name):
            t = seeds_table(
                of_suite(scored, name),
                S,
                world.items,
                [
                    m
                    for m in ("sft", "rce (reports)", "rce + grpo (reports)")
                    if m in set(of_suite(scored, name).selector)
                ],
            )
            print(f"\n{name}, S = {S}\n{t.round(3).to_string()}")

if __name__ == "__main__": main()
