"""Do objectives that people expect help here? Each as a second stage after the same RCE, in two worlds.

`python bench/objectives.py OUT --world islands` and `... --world blind --root FOLDER [--okvqa FOLDER]` train every
objective with every seed and write what they pick on dev, judged, to OUT/{world}-{objective}-{seed}.parquet; what is
there is not done again. `--store FILE` puts all of OUT into one small file, `--table` prints it with intervals.

One setting for all, none tuned: the net of `MODEL`, RCE (10 epochs, 3e-3, temp .1) on accuracy, then six epochs
at 1e-3; ", from scratch" and listwise are ten epochs at 3e-3 and no start. Epochs are chosen by regret on a tenth of
the training questions; dev is seen once, by the judge. Islands: 500 training and 250 dev questions, random pools of
16, six pairs of the similarity prior and six random ones each. Blind: 1,140 training questions of OKVQA in text pools
of 16, sixteen pairs each, and 133 dev questions of which every pair was asked; `FOLDER` holds what its README says.
"""
import argparse, contextlib, os, time, warnings
from dataclasses import dataclass
from pathlib import Path
import numpy as np, pandas as pd, torch
from leverplus.callback_grpo import GRPO
from leverplus.callback_kl import KLToRef
from leverplus.callback_objectives import CISPO, GDPO, SAPO, BestOfK, CorrectedGRPO, PassK
from leverplus.core import atomic_path, rng
from leverplus.data import read_soft_labels
from leverplus.dls import group_dls
from leverplus.groups import FACT_COLUMNS, RLData, as_record
from leverplus.infer import candidates, pick_random, pick_similar
from leverplus.learner import selector_learner
from leverplus.pools import Pool
from leverplus.rewards import reward_mode
from leverplus.rldata_ask import FactCache, ask
from leverplus.rldata_propose import propose
from leverplus.settings import Proposing
from leverplus.statistics import seeds_bootstrap
from leverplus.world import load_world

S = 2
TRIED = 4   # sequences that `rerank` would try
PARTS = dict(soft_only=1., gtprob=1.)

@reward_mode
def sum_of_parts(
    vqa_acc_score:np.ndarray, # [n] 0..1
    vqa_gt_prob:np.ndarray, # [n] 0..1
)->np.ndarray: # [n] 0..2
    "Accuracy and the probability of the truth, as they are"
    return vqa_acc_score + vqa_gt_prob

@dataclass
class Trials:
    "What every objective is given in one world"
    name:str # of the world
    store:object # vectors: `get(ids, kind)`
    pools:dict # {train, dev: Pool}
    groups:RLData # training groups of two shots
    images:dict # {question_id of dev: image}
    accuracy:object # function of (question_id, pointer) rows: accuracies [n]
    similarity:str # kind of vectors by which the baseline retrieves

class TextVectors:
    "One vector per question, whatever kind is asked for"
    meta = dict(source=dict(clip="minilm-question"))
    fingerprint = "minilm-question"
    def __init__(self, ids, vectors):
        self.at = {int(q): i for i, q in enumerate(ids)}
        self.vectors = torch.nn.functional.normalize(torch.from_numpy(vectors.astype(np.float32)), dim=-1)

    def get(self, ids, kind="mixed"):
        rows = torch.tensor([self.at[int(q)] for q in np.ravel(np.asarray(ids))])
        return self.vectors[rows].reshape(*np.shape(ids), -1)

def islands(out):
    "The embedded world: groups are generated and picks are asked, once each"
    world = load_world()
    cache = FactCache(out / "facts")
    pool = world.pools["train"]
    counts = dict(temperature={1.: 6}, random=6)
    rows = propose(pool, world.store, world.ids("train")[:500], S, proposing=Proposing(counts=counts))
    facts = ask(rows, world.scorer, world.items, cache)
    rows = as_record(rows.join(facts[list(FACT_COLUMNS)]))

    def accuracy(picks): return ask(picks, world.scorer, world.items, cache).vqa_acc_score.to_numpy()
    images = world.items.image_id.loc[world.ids("dev")].to_dict()
    return Trials("islands", world.store, world.pools, RLData(rows, pool), images, accuracy, "mixed")

