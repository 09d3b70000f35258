"The whole table of a comparison: what its parts make, nothing asked twice, refused where it would mislead"
import math
from dataclasses import fields, replace
import pandas as pd, pytest, torch
from leverplus.core import rng
from leverplus.embed import EmbedStore
from leverplus.evaluate import (
    best_fixed, chosen_counts, counts_table, fixed_pairs, majority_vote, paired_tests, pick_baselines,
    pick_oracle, result_table, score_picks, size_table, subsets, table_text, vote_of_all,
)
from leverplus.groups import RLData
from leverplus.infer import pick_model, pick_rule, rule_of
from leverplus.lvlm import MockScorer
from leverplus.pools import Pool
from leverplus.groups import OtherContents
from leverplus.rldata_ask import FactCache, ask, facts_fingerprint
from leverplus.rldata_generate import policy_fingerprint, run_lock
from leverplus.runs import Busy, Run
from leverplus.selector import PointerSelector
from leverplus.settings import Asking, Rows, change, read_settings
from leverplus.table import Asked, facts_beside, full_table, plan_table
from leverplus.world import all_pointers

DEV = range(10, 18)
TEST = range(12)
DEMOS = range(100, 130)
IDS = [*range(20), *DEMOS]
ITEMS = pd.DataFrame(
    dict(
        question_id=IDS,
        image_id=IDS,
        image_path=[f"{i}.jpg" for i in IDS],
        question=[f"what is {i}?" for i in IDS],
        answer=[f"word{i % 3}" for i in IDS],
        answers=[[f"word{i % 3}"]*7 + ["other"]*3 for i in IDS],
    ),
    index=IDS,
)
BOTH = [torch.randn(len(IDS), n, generator=torch.Generator().manual_seed(n)) for n in (5, 6)]
STORE = EmbedStore(IDS, *BOTH, {})
K = 5

def pool_of(queries):
    g = rng("test table", list(queries))
    ids = {q: tuple(int(d) for d in 100 + g.choice(30, K, replace=False)) for q in queries}
    return Pool(ids, {"sampler": "random", "K": K})

class Counts(MockScorer):
    "A scorer that counts what it is asked, and breaks off after `stop` prompts"
    def __init__(self, stop=math.inf, **kw):
        super().__init__(**kw)
        self.stop = stop
        self.asked = []
    def run(self, prompts, *args, **kw):
        for p in prompts:
            if len(self.asked) >= self.stop: raise KeyboardInterrupt
            self.asked.append((p.question_id, tuple(p.pointer)))
        return super().run(prompts, *args, **kw)

def asked_of(scorer=None, queries=TEST, split="test"):
    return Asked(ITEMS, STORE, pool_of(queries), scorer or Counts(), split, data="words")

def shaken(seed):
    model = PointerSelector(STORE.dim("mixed"), d_hidden=8)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in model.parameters(): weights.add_(torch.randn(weights.shape, generator=g))
    return model

MODELS = dict(one=shaken(1), other=shaken(2))
ROWS = Rows(shots=(1, 2), draws=2, fixed=3, sizes=(6, "all"), seed=3)
JUDGES = asked_of(queries=DEV, split="dev")

UNLEARNED = "knn_facts, logistic: no rows, they learn from stored groups (groups=)"

def make(path, scorer=None, rows=ROWS, models=MODELS, judges=JUDGES, **kw):
    return full_table(path, asked_of(scorer), models, rows, judges=judges, progress=False, **kw)

def by_hand(rows, models):
    "(scored, the facts about its questions): the same out of the parts of page 82"
    scorer = Counts()
    pool = pool_of(TEST)
    fixed = {}
    for S in rows.shots:
        said = ask(fixed_pairs(JUDGES.pool, S, rows.fixed, rows.seed), scorer, ITEMS)
        fixed[S] = best_fixed(said, S)[0]
    picks = [pick_baselines(pool, STORE, rows.shots, rows.draws, fixed, ITEMS, rows.seed)]
    picks += [pick_model(m, pool, STORE, S, name=name) for name, m in models.items() for S in rows.shots]
    picks = pd.concat(picks, ignore_index=True)
    facts = ask(picks[["question_id", "pointer"]].drop_duplicates(), scorer, ITEMS)
    oracle = [pick_oracle(facts, S, pool) for S in rows.shots]
    similar = picks[picks.selector == "similar_mixed"]
    votes = [majority_vote(similar[similar.shots == S], ITEMS) for S in rows.shots]
    votes.append(vote_of_all(pool, STORE, ITEMS, rows.shots))
    return pd.concat([score_picks(pd.concat([picks, *oracle], ignore_index=True), facts), *votes]), facts

