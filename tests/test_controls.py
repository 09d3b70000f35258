"What a lead is made of, with models whose habits are known: one copies what it reads last, one reads nothing"
import numpy as np, pandas as pd, pytest, torch
from leverplus.controls import (
    CONTROLS, _nearest_wrong_answer, ask_controls, ask_shift, controls_table, copied, copied_lead, copy_table,
    order_lead, order_table, pool_shift, shift_table, transfer_table, whole_bank,
)
from leverplus.baselines import Vote, best_last, query_cosines
from leverplus.core import rng
from leverplus.embed import EmbedStore
from leverplus.evaluate import score_picks
from leverplus.infer import pick_random, pick_similar, pick_zero
from leverplus.lvlm import Scored, Targets
from leverplus.pools import Pool
from leverplus.rldata_ask import FactCache, ask
from leverplus.selector import PointerSelector
from leverplus.statistics import Bootstrap
from leverplus.vqa import normalise

WORDS = [f"{a}{b}" for a in "kpt" for b in ("ana", "olu", "ire", "esa")]
QS, DEMOS = range(24), range(100, 160)
IDS = [*QS, *DEMOS]
G = rng("controls")
TRUTH = {i: WORDS[int(n)] for i, n in zip(IDS, G.integers(4, size=len(IDS)))}
ITEMS = pd.DataFrame(dict(
    question_id=IDS, image_id=IDS, image_path=None, question=[f"what is {i}?" for i in IDS],
    answer=list(TRUTH.values()), answers=[[word]*10 for word in TRUTH.values()]), index=IDS)
STORE = EmbedStore(IDS, text=torch.randn(len(IDS), 6, generator=torch.Generator().manual_seed(0)))
POOL = Pool({q: tuple(int(d) for d in G.choice(DEMOS, 6, replace=False)) for q in QS}, dict(sampler="random", K=6))
PICKS = pd.concat([pick_similar(POOL, STORE, 2, "text"), pick_random(POOL, 2, draws=2)], ignore_index=True)

class Habit:
    "A scorer that says what a function of the prompt says, and keeps what it was shown"
    tolerance = 0.
    def __init__(self, says, name): self.says, self.fingerprint, self.seen = says, name, []
    def reference(self): return self
    def run(self, prompts, targets=None, generate=True, progress=False):
        self.seen += prompts
        out = []
        for p, t in zip(prompts, targets or [Targets()]*len(prompts)):
            out.append(Scored(p.question_id, tuple(p.pointer), self.says(p), tuple(-1. for _ in t.texts), .3))
        return out

def copycat(): return Habit(lambda p: p.demos[-1].answer if p.demos else "nothing", "copycat")
def deaf(): return Habit(lambda p: WORDS[p.question_id % 4], "deaf")

def scored_by(scorer, picks=PICKS):
    return score_picks(picks, ask(picks, scorer, ITEMS).drop_duplicates(["question_id", "pointer"]))

# ---- copying -----------------------------------------------------------------------------------------------

def test_a_copycat_copies_always_and_its_lead_is_copying():
    s = scored_by(copycat())
    assert copied(s, ITEMS).all()
    table = copy_table(s, ITEMS).set_index("selector")
    assert (table.copied == 1).all() and table.acc.equals(table.acc_copied) and table.acc_other.isna().all()
    assert table.copied_wrong.to_dict() == pytest.approx((1 - table.acc).to_dict())
    lead = copied_lead(s, "similar_text", "random", 2, ITEMS, Bootstrap(200))
    assert lead.delta["other"] == 0 and lead.delta["copied"] == pytest.approx(lead.delta["all"])
    by_hand = s.groupby("selector").vqa_acc_score.mean()
    assert lead.delta["all"] == pytest.approx(by_hand["similar_text"] - by_hand["random"])

def test_parts_of_a_lead_add_up_and_nothing_shown_is_no_copy():
    s = scored_by(deaf(), pd.concat([PICKS, pick_zero(POOL)], ignore_index=True))
    assert not copied(s[s.shots == 0], ITEMS).any()
    for r, got in zip(s.itertuples(), copied(s, ITEMS)):
        assert got == (normalise(r.vqa_pred_answer) in {normalise(TRUTH[d]) for d in r.pointer})
    lead = copied_lead(s, "similar_text", "random", 2, ITEMS, Bootstrap(200))
    assert lead.delta["copied"] + lead.delta["other"] == pytest.approx(lead.delta["all"])
    assert lead.delta["all"] == 0 and lead.verdict["all"] == "no difference shown"
    assert "zero_shot" not in set(copy_table(s, ITEMS).selector)
    failed = s.assign(eval_failed=True)
    assert not copied(failed, ITEMS).any()

