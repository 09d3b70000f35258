"""What a method is worth on training questions that it has not seen: picks among their stored sequences, by folds.

`python bench/folds.py OUT [--world islands] [--recipes ...] [--methods ...] [--rules ...] [--folds 5]` divides the
training questions of a world into folds that share no picture, trains each method on all folds but one, and lets it
pick among the stored sequences of each question of the fold that was left out. All of them were asked before, so this
needs nobody who answers, and it judges by more questions than a small dev split has. The table says which share of
the way from the mean to the best stored sequence is closed, with its standard error over questions (clustered by
picture). `bench/learning.py` says what methods, recipes, OUT, `--root` and `--pools` are.

Groups are those of `--suite`; the default is `pairs and singles` where groups lie in the world, and `dense-soft`
on the islands. Sequences of the largest shot count of the suite are picked. A method that chooses its epochs does so
on the world's dev split. The questions that are left out are in no warm-up; they stay demonstrations of the others.
Rules need little training or none (page 79): `similar`, `vote`, `logistic`, `knn_facts`.

Picks lie in OUT/folds, and what is there is not done again. `--store FILE` adds them, small, to a parquet file in
which other selectors keep their rows. `data/blind_okvqa_results/folds.parquet` was made by
`python bench/folds.py OUT --world blind_okvqa --root DIR --pools text --recipes evidence --store FILE`.
"""
import time
from pathlib import Path
import numpy as np, pandas as pd, torch
from learning import SUITES, Trial, cut, new_parser, of_shots, opened, quietly, wanted_methods
from leverplus.baselines import FactsNearby, Logistic, Vote, query_cosines
from leverplus.core import atomic_path
from leverplus.dls import GroupDataset
from leverplus.evaluate import seed_matrix, seeds_table
from leverplus.offpolicy import stored_logp
from leverplus.rldata_merge import split
from leverplus.statistics import Bootstrap, standard_error

# ---- folds -------------------------------------------------------------------------------------------------

class FoldTrial(Trial):
    "A suite and seed without the questions of one fold, which are `held`; folds are the same for all seeds"
    def __init__(self, bench, suite, seed, fold, folds):
        super().__init__(bench, suite, seed)
        self.fold = fold
        own = split(self.train, (1/folds,)*folds, seed=0, items=self.world.items)[fold]
        self.train = cut(self.train, ~self.train.rows.question_id.isin(own.queries))
        self.bank = self.bank[~self.bank.question_id.isin(own.queries)]
        longest = of_shots(own, max(self.shots))
        self.held = cut(longest, ~longest.rows.eval_failed)

def liked_most(rows, *values):
    "The row of each question with the largest value; of equals that with the largest next value, or the first"
    columns = {f"value {i}": np.round(value, 9) for i, value in enumerate(values)}
    order = rows[["question_id"]].assign(**columns)
    order = order.sort_values(list(columns), ascending=False, kind="stable")
    return rows.loc[order.index[~order.question_id.duplicated()]]

def model_picks(trial, method):
    "What a trained selector finds most probable"
    with quietly(): learn = trial.train_by(method)
    rows = trial.held.rows
    pool = trial.held.pool
    kind = learn.dls.info["kind"]
    data = GroupDataset(rows, pool, trial.world.store, rows.vqa_acc_score, kind)
    return liked_most(data.rows, stored_logp(learn.model.eval(), data))

# ---- rules -------------------------------------------------------------------------------------------------

class Similar:
    "Rule: the more similar, the better"
    def __init__(self, store, kind):
        self.store = store
        self.kind = kind

    def scores(self, query, candidates): return query_cosines(self.store, query, candidates, self.kind)

RULES = {
    "similar": lambda trial, kind: Similar(trial.world.store, kind),
    "vote": lambda trial, kind: Vote(trial.world.store, trial.world.items, kind),
    "logistic": lambda trial, kind: Logistic(trial.train, trial.world.store, trial.world.items, kind),
    "knn_facts": lambda trial, kind: FactsNearby(trial.train, trial.world.store, kind),
}

def worth(rule, query, candidates, S):
    "What candidates are worth to a rule anywhere [K], and beside that as the last one [K]"
    if hasattr(rule, "worth"): return rule.worth(query, candidates, S)
    return rule.scores(query, candidates), np.zeros(len(candidates))

def rule_picks(trial, name):
    "What a rule likes best; equals are told apart by their last demonstration, and then by similarity"
    kind = trial.bench.kinds[-1]
    rule = RULES[name](trial, kind)
    held = trial.held
    parts = []
    for q, rows in held.groups():
        candidates = held.pool[q]
        place = {c: i for i, c in enumerate(candidates)}
        seqs = np.array([[place[d] for d in p] for p in rows.pointer])  # [n,S]
        inner, last = worth(rule, q, candidates, seqs.shape[1])
        near = query_cosines(trial.world.store, q, candidates, kind)
        ends = seqs[:, -1]
        values = inner[seqs].sum(1) + last[ends], inner[ends], near[seqs].sum(1), near[ends]
        parts.append(liked_most(rows, *values))
    return pd.concat(parts)