# ---- what it says ------------------------------------------------------------------------------------------

def test_the_table_is_what_its_parts_make(tmp_path):
    made = make(tmp_path/"run")
    scored, _ = by_hand(ROWS, MODELS)
    pd.testing.assert_frame_equal(made.scored.reset_index(drop=True), scored.reset_index(drop=True))
    pd.testing.assert_frame_equal(made.table, result_table(scored, ITEMS))
    pd.testing.assert_frame_equal(made.tests, paired_tests(scored, ITEMS))
    some = subsets(list(TEST), ROWS.sizes, ROWS.seed)
    pd.testing.assert_frame_equal(made.sizes, size_table(scored, some, 2, ITEMS))
    run = Run(tmp_path/"run")
    assert run.frame("results.csv").selector.tolist() == made.table.selector.tolist()
    assert run.frame("tests.csv").verdict.tolist() == made.tests.verdict.tolist()
    kept = run.frame("predictions.parquet")
    assert [tuple(p) for p in kept.pointer] == [tuple(p) for p in scored.pointer]
    assert run.metrics == dict(looks=1, questions=12, failed=0)
    text = repr(made)
    assert text == made.text()
    assert text.startswith(table_text(made.table, 1, "test"))
    assert "fixed, 1 shot: the best of 3 sequences" in text
    for word in ("looks at test: 1", "lower bound", "half_width", "p_holm"): assert word in text
    assert "flatters" not in text

def test_one_shot_count_places_zero_shot_and_needs_no_selector(tmp_path):
    rows = Rows(shots=(0, 2), draws=2, fixed=0)
    made = make(tmp_path/"run", rows=rows, models=None, judges=None)
    zero = made.table.set_index("selector").loc["zero_shot"]
    assert not math.isnan(zero.gap_closed)
    assert "fixed" not in set(made.table.selector)
    assert (made.tests, made.sizes) == (None, None)
    assert "tests.csv" not in made.run.files()
    two = make(tmp_path/"two", rows=change(rows, shots=(1, 2)), models=None, judges=None)
    assert math.isnan(two.table.set_index("selector").loc["zero_shot"].gap_closed)

def test_an_exact_oracle_is_asked_everything_and_called_exact(tmp_path):
    scorer = Counts()
    made = make(tmp_path/"run", scorer, Rows(shots=(1, 2), exact_oracle=True, fixed=0), judges=None)
    every = ask(all_pointers(pool_of(TEST), (1, 2)), Counts(), ITEMS)
    best = every.groupby([every.question_id, every.pointer.map(len)]).vqa_acc_score.max()
    oracle = made.scored[made.scored.selector == "oracle"]
    got = oracle.set_index(["question_id", "shots"]).vqa_acc_score
    assert (got == best.loc[got.index]).all()
    assert made.text().count("exact: every ordered sequence of every pool was asked") == 2
    assert len(scorer.asked) == len(TEST)*(1 + K + K*(K - 1))

def test_what_a_selector_reads_is_what_it_was_trained_on(tmp_path):
    model = PointerSelector(STORE.dim("text"), d_hidden=8)
    model.info = dict(kind="text", pool=dict(pool_of(TEST).rule, sampler="text"))
    rows = Rows(fixed=0, draws=1)
    with pytest.raises(ValueError, match="sampler: 'text' in the checkpoint"):
        make(tmp_path/"run", rows=rows, models=dict(mine=model), judges=None)
    made = make(tmp_path/"other", rows=change(rows, other_pool=True), models=dict(mine=model), judges=None)
    want = pick_model(model, pool_of(TEST), STORE, 2, "text", other_pool=True).pointer
    assert made.scored[made.scored.selector == "mine"].pointer.tolist() == want.tolist()

# ---- rows that learn from facts, and free numbers ------------------------------------------------------------

