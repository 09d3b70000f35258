"Two worlds behind one door: what a world refuses, what it knows, and the real second world where its data are"
import json
from dataclasses import replace
from itertools import permutations
from math import perm
import numpy as np, pandas as pd, pytest
from leverplus.demo import run_demo
from leverplus.dls import GroupDataset
from leverplus.evaluate import score_picks
from leverplus.groups import METHODS, RLData, name_exhaustive
from leverplus.infer import pick_similar
from leverplus.lvlm import MockScorer
from leverplus.offpolicy import off_policy, stored_logp
from leverplus.pools import Pool, encoder_of, make_pool
from leverplus.rewards import reward
from leverplus.rldata_ask import FactCache
from leverplus.rldata_check import health
from leverplus.rldata_generate import TimeLimit
from leverplus.rldata_merge import by_counts, merge
from leverplus.rldata_propose import SimilarityPrior
from leverplus.sweep import sweep
from leverplus.world import (
    NoScorer, Stored, all_pointers, ask_everything, blind_okvqa_world, check_exhaustive, make_facts,
    okvqa_splits, world, world_numbers,
)
from conftest import ROOT

# ---- a small folder of the same kind as the second world ---------------------------------------------------

N, DEV = 40, 8

def answered(file, pools, shots, scorer="somebody", **more):
    "Somebody's answers: right where the first number that was shown is odd"
    said = all_pointers(pools, shots)
    right = np.array([float(p[0] % 2) if p else 0. for p in said.pointer])
    facts = dict(
        vqa_pred_answer="a", vqa_raw_generation="a", vqa_correct=right, vqa_acc_score=right, vqa_rel_token_f1=right,
        vqa_rel_edit_sim=right, vqa_rel_score=right, vqa_eval_mode="official", vqa_gt_prob=.2 + .5*right,
        eval_failed=False, error=None, scorer=scorer,
    )
    said.assign(pointer=said.pointer.map(list), **facts | more).to_parquet(file)

def write_info(root, seed=0, **recipes):
    settings = dict(n_dev=str(DEV), n_test="0", seed=str(seed))
    (root/"info.json").write_text(json.dumps(dict(settings=settings, recipes=recipes)))

@pytest.fixture()
def folder(tmp_path):
    "Forty questions, pools of five for all but the last ten of train, exhaustive answers"
    okvqa, root = tmp_path/"okvqa", tmp_path/"blind"
    okvqa.mkdir()
    root.mkdir()
    asked = [dict(question_id=i, image_id=i, question=f"What is {i}?") for i in range(1, N + 1)]
    labels = [dict(question_id=i, label={str(i % 3): 1., "other": .667}) for i in range(1, N + 1)]
    (okvqa/"OpenEnded_mscoco_train2014_questions.json").write_text(json.dumps(dict(questions=asked)))
    (okvqa/"train_soft_labels.json").write_text(json.dumps(labels))
    items = okvqa_splits(okvqa, DEV)
    bank = items[items.split == "train"]
    pools = dict(train=make_pool(bank[:-10], bank, 5), dev=make_pool(items[items.split == "dev"], bank, 5))
    rows = [
        dict(pool="text", split=split, question_id=q, candidates=list(pool[q]))
        for split, pool in pools.items() for q in pool
    ]
    pd.DataFrame(rows).to_parquet(root/"pools.parquet")
    np.savez(root/"minilm.npz", question_id=np.arange(1, N + 1), text=np.random.default_rng(0).normal(size=(N, 6)))
    write_info(root, **{f"text-{split}": pool.recipe for split, pool in pools.items()})
    answered(root/"train-text.parquet", pools["train"], (1, 2), gen_method="random")
    answered(root/"zero-train.parquet", pools["train"], (0,))
    answered(root/"dev-text.parquet", pools["dev"], (1, 2))
    return root

def test_a_folder_becomes_a_world(folder):
    w = world("blind_okvqa", root=folder)
    assert w.name == "blind_okvqa" and w.asking.style == "chat"
    assert {split: len(w.ids(split)) for split in w.pools} == dict(train=N - DEV - 10, dev=DEV)
    assert w.items.split.value_counts().to_dict() == dict(train=N - DEV, dev=DEV)
    assert w.exhaustive == ["dev"] and not w.can_ask
    assert len(w.facts("dev")) == DEV*(5 + 20)
    assert w.fingerprint == world("blind_okvqa", root=folder).fingerprint
    train = w.groups("train")
    assert train.shots == (0, 1, 2) and len(train) == (N - DEV - 10)*(1 + 5 + 20)
    assert w.groups("train", (1,)).shots == (1,)
    assert train.queries == w.ids("train")
    assert (w.groups("dev").rows.gen_method == "exhaustive").all()

