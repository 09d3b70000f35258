"The empty sequence in the data: proposed, asked about, kept, merged, examined; and a world where it is best"
import subprocess, sys
from itertools import product
import numpy as np, pandas as pd, pytest
import leverplus.earlier_json
from leverplus.core import read_json, world_path
from leverplus.callback_onpolicy import Feedback
from leverplus.dls import group_dls
from leverplus.embed import EmbedStore
from leverplus.groups import RLData
from leverplus.lvlm import MockScorer
from leverplus.pools import Pool
from leverplus.rldata_check import count_table, health, nothing_shown, row_facts
from leverplus.rldata_generate import generate
from leverplus.rldata_merge import by_shots, merge, query_table
from leverplus.rldata_propose import propose, zero_shot_rows
from leverplus.rewards import reward
from leverplus.settings import Guarding, Proposing, Rewarding
from leverplus.spoilt import HOME, free_count_table, lead, spoil, spoilt_questions, visited_episode
from leverplus.toy import DATASET, Scene, helps, say
from leverplus.world import read_islands
from conftest import ROOT

QUERIES = list(range(6))
DEMOS = list(range(100, 112))
POOL = Pool({q: tuple(DEMOS[q:q + 5]) for q in QUERIES}, dict(split="train", sampler="by hand", K=5))
g = np.random.default_rng(0)
STORE = EmbedStore(QUERIES + DEMOS, g.normal(size=(18, 4)), g.normal(size=(18, 4)))
ITEMS = pd.DataFrame(dict(
    question_id=QUERIES + DEMOS, image_id=QUERIES + DEMOS, image_path="x.png", question="What is it?",
    answer="cat", answers=[["cat"] * 10] * 18, split="train",
)).set_index("question_id", drop=False)

def generated(path, shots, **kw):
    return generate(path, QUERIES, ITEMS, POOL, MockScorer(), STORE, proposing=Proposing(shots=shots, **kw),
                    guarding=Guarding(test=4, window=4), progress=False)

# ---- proposals ---------------------------------------------------------------------------------------------

def test_nothing_is_proposed_once_per_query_and_by_its_name():
    rows = propose(POOL, STORE, [3, 1], S=0)
    assert rows.question_id.tolist() == [3, 1]
    assert rows.pointer.tolist() == [(), ()]
    assert set(rows.gen_method) == {"zero_shot"}
    unknown = ["logprob_score", "kappa", "similarity_score", "beam_rank", "temperature"]
    assert rows[unknown].isna().all(axis=None)
    with pytest.raises(KeyError): propose(POOL, STORE, [77], S=0)
    with pytest.raises(ValueError, match="twice"): propose(POOL, STORE, [1, 1], S=0)
    assert len(zero_shot_rows([])) == 0

@pytest.mark.parametrize("shots", [(0,), (0, 1, 2)])
def test_a_run_with_nothing_is_made_kept_and_continued(tmp_path, shots):
    data = generated(tmp_path/"run", shots)
    assert data.shots == shots
    alone = data.rows[data.rows.pointer.map(len) == 0]
    assert alone.question_id.tolist() == QUERIES
    assert alone.vqa_gt_prob.notna().all()
    again = generated(tmp_path/"run", shots)
    pd.testing.assert_frame_equal(again.rows, data.rows)
    assert RLData.load(tmp_path/"run").fingerprint == data.fingerprint

def test_the_others_are_proposed_as_without_it(tmp_path):
    both = by_shots(generated(tmp_path/"both", (0, 2)), 2)
    pd.testing.assert_frame_equal(both.rows, generated(tmp_path/"alone", 2).rows)

def test_two_stages_and_merging_know_it(tmp_path):
    data = generated(tmp_path/"two", (0, 1), two_stage=dict(top=3))
    assert len(data.rows) > len(data.rows.vqa_acc_score.dropna())
    alone = generated(tmp_path/"zero", 0)
    shown = generated(tmp_path/"two shots", 2)
    joined = merge(alone, shown)
    assert joined.shots == (0, 2)
    assert len(joined) == len(alone) + len(shown)
    assert len(merge(joined, alone)) == len(joined)

@pytest.mark.parametrize("dialect", ["v1", "merged", "v4", "k64"])
def test_files_of_earlier_programs_keep_it(tmp_path, dialect):
    data = generated(tmp_path/"run", (0, 1))
    more = {} if dialect in ("v4", "k64") else dict(id_map="question_id")
    data.to_json(tmp_path/"out.json", dialect, items=ITEMS, **more)
    if dialect in ("v1", "merged"): more["dialect"] = dialect
    if dialect != "k64": more["pool"] = data.pool
    again = RLData.from_json(tmp_path/"out.json", items=ITEMS, **more)
    columns = ["question_id", "pointer", "gen_method"]
    def keyed(d): return sorted(map(tuple, d.rows[columns].to_numpy().tolist()))
    assert keyed(again) == keyed(data)

# ---- a price -----------------------------------------------------------------------------------------------

def test_feedback_takes_the_price_off_and_says_so():
    pairs = pd.DataFrame(dict(question_id=[0, 0, 0], pointer=[(), (100,), (100, 101)]))
    def feedback(**kw): return Feedback(MockScorer(), ITEMS, rewarding=Rewarding(reward="gtprob", **kw))
    np.testing.assert_allclose(feedback(price=.25)(pairs), feedback()(pairs) - [0, .25, .5])
    assert feedback(price=0.).fingerprint == feedback().fingerprint != feedback(price=.25).fingerprint