def test_rules_join_where_there_are_groups(tmp_path):
    train = pool_of(DEV)
    tried = [(q, (d,)) for q in train for d in train[q]]
    facts = ask(pd.DataFrame(tried, columns=["question_id", "pointer"]), Counts(), ITEMS)
    groups = RLData(facts.assign(gen_method="random"), train)
    rows = Rows(shots=(1, 2), draws=1, fixed=0)
    made = make(tmp_path/"run", rows=rows, models=None, judges=None, groups=groups)
    assert {"vote", "knn_facts", "logistic"} <= set(made.table.selector)
    assert UNLEARNED not in made.notes
    assert made.run.fingerprints["groups"] == groups.fingerprint
    for name in ("vote", "knn_facts", "logistic"):
        rule = rule_of(name, STORE, ITEMS, groups)
        want = pick_rule(rule, pool_of(TEST), 2, name).pointer.tolist()
        own = made.scored[(made.scored.selector == name) & (made.scored.shots == 2)]
        assert own.pointer.tolist() == want

def test_a_selector_with_stop_has_a_free_row(tmp_path):
    free = PointerSelector(STORE.dim("mixed"), d_hidden=8, max_shots=2, stop=True)
    torch.manual_seed(0)
    with torch.no_grad(): free.stop.weight.normal_()
    rows = Rows(shots=(1, 2), draws=2, fixed=0)
    made = make(tmp_path/"run", rows=rows, models=dict(ours=free, one=MODELS["one"]), judges=None)
    own = made.scored[made.scored.selector == "ours_free"]
    assert own.pointer.tolist() == pick_model(free, pool_of(TEST), STORE, None).pointer.tolist()
    assert own.pointer.map(len).nunique() > 1 and "one_free" not in set(made.scored.selector)
    pd.testing.assert_frame_equal(made.counts, counts_table(made.scored, ITEMS))
    want = chosen_counts(made.scored, "ours_free", ["zero_shot", "ours"])
    pd.testing.assert_frame_equal(made.chosen["ours_free"], want)
    assert "counts.csv" in made.run.files() and "ours_free" in made.text()
    assert made.run.frame("predictions.parquet").pointer.map(len).min() == 0
    with pytest.raises(ValueError, match="of a free row"):
        make(tmp_path/"x", rows=rows, models=dict(ours_free=free), judges=None)

# ---- a fixed row -------------------------------------------------------------------------------------------

def test_a_fixed_sequence_is_chosen_on_other_questions_or_said_to_flatter(tmp_path):
    rows = Rows(shots=1, fixed=6, draws=1)
    facts = ask(fixed_pairs(JUDGES.pool, 1, 6, 0), Counts(), ITEMS)
    acc = facts.groupby("pointer").vqa_acc_score.mean()
    best = min(acc.index, key=lambda p: (-acc[p], p))
    made = make(tmp_path/"run", rows=rows, models=None)
    assert set(made.scored[made.scored.selector == "fixed"].pointer) == {best}
    note = "fixed, 1 shot: the best of 6 sequences on 8 questions of dev"
    assert made.notes == [UNLEARNED, f"{note} ({acc[best]:.3f} there)"]
    own = make(tmp_path/"own", rows=change(rows, fixed_from="test"), models=None, judges=None)
    assert own.notes[-1].endswith("chosen on the questions of this table, so its row flatters")
    none = make(tmp_path/"none", rows=change(rows, fixed_from="train"), models=None, judges=None)
    assert "fixed" not in set(none.table.selector)
    assert none.notes == ["fixed: no row, demonstrations come from train, choose on another split", UNLEARNED]
    with pytest.raises(ValueError, match="pass judges="): make(tmp_path/"x", rows=rows, judges=None)
    with pytest.raises(ValueError, match="judges are of 'dev', fixed_from is 'val'"):
        make(tmp_path/"x", rows=change(rows, fixed_from="val"))
    assert not (tmp_path/"x").exists()

# ---- asking ------------------------------------------------------------------------------------------------