# ---- runs and the table ------------------------------------------------------------------------------------

def scored(trial, selector, picks):
    "Picks as rows of a table"
    right = picks[["question_id", "vqa_acc_score"]].astype(dict(vqa_acc_score="float32"))
    S = max(trial.shots)
    return right.assign(selector=selector, shots=S, draw=trial.seed, fold=trial.fold, eval_failed=False)

def bounds_of(trial):
    "The mean and the best of the stored sequences, as rows of a table"
    rows = trial.held.rows
    mean = rows.groupby("question_id", sort=False, as_index=False).vqa_acc_score.mean()
    best = liked_most(rows, rows.vqa_acc_score)
    return pd.concat([scored(trial, "random", mean), scored(trial, "oracle", best)], ignore_index=True)

def file_of(bench, suite, selector, seed, fold, folds):
    plain = f"{suite}_{selector}".replace(", ", "-").replace(" ", "_")
    return bench.out/"folds"/f"{plain}_{seed}_{fold}-of-{folds}.parquet"

def frame_of(trial, name):
    "Rows of a table about the questions of a fold, by the name of a method or a rule, or `bounds`"
    if name == "bounds": return bounds_of(trial)
    picks = rule_picks(trial, name) if name in RULES else model_picks(trial, name)
    return scored(trial, name, picks)

def run_fold(bench, suite, seed, fold, folds, names):
    "Make what is not there yet of a fold and seed; all its files"
    files = {name: file_of(bench, suite, name, seed, fold, folds) for name in names}
    left = [name for name in names if not files[name].exists()]
    if not left: return list(files.values())
    trial = FoldTrial(bench, suite, seed, fold, folds)
    for name in left:
        start = time.perf_counter()
        frame = frame_of(trial, name)
        with atomic_path(files[name]) as tmp: frame.to_parquet(tmp)
        took = time.perf_counter() - start
        print(f"{suite}, seed {seed}, fold {fold}: {name} took {took:.0f} s", flush=True)
    return list(files.values())

def gap_error(frame, selector, S, items):
    "Standard error of the share of the gap, over questions of different pictures; seeds are averaged"
    names = selector, "random", "oracle"
    own, low, high = (seed_matrix(frame, name, S).mean(axis=1) for name in names)
    wide = (high - low).mean()
    share = (own - low).mean()/wide
    pictures = items.image_id.loc[own.index].to_numpy()
    return standard_error((own - low - share*(high - low)).to_numpy(), pictures)/wide

def folds_table(
    frame, # rows of `scored` and `bounds_of`
    S, # shot count
    items, # by question_id: `image_id`
    against=("similar",), # over whom a lead is wanted
):
    "Accuracy, share of the gap, its standard error and interval, spread over seeds, leads"
    there = set(frame.selector)
    others = [name for name in against if name in there]
    table = seeds_table(frame, S, items, others, bootstrap=Bootstrap(2000))
    errors = [gap_error(frame, name, S, items) for name in table.index]
    table.insert(3, "se", errors)
    return table

def store(file, frame, items):
    "Picks, small enough to be kept beside the pages; rows of other selectors stay"
    frame = frame.assign(image_id=items.image_id.loc[frame.question_id].to_numpy())
    if file.exists():
        there = pd.read_parquet(file)
        frame = pd.concat([frame, there[~there.selector.isin(frame.selector)]], ignore_index=True)
    small = dict(selector="category", shots="int8", draw="int8", fold="int8", vqa_acc_score="float32")
    with atomic_path(file) as tmp: frame.astype(small).to_parquet(tmp, compression="zstd")

def main():
    p = new_parser(__doc__)
    p.set_defaults(methods=[], seeds=[0])
    p.add_argument("--rules", nargs="*", default=list(RULES), choices=list(RULES), help="default: all")
    p.add_argument("--suite", choices=list(SUITES))
    p.add_argument("--folds", type=int, default=5)
    p.add_argument("--store", type=Path, help="add the picks to this parquet file")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    bench = opened(p, a)
    suite = a.suite or next(name for name in ("pairs and singles", "dense-soft") if name in bench.suites)
    if suite not in bench.suites: p.error(f"--suite {suite}: choose one of {', '.join(bench.suites)}")
    names = ["bounds", *a.rules, *wanted_methods(p, a, bench)]
    files = []
    for seed in a.seeds:
        for fold in range(a.folds): files += run_fold(bench, suite, seed, fold, a.folds, names)
    frame = pd.concat(map(pd.read_parquet, files), ignore_index=True)
    table = folds_table(frame, max(SUITES[suite].shots), bench.world.items)
    print(f"\n{bench.world.name}, {suite}, {a.folds} folds\n{table.round(3).to_string()}")
    if a.store: store(a.store, frame, bench.world.items)

if __name__ == "__main__": main()