def test_the_price_is_kept_beside_the_mode_in_what_a_checkpoint_records(tmp_path):
    data = by_shots(generated(tmp_path/"run", (0, 1, 2)), (1, 2))
    def of(queries): return RLData(data.rows[data.rows.question_id.isin(queries)], data.pool.only(queries))
    dls = group_dls(of(QUERIES[:3]), of(QUERIES[3:]), STORE, reward="gtprob", price=.25)
    assert dls.info["reward"] == dict(mode="gtprob", price=.25)
    paid = data.rows.vqa_gt_prob - .25*data.rows.pointer.map(len)
    np.testing.assert_allclose(reward(data.rows, "gtprob", price=.25), paid)
    assert query_table(data, "gtprob", price=.25).high.max() < query_table(data, "gtprob").high.max()

# ---- health ------------------------------------------------------------------------------------------------

def test_a_file_that_never_shows_nothing_says_nothing_about_it(tmp_path):
    seen = health(generated(tmp_path/"run", 2))
    m = seen.frame.iloc[0]
    assert nothing_shown(m) == ""
    assert np.isnan(m.zero_shot) and m.live_shown == m.live_groups
    assert "nothing shown" not in set(seen.table()[""])
    with pytest.raises(ValueError, match="shots="): seen.plot_alone()

def test_counts_are_compared_on_the_same_queries(tmp_path):
    data = generated(tmp_path/"run", (0, 1, 2))
    lost = ((data.rows.question_id == 2) & (data.rows.pointer.map(len) == 1)).to_numpy()
    less = RLData(data.rows[~lost], data.pool)
    table = count_table(row_facts(less.rows, "gtprob"))
    assert table.queries.tolist() == [5] * 4
    assert table.index.tolist() == [0, 1, 2, "free"]
    assert table.blind["free"] >= table.blind[:3].max()
    assert table.best_for[:3].sum() == pytest.approx(1)
    assert len(count_table(row_facts(by_shots(data, 2).rows))) == 0

def test_where_nothing_helps_the_verdict_says_so(tmp_path):
    data = generated(tmp_path/"run", (0, 2))
    alone = data.rows.pointer.map(len) == 0
    facts = dict(vqa_acc_score=alone * 1., vqa_correct=alone * 1.)
    seen = health(RLData(data.rows.assign(**facts), data.pool))
    assert seen.frame.pct_spoilt_all.iloc[0] == 100
    assert "nothing helps" in [a.cause for a in seen.verdict]
    patient = health(RLData(data.rows.assign(**facts), data.pool), nothing=1.)
    assert "nothing helps" not in [a.cause for a in patient.verdict]
    assert len(seen.plot_alone().lines) == 3

# ---- the spoilt islands ------------------------------------------------------------------------------------

def test_visitors_are_believed_and_nothing_else_changes():
    told = 0
    for k in range(60):
        demos, query = visited_episode(np.random.default_rng(k), k % 4)
        if query.scene.island != HOME: continue
        known = set().union(*(helps(d, query) for d in demos))
        english = dict(shape=query.scene.shape, colour=query.scene.colour)
        traits = ("colour", "shape") if query.ask == "both" else (query.ask,)
        words = dict(zip(traits, query.answer.split()))
        for trait, word in words.items():
            assert (word == english[trait]) == (trait not in known)
            told += trait in known
    assert told > 3

def test_the_spoilt_islands_are_the_islands_but_for_what_visitors_said():
    items = read_islands()
    truth = read_json(world_path(DATASET, "truth.json"))
    spoilt = spoil(items, truth)
    changed = spoilt.index[spoilt.answer != items.answer]
    island = items.image_id.map(lambda i: truth["scenes"][str(i)][0])
    home = items.index[(island == HOME) & (items.split == "train")]
    assert set(changed) <= set(home)
    assert len(changed) > .95*len(home)      # where annotators tied, the islands had a visitor's word already
    pd.testing.assert_frame_equal(spoilt.drop(columns="answer"), items.drop(columns="answer"))
    for q in home:
        _, shape, colour = truth["scenes"][str(items.image_id[q])]
        elsewhere = [Scene(i, shape, colour) for i in truth["dictionary"] if i != HOME]
        said = [say(scene, items.question_type[q], truth["dictionary"]) for scene in elsewhere]
        assert spoilt.answer[q] in said
    for split in ("train", "dev", "test"):
        chosen = spoilt_questions(items, truth, split)
        assert len(chosen) == len(set(chosen)) == 3 * (island[chosen] == HOME).sum()
        assert set(items.split[chosen]) == {split}

BY_NAME = """
import sys
from leverplus.world import world
assert "leverplus.spoilt" not in sys.modules
w = world("spoilt", pools="random", device="cpu")
bank = w.store.evidence
assert [bank.texts[i] for i in bank.shown.tolist()] == w.items.answer[bank.ids].tolist()
print(w.name, w.pools["dev"].recipe["sampler"], len(bank))
"""

def test_the_spoilt_islands_are_read_by_their_name_alone():
    "In a process that has imported nothing else; what the bank shows is what the visitors said"
    done = subprocess.run([sys.executable, "-c", BY_NAME], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["spoilt", "random", "900"]

def test_a_lead_is_paired_and_has_the_sign_of_its_name():
    rows = []
    for name, seed, q in product("ab", range(3), range(40)):
        rows.append((name, seed, "dev", q, q, 1, float(name == "a" or q % 2)))
    columns = ["selector", "seed", "split", "question_id", "image_id", "shown", "acc"]
    picks = pd.DataFrame(rows, columns=columns)
    ahead = lead(picks.sample(frac=1, random_state=0), "a", "b", "dev")
    assert ahead.value == pytest.approx(.5) and 0 < ahead.lo < ahead.hi
    table = free_count_table(picks, against="a")
    assert table.loc[("dev", "b"), "lead"] == pytest.approx(.5)
    assert np.isnan(table.loc[("dev", "a"), "lead"])