# ---- order -------------------------------------------------------------------------------------------------

def test_order_counts_for_a_copycat_only():
    turned = pd.concat([PICKS, PICKS.assign(pointer=[p[::-1] for p in PICKS.pointer])])
    for scorer, matters in ((copycat(), True), (deaf(), False)):
        facts = ask(turned, scorer, ITEMS).drop_duplicates(["question_id", "pointer"])
        right = dict(zip(zip(facts.question_id, facts.pointer), facts.vqa_acc_score))
        t = order_table(PICKS, facts, ITEMS, Bootstrap(200)).set_index("selector")
        for selector, g in PICKS.groupby("selector"):
            as_is = np.mean([right[q, p] for q, p in zip(g.question_id, g.pointer)])
            other = np.mean([right[q, p[::-1]] for q, p in zip(g.question_id, g.pointer)])
            assert t.acc[selector] == pytest.approx(as_is) and t.reversed[selector] == pytest.approx(other)
            assert t["any"][selector] == pytest.approx((as_is + other)/2)
            assert t.delta[selector] == pytest.approx(as_is - other)
        assert ((t.best > t["any"]).any()) == matters
        assert (t.best >= t[["acc", "reversed"]].max(axis=1)).all()
    some = facts[facts.question_id != 3]
    assert (order_table(PICKS, some, ITEMS, Bootstrap(50)).n == 23).all()
    with pytest.raises(LookupError, match="all orders of none"): order_table(PICKS, facts[:0], ITEMS)

def test_a_lead_is_split_into_the_set_and_its_order():
    "A copycat says the last answer: two picks that show the same demonstrations differ by their order alone"
    near = PICKS[PICKS.selector == "similar_text"]
    turned = near.assign(pointer=[p[::-1] for p in near.pointer], selector="turned")
    both = pd.concat([near, turned], ignore_index=True)
    asked = ask_controls(both, copycat(), ITEMS, POOL, STORE, ["as_shown", "reversed"])
    lead = order_lead(asked, "similar_text", "turned", ITEMS, Bootstrap(200))
    acc = asked[asked.control == "as_shown"].groupby("selector").vqa_acc_score.mean()
    assert lead.delta["all"] == pytest.approx(acc["similar_text"] - acc["turned"]) and lead.delta["all"] != 0
    assert lead.delta["set"] == 0 and lead.delta["order"] == pytest.approx(lead.delta["all"])
    asked = ask_controls(PICKS, deaf(), ITEMS, POOL, STORE, ["as_shown", "reversed"])
    assert (order_lead(asked, "similar_text", "random", ITEMS, Bootstrap(200)).delta == 0).all()
    with pytest.raises(ValueError, match="more than two orders"):
        order_lead(asked.assign(shots=3), "similar_text", "random", ITEMS)

def test_stored_copies_are_taken_as_they_are():
    s = scored_by(copycat())
    stored = s.assign(copied=copied(s, ITEMS)).drop(columns=["pointer", "vqa_pred_answer"])
    pd.testing.assert_frame_equal(copy_table(stored), copy_table(s, ITEMS))
    by_picture = ITEMS[["question_id", "image_id"]]
    told = copied_lead(stored, "similar_text", "random", 2, by_picture, Bootstrap(200))
    pd.testing.assert_frame_equal(told, copied_lead(s, "similar_text", "random", 2, ITEMS, Bootstrap(200)))

# ---- what is shown, changed --------------------------------------------------------------------------------

def test_each_control_changes_one_thing():
    scorer = deaf()
    ask_controls(PICKS, scorer, ITEMS, POOL, STORE)
    shown = {}
    for p in scorer.seen: shown.setdefault(p.question_id, []).append(p)
    for r in PICKS[PICKS.selector == "similar_text"].itertuples():
        first, last = r.pointer
        said = {tuple((d.question, d.answer) for d in p.demos) for p in shown[r.question_id]}
        q1, q2, a1, a2 = ITEMS.question[first], ITEMS.question[last], TRUTH[first], TRUTH[last]
        wrong = _nearest_wrong_answer(r.question_id, POOL[r.question_id], STORE, ITEMS)
        assert ((q1, a1), (q2, a2)) in said and ((q2, a2), (q1, a1)) in said
        assert ((q1, a2), (q2, a1)) in said and (("?", a1), ("?", a2)) in said
        assert ((q1, a1), (q2, wrong)) in said and wrong != TRUTH[r.question_id]