def blind(root, okvqa):
    "Real questions without pictures, and a real language model: everything is stored"
    z = np.load(root / "minilm.npz")
    store = TextVectors(z["question_id"], z["text"])
    stored = pd.read_parquet(root / "pools.parquet")
    stored = stored[stored.pool == "text"]
    rule = dict(sampler="text", K=16)
    pools = {}
    for split, part in stored.groupby("split"):
        ids = {q: tuple(map(int, c)) for q, c in zip(part.question_id, part.candidates)}
        pools[split] = Pool(ids, rule)

    def pairs(name):
        rows = pd.read_parquet(root / f"{name}-text.parquet")
        rows["pointer"] = rows.pointer.map(lambda p: tuple(map(int, p)))
        return rows[rows.pointer.map(len) == S].reset_index(drop=True)
    dev = pairs("dev").set_index(["question_id", "pointer"]).vqa_acc_score
    pools["dev"] = Pool({q: c for q, c in pools["dev"].ids.items() if q in dev.index.get_level_values(0)}, rule)

    def accuracy(picks): return dev.loc[list(zip(picks.question_id, picks.pointer))].to_numpy()
    items = read_soft_labels(okvqa, "train").set_index("question_id")
    images = items.image_id.loc[list(pools["dev"])].to_dict()
    return Trials("blind", store, pools, RLData(pairs("train"), pools["train"]), images, accuracy, "text")

