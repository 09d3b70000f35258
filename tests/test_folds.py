"Folds of the training questions (bench/folds.py): who is left out, what is picked, what the table says"
import importlib, sys
import numpy as np, pandas as pd, pytest
from leverplus.core import repo_path
from leverplus.pools import image_groups
from leverplus.world import world

@pytest.fixture(scope="module")
def folds():
    "bench/folds.py, which imports its neighbour"
    sys.path.insert(0, str(repo_path("bench")))
    yield importlib.import_module("folds")
    sys.path.remove(str(repo_path("bench")))

@pytest.fixture(scope="module")
def trials(folds, blind_okvqa, tmp_path_factory):
    "Three folds of 90 training questions of the second world"
    from learning import Bench
    class Few(Bench):
        def groups(self, name, seed):
            train, dev = super().groups(name, seed)
            few = train.rows.question_id.isin(train.queries[:90])
            return folds.cut(train, few), folds.cut(dev, dev.rows.question_id.isin(dev.queries[:10]))
    w = world("blind_okvqa", root=blind_okvqa, pools="text")
    bench = Few(w, tmp_path_factory.mktemp("folds"))
    return [folds.FoldTrial(bench, "pairs and singles", 0, fold, 3) for fold in range(3)]

def test_every_question_is_left_out_once_and_no_picture_is_shared(trials):
    everything = [q for t in trials for q in t.held.queries]
    assert len(everything) == len(set(everything)) == 90
    for t in trials:
        items = t.world.items
        picture = pd.Series(image_groups(items), items.index)
        assert set(t.train.queries) == set(everything) - set(t.held.queries)
        assert not set(picture[t.train.queries]) & set(picture[t.held.queries])
        assert not set(t.bank.question_id) & set(t.held.queries)
        assert set(t.held.rows.pointer.map(len)) == {2} and set(t.train.rows.pointer.map(len)) == {1, 2}

def test_similarity_picks_the_most_similar_stored_pair(folds, trials):
    t = trials[0]
    picks = folds.rule_picks(t, "similar").set_index("question_id")
    assert set(picks.index) == set(t.held.queries)
    store = t.world.store
    for q, rows in t.held.groups():
        def cosine(d): return round(float(store.get([q], "text")[0] @ store.get([d], "text")[0]), 6)
        best = max(sum(map(cosine, p)) for p in rows.pointer)
        assert sum(map(cosine, picks.pointer[q])) == pytest.approx(best, abs=1e-5)

def test_a_method_is_trained_without_the_fold_and_judged_on_it(folds, trials):
    t = trials[0]
    frame = folds.frame_of(t, "recipe evidence")
    bounds = folds.frame_of(t, "bounds").set_index("question_id")
    low = bounds.vqa_acc_score[bounds.selector == "random"]
    high = bounds.vqa_acc_score[bounds.selector == "oracle"]
    own = frame.set_index("question_id").vqa_acc_score
    assert set(own.index) == set(t.held.queries) == set(low.index) == set(high.index)
    assert (own <= high[own.index]).all() and (low <= high[low.index]).all()
    one = t.held.rows[t.held.rows.question_id == own.index[0]]
    assert own.iloc[0] in one.vqa_acc_score.astype("float32").to_list()

def test_what_is_there_is_not_done_again(folds, trials):
    bench = trials[0].bench
    names = "bounds", "similar"
    files = folds.run_fold(bench, "pairs and singles", 0, 1, 3, names)
    made = [f.stat().st_mtime_ns for f in files]
    assert folds.run_fold(bench, "pairs and singles", 0, 1, 3, names) == files
    assert [f.stat().st_mtime_ns for f in files] == made
    assert set(pd.read_parquet(files[1]).question_id) == set(trials[1].held.queries)

def test_ties_go_to_the_next_value_and_then_to_the_first(folds):
    rows = pd.DataFrame(dict(question_id=[1, 1, 1, 2, 2], which=list("abcde")))
    first = np.array([.5, .5, .1, .2, .2])
    assert set(folds.liked_most(rows, first).which) == {"a", "d"}
    then = np.array([0., 1., 2., 0., 0.])
    assert set(folds.liked_most(rows, first, then).which) == {"b", "d"}

def table_of(folds, own, pictures):
    "The table of one selector whose questions could all be right, or all wrong"
    n = len(own)
    scores = dict(ours=own, random=[0.]*n, oracle=[1.]*n)
    frame = pd.concat([
        pd.DataFrame(dict(question_id=range(n), vqa_acc_score=score, selector=name))
        for name, score in scores.items()
    ]).assign(shots=2, draw=0, fold=0, eval_failed=False)
    items = pd.DataFrame(dict(question_id=range(n), image_id=pictures), index=range(n))
    return folds.folds_table(frame, 2, items).loc["ours"]

def test_share_and_standard_error_by_hand(folds):
    own = [1., 0., 0., 1., 0., 0., 0., 0.]
    row = table_of(folds, own, range(8))
    assert row.gap == pytest.approx(.25)
    assert row.se == pytest.approx(np.std(own, ddof=1)/np.sqrt(8))
    twice = table_of(folds, own*2, [*range(8), *range(8)])  # the same questions again tell nothing new
    assert twice.gap == pytest.approx(.25) and twice.se == pytest.approx(row.se)

def test_a_file_keeps_the_rows_of_other_selectors(folds, tmp_path):
    items = pd.DataFrame(dict(question_id=[7], image_id=[3]), index=[7])
    row = dict(question_id=[7], vqa_acc_score=[.5], shots=[2], draw=[0], fold=[0], eval_failed=[False])
    file = tmp_path/"folds.parquet"
    for name, acc in (("a", .25), ("b", .5), ("a", .75)):
        folds.store(file, pd.DataFrame(row | dict(selector=[name], vqa_acc_score=[acc])), items)
    there = pd.read_parquet(file).set_index("selector")
    assert there.vqa_acc_score.to_dict() == {"a": .75, "b": .5} and set(there.image_id) == {3}