def test_controls_show_what_a_model_lives_on():
    "A copycat falls to nothing with a wrong answer, and cares for no question; a deaf model cares for nothing"
    s = ask_controls(PICKS, copycat(), ITEMS, POOL, STORE)
    assert s.control.unique().tolist() == list(CONTROLS) and len(s) == len(CONTROLS)*len(PICKS)
    assert s.pointer[s.control == "wrong_answer"].tolist() == PICKS.pointer.tolist()
    table = controls_table(s, ITEMS, Bootstrap(200)).set_index(["selector", "control"])
    turned = scored_by(copycat(), PICKS.assign(pointer=[p[::-1] for p in PICKS.pointer]))
    for selector in ("similar_text", "random"):
        t = table.loc[selector]
        assert t.acc["as_shown"] > 0 and t.acc["wrong_answer"] == 0
        assert t.acc["no_questions"] == t.acc["as_shown"] and t.delta["no_questions"] == 0
        of_turned = turned[turned.selector == selector].vqa_acc_score.mean()
        assert t.acc["reversed"] == t.acc["answers_swapped"] == pytest.approx(of_turned)
        assert (t.copied == 1).all() and t.delta["wrong_answer"] == pytest.approx(-t.acc["as_shown"])
    same = controls_table(ask_controls(PICKS, deaf(), ITEMS, POOL, STORE), ITEMS, Bootstrap(200))
    assert same.groupby("selector").acc.nunique().eq(1).all()
    assert (same.delta.dropna() == 0).all()

def test_controls_are_kept_apart_and_repeatable(tmp_path):
    scorer = copycat()
    cache = FactCache(tmp_path/"facts")
    first = ask_controls(PICKS, scorer, ITEMS, POOL, STORE, cache=cache)
    asked = len(scorer.seen)
    again = ask_controls(PICKS, scorer, ITEMS, POOL, STORE, cache=cache)
    pd.testing.assert_frame_equal(first, again)
    assert len(scorer.seen) == asked
    other = ask_controls(PICKS, scorer, ITEMS, POOL, STORE, ["answers_shuffled"], seed=1)
    before = first[first.control == "answers_shuffled"]
    assert other.vqa_pred_answer.tolist() != before.vqa_pred_answer.tolist()
    assert sorted(other.vqa_pred_answer) != []
    with pytest.raises(ValueError, match="choose among as_shown"):
        ask_controls(PICKS, scorer, ITEMS, POOL, STORE, ["upside_down"])
    with pytest.raises(ValueError, match="are right"):
        _nearest_wrong_answer(0, [100], STORE, ITEMS.assign(answer=TRUTH[0]))

# ---- pools of other sizes ----------------------------------------------------------------------------------

def test_a_whole_bank_holds_everything_but_the_own_picture():
    items = ITEMS.assign(image_id=[100 if i in (0, 100, 101) else i for i in IDS])
    bank = whole_bank(items.loc[list(QS)], items.loc[list(DEMOS)])
    assert set(bank[0]) == set(DEMOS) - {100, 101} and set(bank[1]) == set(DEMOS)
    own = whole_bank(items.loc[list(DEMOS)], items.loc[list(DEMOS)])
    assert set(own[102]) == set(DEMOS) - {102} and set(own[100]) == set(DEMOS) - {100, 101}

def test_a_lead_is_followed_over_pool_sizes():
    model = PointerSelector(STORE.dim("text"), d_hidden=8)
    model.info = dict(kind="text", pool=dict(sampler="random", K=4))
    queries, demos = ITEMS.loc[list(QS)], ITEMS.loc[list(DEMOS)]
    rules = dict(vote=Vote(STORE, ITEMS, "text"))
    few = Bootstrap(100)
    t = pool_shift(model, queries, demos, STORE, copycat(), (4, 20, "all"), 1, rules=rules, bootstrap=few)
    assert t.K.tolist() == [4]*4 + [20]*4 + ["all"]*4
    assert t.selector.tolist() == ["random", "similar", "vote", "selector"]*3
    bank = whole_bank(queries, demos)
    near = [best_last(query_cosines(STORE, q, bank[q], "text"), bank[q], 1)[0] for q in QS]
    want = np.mean([TRUTH[d] == TRUTH[q] for q, d in zip(QS, near)])
    whole = t[t.K == "all"].set_index("selector")
    assert whole.acc["similar"] == pytest.approx(want)
    assert whole.delta["vote"] == pytest.approx(whole.acc["vote"] - want) and np.isnan(whole.delta["similar"])
    assert ((t.lo <= t.acc) & (t.acc <= t.hi)).all()