def test_nobody_can_be_asked_and_it_says_where_somebody_can_be_had(folder):
    w = world("blind_okvqa", root=folder)
    pairs = pd.DataFrame(dict(question_id=w.ids("dev")[:1], pointer=[()]))
    for asks in (lambda: w.scorer.run([], []), lambda: w.scorer.fingerprint, lambda: make_facts(w, "dev")):
        with pytest.raises(NoScorer, match="extra `smol`"): asks()
    with pytest.raises(KeyError, match="there is no scorer to ask"): w.known_or_asked(pairs)
    known = w.groups("train").rows[["question_id", "pointer", "vqa_acc_score"]]
    assert w.known_or_asked(known).vqa_acc_score.tolist() == known.vqa_acc_score.tolist()

@pytest.mark.parametrize("name", ["pools.parquet", "info.json", "minilm.npz", "dev-text.parquet"])
def test_a_missing_file_is_named(folder, name):
    (folder/name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: .*copy the folder whole"): blind_okvqa_world(folder)

def test_missing_groups_are_named_when_they_are_wanted(folder):
    (folder/"zero-train.parquet").unlink()
    w = blind_okvqa_world(folder)
    with pytest.raises(FileNotFoundError, match="zero-train.parquet"): w.groups("train")
    assert len(w.facts("dev"))

def test_questions_of_okvqa_that_are_not_there(folder):
    with pytest.raises(FileNotFoundError, match="pass okvqa="): blind_okvqa_world(folder, okvqa=folder/"none")

def changed(folder, name, change):
    "Write a file again, changed"
    frame = pd.read_parquet(folder/name)
    frame = change(frame)
    frame.to_parquet(folder/name, index=False)

SPOILT = dict(
    outside=(lambda f: f.assign(pointer=[[39, 40]] + f.pointer.tolist()[1:]), "leaves the pool of its query"),
    twice=(lambda f: pd.concat([f, f.head(1)]), "occurs twice in the same order"),
    missing=(lambda f: f.drop(f.index[7]), r"has \d+ of \d+ sequences of"),
    scorers=(lambda f: f.assign(scorer=["another", *f.scorer[1:]]), "2 scorers"),
    contents=(lambda f: f.assign(content=12345), "about other questions"),
    column=(lambda f: f.assign(reward=1.), "unknown"),
)

@pytest.mark.parametrize("name", SPOILT)
def test_facts_that_do_not_belong_are_refused(folder, name):
    change, says = SPOILT[name]
    changed(folder, "dev-text.parquet", change)
    with pytest.raises(ValueError, match=says) as e: blind_okvqa_world(folder).facts("dev")
    assert "dev-text.parquet" in str(e.value)

def test_pools_of_other_questions_are_refused(folder):
    info = json.loads((folder/"info.json").read_text())
    write_info(folder, seed=1, **info["recipes"])
    with pytest.raises(ValueError, match="take their files"): blind_okvqa_world(folder)

def test_other_pools_and_splits_are_named(folder):
    with pytest.raises(ValueError, match="no pools 'image'; there are text"): blind_okvqa_world(folder, pools="image")
    w = blind_okvqa_world(folder)
    with pytest.raises(ValueError, match="no pools of split 'test'; it has train, dev"): w.ids("test")
    with pytest.raises(ValueError, match="no exhaustive facts of split 'train'; it has dev"): w.facts("train")
    with pytest.raises(ValueError, match="no stored groups of split 'test'"): w.groups("test")
    with pytest.raises(ValueError, match="no world 'okvqa'; there are islands, blind_okvqa, spoilt"):
        world("okvqa")

def test_vectors_of_questions_say_who_made_them(folder):
    store = blind_okvqa_world(folder).store
    assert encoder_of(store) == store.source["encoder"] == "all-MiniLM-L6-v2" and "clip" not in store.source

def test_test_questions_that_somebody_puts_there_are_read(folder):
    "Pools, questions and answers of a held-out split, dropped into the folder"
    okvqa = folder.parent/"okvqa"
    asked = [dict(question_id=i, image_id=i, question=f"What was {i}?") for i in range(101, 107)]
    labels = [dict(question_id=i, label={str(i % 3): 1.}) for i in range(101, 107)]
    (okvqa/"OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps(dict(questions=asked)))
    (okvqa/"val_soft_labels.json").write_text(json.dumps(labels))
    items = okvqa_splits(okvqa, DEV, 4)
    bank = items[items.split == "train"]
    pool = make_pool(items[items.split == "test"], bank, 5)
    rows = [dict(pool="text", split="test", question_id=q, candidates=list(pool[q])) for q in pool]
    pools = pd.concat([pd.read_parquet(folder/"pools.parquet"), pd.DataFrame(rows)])
    pools.to_parquet(folder/"pools.parquet", index=False)
    info = json.loads((folder/"info.json").read_text())
    info["settings"]["n_test"] = "4"
    info["recipes"]["text-test"] = pool.recipe
    (folder/"info.json").write_text(json.dumps(info))
    np.savez(folder/"minilm.npz", question_id=[*range(1, N + 1), *range(101, 107)], text=np.eye(N + 6))
    answered(folder/"test-text.parquet", pool, (1, 2), split="test", pool="text")
    w = blind_okvqa_world(folder)
    assert w.exhaustive == ["dev", "test"] and len(w.ids("test")) == 4
    assert len(w.facts()) == 4*25
    assert set(w.items.split) == {"train", "dev", "test"}

# ---- exhaustive rows ---------------------------------------------------------------------------------------

def test_exhaustive_rows_have_the_probability_of_a_stratum():
    pool = Pool({1: (11, 12, 13), 2: (11, 12, 13)})
    some = pd.DataFrame(dict(question_id=1, pointer=[(), (11,), (12,), (13,), (11, 12)], gen_method="random"))
    named = name_exhaustive(some, pool)
    assert named.gen_method.tolist() == [*["exhaustive"]*4, "random"]
    assert np.allclose(named.logprob_score[:4], [0, *[-np.log(3)]*3]) and np.isnan(named.logprob_score[4])
    assert (named.kappa[:4] == -np.inf).all() and np.isnan(named.kappa[4])
    assert name_exhaustive(some[1:3], pool).gen_method.tolist() == ["random"]*2

def test_an_estimate_from_exhaustive_rows_is_the_sum(folder):
    w = blind_okvqa_world(folder)
    data = w.groups("dev", (2,))
    assert "exhaustive" in METHODS
    ds = GroupDataset(data.rows, data.pool, w.store, reward(data.rows, "soft_only"))
    prior = SimilarityPrior(3.)
    f = off_policy(prior, ds, cut=None)
    assert (f.source == "exhaustive").all() and len(f) == DEV
    p = np.exp(stored_logp(prior, ds))
    by_hand = pd.Series(p*data.rows.vqa_acc_score.to_numpy()).groupby(data.rows.question_id.to_numpy()).sum()
    assert np.allclose(f.set_index("question_id").value.loc[by_hand.index], by_hand, atol=1e-4)

def test_exhaustive_rows_are_merged_balanced_and_examined(folder):
    data = blind_okvqa_world(folder).groups("dev", (2,))
    two = data.rows.groupby("question_id").head(4)
    others = RLData(two.assign(gen_method="random", kappa=np.nan), data.pool)
    both = merge(data, others, pools="same")
    assert len(both) == len(data) and set(both.rows.gen_method) <= {"exhaustive", "random"}
    assert both.rows.kappa.isna().all() # of two parents: nobody can tell what the second one left out
    again = name_exhaustive(both.rows, both.pool)
    assert (again.gen_method == "exhaustive").all() and (again.kappa == -np.inf).all()
    assert set(by_counts(data, min_positive=1).rows.gen_method) == {"exhaustive"}
    assert health({"groups": data}, "soft_only").frame["rows"].iloc[0] == len(data)

# ---- asking about everything -------------------------------------------------------------------------------

def asking_world(folder):
    w = blind_okvqa_world(folder)
    stored = Stored(dict(dev=folder/"own.parquet"))
    return replace(w, scorer=MockScorer(), stored=stored, items=w.items.assign(image_path="x.png"))

def test_everything_is_asked_in_step_until_the_time_is_over(folder):
    w = asking_world(folder)
    time = [0.]
    def tick(n):
        limit = TimeLimit(n, clock=lambda: time[0])
        inner = w.scorer.run
        def run(*args, **kw):
            time[0] += 1
            return inner(*args, **kw)
        slow = MockScorer()
        slow.run = run
        return ask_everything(replace(w, scorer=slow), ("train", "dev"), (1, 2), limit=limit, questions=4)
    some = tick(4.5)
    done = {split: facts.question_id.nunique()/len(w.ids(split)) for split, facts in some.items()}
    assert set(done) == {"train", "dev"} and max(done.values()) < 1
    assert abs(done["train"] - done["dev"]) <= .5
    for facts in some.values(): assert facts.groupby("question_id").size().eq(25).all()
    whole = tick(None)
    for split in some: check_exhaustive(whole[split], w.pools[split])

def test_facts_are_made_and_go_on_where_they_were(folder, tmp_path):
    w = asking_world(folder)
    with pytest.raises(TimeoutError, match="0 of 8 questions of dev"): make_facts(w, "dev", tmp_path/"f", seconds=0)
    file = make_facts(w, "dev", tmp_path/"f")
    assert file == folder/"own.parquet"
    again = FactCache(tmp_path/"f")
    assert len(again) == DEV*(1 + 5 + 20)
    facts = w.facts("dev")
    assert len(facts) == len(again)
    with pytest.raises(ValueError, match="holds what scorer .* said, and this one is"):
        replace(w, scorer=MockScorer(seed=1)).facts("dev")

# ---- what takes a world ------------------------------------------------------------------------------------

def test_a_sweep_needs_nobody_where_everything_is_known(folder, tmp_path):
    w = blind_okvqa_world(folder)
    groups = {split: w.groups(split, (2,)) for split in ("train", "dev")}
    grid = {"rce.lr": [1e-3, 1e-2]}
    frame = sweep(tmp_path/"s", grid, groups, w, seeds=[0], base={"rce.n_epoch": 1, "rce.watch": None, "bs": 4})
    assert frame.status.tolist() == ["done", "done"], frame.error.tolist()
    assert frame.acc.between(0, 1).all()

def test_the_demo_takes_what_is_stored(folder, tmp_path):
    w = blind_okvqa_world(folder)
    table = run_demo(
        tmp_path/"run", progress=False, world=w, table_shots=(2,), cases=2,
        recipes=dict(listwise=dict(listwise=dict(n_epoch=1, watch=None), data=dict(bs=4))), best="listwise",
    )
    assert {"random", "similar_text", "majority_vote", "listwise", "oracle"} <= set(table.selector)
    assert not {"zero_shot", "fixed"} & set(table.selector)
    assert not (tmp_path/"run"/"looks.json").exists()
    assert "dev split" in (tmp_path/"run"/"report.html").read_text()

# ---- the real one ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def real():
    root = ROOT.parent/"shared"/"data"/"blind_okvqa"
    if not root.is_dir(): pytest.skip("no data in ../shared/data/blind_okvqa")
    return world("blind_okvqa", root=root)

def test_the_real_world_is_what_its_readme_says(real):
    assert {split: len(real.ids(split)) for split in ("train", "dev")} == dict(train=1140, dev=133)
    assert (real.items.split == "train").sum() == 8708
    train = real.groups("train")
    assert train.shots == (0, 1, 2) and len(train) == 1140*33
    methods = train.rows.gen_method.value_counts().to_dict()
    assert methods == dict(exhaustive=1140*17, beam=1140*5, retrieval=1140*5, sample=1140*4, random=1140*2)
    assert (train.rows.content == 0).all()
    numbers = world_numbers(real, "dev", train.rows, kind="text")
    stored = json.loads((ROOT/"data"/"blind_okvqa_results"/"worlds.json").read_text())["OKVQA, text pools, dev"]
    assert numbers == pytest.approx(stored)
    assert numbers["random"] == pytest.approx(.056, abs=.001) and numbers["best"] == pytest.approx(.46, abs=.01)

def test_picks_of_the_real_world_are_looked_up(real):
    picks = pick_similar(real.pools["dev"], real.store, 2, "text")
    scored = score_picks(picks, real.facts("dev"))
    assert scored.vqa_acc_score.mean() == pytest.approx(.119, abs=.02)
    dev = real.groups("dev", (2,))
    assert dev.rows.groupby("question_id").size().eq(perm(16, 2)).all()
    assert set(map(len, real.pools["dev"].ids.values())) == {16}
    assert set(dev.rows.pointer[:240]) == set(permutations(real.pools["dev"][dev.queries[0]], 2))