def test_nothing_is_asked_twice_and_the_plan_is_kept(tmp_path):
    scorer = Counts()
    made = make(tmp_path/"run", scorer)
    plan = plan_table(ROWS, len(TEST), len(MODELS), K, len(DEV))
    assert len(scorer.asked) == len(set(scorer.asked)) <= plan["prompts"]
    # again: the run's own facts
    again = make(tmp_path/"run", Counts(stop=0))
    pd.testing.assert_frame_equal(again.scored, made.scored)
    assert again.looks == 1
    # another run that knows them, as a folder or as a file
    FactCache(tmp_path/"run"/"facts").save(tmp_path/"facts.parquet")
    for name, place in (("a", tmp_path/"run"/"facts"), ("b", tmp_path/"facts.parquet")):
        other = make(tmp_path/name, Counts(stop=0), facts=[place])
        pd.testing.assert_frame_equal(other.table, made.table)
        assert "facts" not in other.run.files()
    # of another scorer, or asked in another way: they do not count
    known = [tmp_path/"facts.parquet"]
    chat = Asking(style="chat")
    with pytest.raises(KeyboardInterrupt): make(tmp_path/"c", Counts(stop=0, seed=1), facts=known)
    with pytest.raises(KeyboardInterrupt): make(tmp_path/"d", Counts(stop=0), asking=chat, facts=known)
    with pytest.raises(FileNotFoundError, match="no such facts"): make(tmp_path/"e", facts=[tmp_path/"none"])

def test_facts_of_others_lift_the_oracle(tmp_path):
    pairs = all_pointers(pool_of(TEST), (2,))
    ask(pairs, Counts(), ITEMS, FactCache(tmp_path/"known"))
    best = FactCache(tmp_path/"known").to_frame().groupby("question_id").vqa_acc_score.max()
    def oracle(**kw):
        made = make(tmp_path/str(len(kw)), rows=Rows(draws=1, fixed=0), judges=None, **kw)
        return made.scored[made.scored.selector == "oracle"].set_index("question_id").vqa_acc_score
    alone = oracle()
    helped = oracle(facts=[tmp_path/"known"])
    assert (helped == best.loc[helped.index]).all()
    assert (helped >= alone.loc[helped.index]).all()
    assert helped.sum() > alone.sum()

def test_what_is_known_about_replaced_pictures_counts_nowhere(tmp_path):
    "Neither as an answer nor for the oracle; and a table that began with them is not continued"
    (tmp_path/"a").mkdir()
    items = ITEMS.assign(image_path=[str(tmp_path/"a"/f"{i}.jpg") for i in IDS])
    for i in IDS: (tmp_path/"a"/f"{i}.jpg").write_bytes(f"picture {i}".encode())
    pairs = all_pointers(pool_of(TEST), (2,))
    said = ask(pairs, Counts(), items)
    FactCache(tmp_path/"known").add(said.assign(vqa_acc_score=1., vqa_correct=1.))      # an oracle without a fault
    def table(name, **kw):
        asked = replace(asked_of(), items=items)
        return full_table(tmp_path/name, asked, rows=Rows(draws=1, fixed=0), progress=False, **kw)
    def oracle(made): return made.scored[made.scored.selector == "oracle"].vqa_acc_score
    assert (oracle(table("old", facts=[tmp_path/"known"])) == 1).all()
    for i in IDS: (tmp_path/"a"/f"{i}.jpg").write_bytes(f"another picture {i}".encode())
    with pytest.warns(UserWarning, match="are about other questions, answers or pictures"):
        helped = table("new", facts=[tmp_path/"known"])
    pd.testing.assert_frame_equal(helped.table, table("alone").table)
    assert oracle(helped).mean() < 1
    with pytest.raises(OtherContents, match="the pictures of question_id 0, 1, "): table("old")
    assert (oracle(table("old", overwrite=True)) == oracle(helped)).all()

@pytest.mark.parametrize("after", [5, 60])
def test_broken_off_and_continued_is_uninterrupted(tmp_path, after):
    whole = make(tmp_path/"whole")
    with pytest.raises(KeyboardInterrupt): make(tmp_path/"cut", Counts(stop=after))
    assert Run(tmp_path/"cut").finished is None
    assert "results.csv" not in Run(tmp_path/"cut").files()
    pd.testing.assert_frame_equal(make(tmp_path/"cut").table, whole.table)

def test_the_plan_counts_by_hand():
    test = plan_table(Rows(shots=(1, 2), draws=5, fixed=4), 100, 3, 16, judges=20)
    assert test["prompts"] == 100*(1 + 3 + 2*(5 + 8 + 3 + 1)) + 4*20*2
    assert test["rows"] == "2 x (5 random, 8 plain rules, 3 selectors), zero-shot, votes, oracle (best found)"
    assert test["fixed"] == "4 sequences x 20 questions of dev x 2 shot counts, to choose one"
    exact = plan_table(Rows(exact_oracle=True), 250, 0, 16)
    assert (exact["prompts"], exact["fixed"]) == (250*240, "no row")
    assert "oracle (exact)" in exact["rows"]