def selector_of(seed):
    "One with random weights (a new one would be similarity)"
    torch.manual_seed(seed)
    model = PointerSelector(STORE.dim("text"), d_hidden=8)
    with torch.no_grad():
        for weight in model.parameters(): weight.normal_()
    model.info = dict(kind="text", pool=dict(sampler="random", K=4))
    return model

def test_selectors_of_several_seeds_are_averaged():
    queries, demos = ITEMS.loc[list(QS)], ITEMS.loc[list(DEMOS)]
    own = [selector_of(seed) for seed in (0, 1)]
    s = ask_shift(dict(ours=own), queries, demos, STORE, copycat(), (4, 20), 1, draws=2)
    of = s[(s.selector == "ours") & (s.K == 20)]
    assert sorted(of.draw.unique()) == [0, 1]
    assert len(of.drop_duplicates(["question_id", "pointer"])) > len(QS) # the two differ
    table = shift_table(s, ITEMS, Bootstrap(100)).set_index(["K", "selector"])
    for K, selector in table.index:
        rows = s[(s.K == K) & (s.selector == selector)]
        assert table.acc[K, selector] == pytest.approx(rows.vqa_acc_score.mean())
        assert table.n[K, selector] == len(QS)
    alone = pool_shift(own[1], queries, demos, STORE, copycat(), (20,), 1, bootstrap=Bootstrap(100))
    second = of[of.draw == 1].vqa_acc_score.mean()
    assert alone.set_index("selector").acc["selector"] == pytest.approx(second)
    assert s.copied.all()
    for model in own: del model.info # as they come out of a training
    told = ask_shift(dict(ours=own), queries, demos, STORE, copycat(), (4, 20), 1, draws=2, kind="text")
    pd.testing.assert_frame_equal(told, s)

def test_a_world_of_texts_needs_no_kind():
    queries, demos = ITEMS.loc[list(QS)], ITEMS.loc[list(DEMOS)]
    texts = EmbedStore(STORE.ids, text=STORE.text)
    new = selector_of(0)
    new.info = {}
    told = ask_shift(dict(ours=new), queries, demos, texts, copycat(), (4,), 1, draws=2)
    same = ask_shift(dict(ours=new), queries, demos, texts, copycat(), (4,), 1, draws=2, kind="text")
    pd.testing.assert_frame_equal(told, same)

# ---- another reader ----------------------------------------------------------------------------------------

def answered(asked, trained_on, right, selector="ours", draw=0):
    "What a reader said to the picks for the first questions"
    ids = list(QS)[:len(right)]
    return pd.DataFrame(dict(
        selector=selector, shots=1, draw=draw, question_id=ids, vqa_acc_score=right, eval_failed=False,
        trained_on=trained_on, asked=asked,
    ))

def test_transfer_is_compared_with_the_diagonal():
    rows = [
        answered("a", None, [0., 0., 1., 0.], "similar"),
        answered("a", "a", [1., 1., 1., 0.]), answered("a", "a", [1., 1., 0., 0.], draw=1),
        answered("a", "b", [0., 0., 1., 0.]),
        answered("b", "b", [1., 0., 0., 0.]), answered("b", "a", [1., 0., 0., 0.]),
    ]
    t = transfer_table(pd.concat(rows), ITEMS, Bootstrap(200))
    assert t.asked.tolist() == ["a", "a", "a", "b", "b"]
    assert t.selector.tolist() == ["similar", *["ours"]*4]
    by = t[t.selector == "ours"].set_index(["asked", "trained_on"])
    assert by.acc["a", "a"] == .625 and by.acc["a", "b"] == .25 and by.delta["a", "b"] == pytest.approx(-.375)
    assert np.isnan(by.delta["a", "a"]) and by.delta["b", "a"] == 0 and by.lo["b", "a"] == by.hi["b", "a"] == 0
    assert by.lo["a", "b"] <= -.375 <= by.hi["a", "b"]
    assert t.acc[0] == .25
    failed = pd.concat([*rows, answered("a", "b", [1.]*4, draw=2).assign(eval_failed=True)])
    pd.testing.assert_frame_equal(transfer_table(failed, ITEMS, Bootstrap(200)), t)
    with pytest.raises(ValueError, match="no row was trained on b, which is asked"):
        transfer_table(answered("b", "a", [1., 0.]), ITEMS)