def parts(t, seed):
    "Nine tenths of the training groups, and a tenth to choose epochs by"
    queries = t.groups.queries
    few = set(rng("objectives", t.name, seed).permutation(queries)[: len(queries)//10].tolist())
    held = t.groups.rows.question_id.isin(few)
    return [RLData(t.groups.rows[keep].reset_index(drop=True), t.groups.pool) for keep in (~held, held)]

def learner(t, seed, reward="soft_only"):
    return selector_learner(group_dls(*parts(t, seed), t.store, reward, bs=64, seed=seed), seed=seed, wd=.05)

def started(t, seed, reward="soft_only", _made={}):
    "A learner after RCE on accuracy, made once per seed"
    if (t.name, seed) not in _made:
        first = learner(t, seed)
        first.fit_rce(10, 3e-3, temp=.1)
        _made[t.name, seed] = {k: v.clone() for k, v in first.model.state_dict().items()}
    learn = learner(t, seed, reward)
    learn.model.load_state_dict(_made[t.name, seed])
    return learn

def then(*makers, reward="soft_only"):
    "A second stage after RCE: classes or functions that make its callbacks"
    def run(t, seed): return started(t, seed, reward).fit_stage(6, 1e-3, [make() for make in makers])
    return run

def alone(*makers):
    "The only stage of a new selector"
    def run(t, seed): return learner(t, seed).fit_stage(10, 3e-3, [make() for make in makers])
    return run

def kl_on_live(): return KLToRef(on="live")
def both_parts(): return GDPO(PARTS)
def one_try(): return BestOfK(1)
def best_of_tried(): return BestOfK(TRIED)

MAKERS = {
    "grpo": [GRPO],
    "grpo, kl": [GRPO, KLToRef],
    "grpo, kl on live groups": [GRPO, kl_on_live],
    "gdpo": [both_parts],
    "cispo": [CISPO],
    "sapo": [SAPO],
    "corrected grpo": [CorrectedGRPO],
    "pass@2": [PassK],
    "regret": [one_try],
    "best of 4": [best_of_tried],
}
NEW = ", from scratch"
OBJECTIVES = {
    "rce alone": started,
    "listwise": lambda t, seed: learner(t, seed).fit_listwise(10, 3e-3, temp=.2),
    "grpo, sum of parts": then(GRPO, reward="sum_of_parts"),
    **{name: then(*makers) for name, makers in MAKERS.items()},
    **{name + NEW: alone(*makers) for name, makers in MAKERS.items() if "kl" not in name},
}

def judged(t, picks, name, seed):
    "A row per question: accuracy of the first sequence, and of the best of those that are tried"
    picks = picks.assign(acc=t.accuracy(picks))
    of_query = picks.groupby("question_id", sort=False).acc
    frame = pd.DataFrame(dict(acc=of_query.first(), best=of_query.max())).reset_index()
    return frame.assign(world=t.name, objective=name, seed=seed, image=frame.question_id.map(t.images))

def baselines(t):
    "Random demonstrations, and the most similar ones"
    drawn = pick_random(t.pools["dev"], S, draws=5)
    out = [judged(t, f.reset_index(drop=True), "random", d).assign(best=np.nan) for d, f in drawn.groupby("draw")]
    near = pick_similar(t.pools["dev"], t.store, S, t.similarity)
    return [*out, judged(t, near, "similarity", 0).assign(best=np.nan)]

def save(file, frames):
    with atomic_path(file) as tmp: pd.concat(frames, ignore_index=True).to_parquet(tmp, index=False)

def run(t, out, seeds, names):
    file = out / f"{t.name}-baselines.parquet"
    if not file.exists(): save(file, baselines(t))
    for seed in seeds:
        for name in names:
            file = out / f"{t.name}-{name.replace(', ', '-').replace(' ', '_')}-{seed}.parquet"
            if file.exists(): continue
            start = time.perf_counter()
            with warnings.catch_warnings(), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
                warnings.simplefilter("ignore")
                model = OBJECTIVES[name](t, seed).model.eval()
            took = time.perf_counter() - start
            tried = candidates(model, t.pools["dev"], t.store, S, TRIED)
            frame = judged(t, tried, name, seed)
            save(file, [frame])
            print(f"{t.name} {name:24} seed {seed}: {100*frame.acc.mean():.1f}, {took:.0f} s", flush=True)

def read(out):
    return pd.concat([pd.read_parquet(p) for p in sorted(out.glob("*.parquet"))], ignore_index=True)

def store(out, file):
    "All scores in one small file"
    kinds = dict(world="category", objective="category", seed="int8", acc="float32", best="float32")
    with atomic_path(file) as tmp: read(out).astype(kinds).to_parquet(tmp, index=False, compression="zstd")

def compare(
    f:pd.DataFrame, # scores of one world
    reference:str="grpo", # objective that others are compared with
    column:str="acc", # "acc" of the first sequence | "best" of those that are tried
)->pd.DataFrame: # by objective: mean, difference to the reference with its interval; all in points
    "Objectives against one, over questions (clustered by image) and seeds; what starts anew against what does"
    def matrix(name): return f[f.objective == name].pivot(index="question_id", columns="seed", values=column)
    images = f.drop_duplicates("question_id").set_index("question_id").image
    rows = {}
    for name in f.objective.unique():
        begins_anew = name.endswith(NEW) or name == "listwise"
        base = matrix(reference + NEW if begins_anew else reference)
        x = matrix(name).loc[base.index]
        rows[name] = dict(points=100*x.to_numpy().mean())
        if x.isna().any(axis=None): continue
        paired = list(x) == list(base) and name != "random"   # the same seed: the same start, order, choice of epochs
        lead = seeds_bootstrap(x.to_numpy(), base.to_numpy(), images[base.index].to_numpy(), paired)
        rows[name] |= dict(over=100*lead.value, lo=100*lead.lo, hi=100*lead.hi)
    return pd.DataFrame.from_dict(rows, orient="index")

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--world", choices=["islands", "blind"])
    p.add_argument("--root", type=Path, help="folder of the stored blind world")
    p.add_argument("--okvqa", type=Path, help="folder of the OKVQA files; default beside --root")
    p.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    p.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--store", type=Path, help="write what the page needs into this parquet file")
    p.add_argument("--table", action="store_true", help="print what is there, with intervals")
    a = p.parse_args()
    if a.world == "blind" and a.root is None: p.error("--world blind needs --root, the folder of its stored facts")
    a.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(a.threads)
    if a.world == "islands": run(islands(a.out), a.out, a.seeds, a.objectives)
    if a.world == "blind": run(blind(a.root, a.okvqa or a.root.parent/"okvqa"), a.out, a.seeds, a.objectives)
    if a.store: store(a.out, a.store)
    if not a.table: return
    scores = read(a.out)
    for name, f in scores.groupby("world"):
        for column in ("acc", "best"):
            print(f"\n{name}, {column}\n{compare(f, column=column).round(1).to_string()}")

if __name__ == "__main__": main()