def test_facts_beside_a_data_set(tmp_path):
    assert [p.name for p in facts_beside("data/islands")] == ["facts.parquet"]
    assert facts_beside(tmp_path) == []

# ---- settings ----------------------------------------------------------------------------------------------

OTHERS = dict(
    shots=(2,), draws=1, fixed=2, fixed_from="test", exact_oracle=True, kind="mixed", other_pool=True, seed=4, price=.1,
)

def test_settings_lie_in_the_run_as_they_are_and_come_back(tmp_path):
    asking = Asking(style="chat", evaluator="lmms")
    make(tmp_path/"run", asking=asking)
    kept = Run(tmp_path/"run")
    assert read_settings(Rows, kept.settings["rows"]) == ROWS
    assert read_settings(Asking, kept.settings["asking"]) == asking
    assert kept.settings["selectors"] == {name: policy_fingerprint(m) for name, m in MODELS.items()}
    assert (kept.settings["split"], kept.seed) == ("test", 3)
    make(tmp_path/"run", Counts(stop=0), read_settings(Rows, kept.settings["rows"]), asking=asking)

@pytest.mark.parametrize("name", sorted(OTHERS))
def test_every_setting_but_sizes_tells_runs_apart(tmp_path, name):
    assert {*OTHERS, "sizes"} == {f.name for f in fields(Rows)}
    make(tmp_path/"run")
    other = change(ROWS, **{name: OTHERS[name]})
    judges = None if name == "fixed_from" else JUDGES
    with pytest.raises(ValueError, match=rf"rows\.{name}"): make(tmp_path/"run", rows=other, judges=judges)

def test_sizes_may_come_later(tmp_path):
    first = make(tmp_path/"run", rows=change(ROWS, sizes=()))
    assert first.sizes is None
    more = make(tmp_path/"run", Counts(stop=0))
    assert more.sizes.index.tolist() == [6, "all"]
    assert read_settings(Rows, Run(tmp_path/"run").settings["rows"]) == ROWS
    too_many = change(ROWS, sizes=(13,))
    with pytest.raises(ValueError, match="there are 12 ids"): make(tmp_path/"x", Counts(stop=0), too_many)

def test_what_would_mislead_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'random': the name of a baseline"):
        make(tmp_path/"x", models=dict(random=MODELS["one"]))
    with pytest.raises(ValueError, match="nobody to ask"):
        full_table(tmp_path/"x", replace(asked_of(), scorer=None), MODELS, Rows(fixed=0))
    with pytest.raises(ValueError, match="at least one above 0"): Rows(shots=(0,))
    assert not (tmp_path/"x").exists()
    make(tmp_path/"run")
    another = dict(MODELS, one=shaken(3))
    with pytest.raises(ValueError, match="selectors.one"): make(tmp_path/"run", models=another)
    with pytest.raises(ValueError, match="fingerprint of scorer"): make(tmp_path/"run", Counts(seed=1))
    fresh = make(tmp_path/"run", Counts(seed=1), overwrite=True).run
    assert fresh.fingerprints["scorer"] == facts_fingerprint(Counts(seed=1))
    with run_lock(tmp_path/"run"):
        with pytest.raises(Busy): make(tmp_path/"run")

# ---- looks, and the curve ----------------------------------------------------------------------------------

def test_looks_are_counted_over_runs(tmp_path):
    looks = tmp_path/"looks.json"
    rows = change(ROWS, sizes=())
    assert make(tmp_path/"a", rows=rows, looks=looks).looks == 1
    assert make(tmp_path/"b", rows=rows, looks=looks).looks == 1
    third = make(tmp_path/"c", rows=change(rows, seed=9), looks=looks)
    assert third.looks == 2
    assert "looks at test: 2; the best of 2 equal selectors" in third.text()
    assert third.run.metrics["looks"] == 2

def test_the_curve_of_the_selector_is_kept(tmp_path):
    curve = pd.DataFrame(dict(epoch=[0, 1], train_loss=[1., .5]))
    trained = Run.create(tmp_path/"trained", dict(objective="rce"))
    trained.save_history(curve)
    made = make(tmp_path/"run", trained=trained.path)
    pd.testing.assert_frame_equal(made.run.history, curve)
    without = make(tmp_path/"without", trained=tmp_path/"nowhere")
    assert "history.csv" not in without.run.files()
