"Plain rules against brute force, and the baselines of the second world where its files are there"
from itertools import permutations
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from leverplus.core import rng
from leverplus.embed import EmbedStore
from leverplus.evaluate import counts_table, chosen_counts, named, pick_oracle, score_picks, vote_of_all
from leverplus.groups import RLData
from leverplus.infer import pick_random, pick_rule, pick_similar, pick_zero, picks_frame, rule_of
from leverplus.pools import Pool
from leverplus.baselines import (
    FEATURES, Answers, FactsNearby, Logistic, Vote, best_last, best_linear, effects, features, query_cosines,
    vote_scores,
)

WORDS = "red blue green cat dog".split()
QS, DEMOS, TRAIN = range(8), range(100, 140), range(200, 230)
IDS = [*QS, *DEMOS, *TRAIN]

def make_items(seed=0):
    g = rng("baseline items", seed)
    said = [[WORDS[i] for i in g.integers(len(WORDS), size=10)] for _ in IDS]
    asked = [" ".join(WORDS[i] for i in g.integers(len(WORDS), size=3)) for _ in IDS]
    return pd.DataFrame(dict(
        question_id=IDS, image_id=IDS, question=asked, answer=[a[0] for a in said], answers=said), index=IDS)

ITEMS = make_items()
STORE = EmbedStore(IDS, *(torch.randn(len(IDS), n, generator=torch.Generator().manual_seed(n)) for n in (5, 6)), {})

def pool_of(queries, K=6, seed=0):
    g = rng("baseline pool", seed)
    return Pool({q: tuple(int(d) for d in g.choice(DEMOS, K, replace=False)) for q in queries}, dict(K=K))

POOL = pool_of(QS)

def tried(pool, helps):
    "All singles and some pairs of each question of a pool; right where a shown demonstration `helps`"
    rows = []
    for q, c in pool.ids.items():
        for p in [(), *((d,) for d in c), *list(permutations(c, 2))[:8]]:
            right = float(any(helps(q, d) for d in p))
            rows.append(dict(question_id=q, pointer=p, gen_method="random", vqa_acc_score=right, vqa_gt_prob=.5*right,
                             vqa_correct=right, eval_failed=False))
    return RLData(pd.DataFrame(rows), pool)

GROUPS = tried(pool_of(TRAIN, seed=1), lambda q, d: d % 3 == 0)

# ---- rules by hand -----------------------------------------------------------------------------------------

@given(st.lists(st.sampled_from([0., .5, 1.]), min_size=3, max_size=6), st.integers(1, 3), st.randoms())
@settings(max_examples=40, deadline=None)
def test_best_last_ignores_the_order_of_the_pool(score, S, random):
    ids = list(range(10, 10 + len(score)))
    want = sorted(range(len(ids)), key=lambda i: (-score[i], ids[i]))[:S]
    assert best_last(score, ids, S) == tuple(ids[i] for i in want[::-1])
    order = random.sample(range(len(ids)), len(ids))
    assert best_last([score[i] for i in order], [ids[i] for i in order], S) == best_last(score, ids, S)

def test_votes_are_a_plain_sum():
    answers = Answers(ITEMS)
    c = POOL[0]
    near = query_cosines(STORE, 0, c, "text")
    weight = np.exp(near/.05) # the largest cosine cancels
    for own in (True, False):
        want = []
        for a in c:
            shown = ITEMS.at[a, "answer"]
            agree = [min(ITEMS.at[b, "answers"].count(shown)/3, 1) if own or a != b else 0. for b in c]
            want.append(np.dot(agree, weight)/weight.sum())
        assert vote_scores(answers, c, c, near, own=own) == pytest.approx(np.array(want), abs=1e-8)

def test_voters_may_be_others_than_the_candidates():
    voters = pool_of(QS, K=20, seed=5)
    vote = Vote(STORE, ITEMS, "text", voters)
    near = query_cosines(STORE, 3, voters[3], "text")
    assert (vote.scores(3, POOL[3]) == vote_scores(Answers(ITEMS), POOL[3], voters[3], near)).all()
    assert vote.best(3, POOL[3], 2) == vote.best(3, POOL[3][::-1], 2)

def test_an_effect_is_a_difference_from_the_group():
    told = effects(GROUPS, "hard_only")
    q = GROUPS.queries[0]
    rows = GROUPS.rows[GROUPS.rows.question_id == q]
    mean = rows.vqa_correct.mean()
    for r in told[told.question_id == q].itertuples():
        shown = rows[[r.demo in p for p in rows.pointer]]
        assert r.effect == pytest.approx(shown.vqa_correct.mean() - mean)

def test_facts_nearby_are_a_kernel_and_leave_the_query_out():
    rule = FactsNearby(GROUPS, STORE, "text", nearest=4, width=.3)
    unit = {i: STORE.get([i], "text")[0].double().numpy() for i in IDS}
    told = effects(GROUPS)
    for q in (0, 200): # a new question, and one of the groups
        near = sorted((t for t in TRAIN if t != q), key=lambda t: (-round(float(unit[q] @ unit[t]), 6), t))[:4]
        want = []
        for c in POOL[0]:
            some = told[told.question_id.isin(near)]
            want.append(sum(
                np.exp((unit[q] @ unit[r.question_id] - 1)/.3) * np.exp((unit[c] @ unit[r.demo] - 1)/.3) * r.effect
                for r in some.itertuples()))
        assert rule.scores(q, POOL[0]) == pytest.approx(np.array(want), abs=1e-5)

@given(st.integers(0, 1000), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_the_best_linear_sequence_is_the_best_of_all(seed, S):
    g = np.random.default_rng(seed)
    inner, last = g.normal(size=5), g.normal(size=5)
    ids = [int(i) for i in g.permutation(50)[:5]]
    worth = {p: sum(inner[ids.index(d)] for d in p) + last[ids.index(p[-1])] for p in permutations(ids, S)}
    found = best_linear(inner, last, ids, S)
    assert worth[found] == pytest.approx(max(worth.values()))
    assert best_linear(inner[::-1], last[::-1], ids[::-1], S) == found

def test_a_regression_learns_what_its_features_show():
    "Right where the demonstration is the most similar one: then that is what it picks"
    pool = pool_of(TRAIN, seed=2)
    top = {q: best_last(query_cosines(STORE, q, c, "text"), c, 1)[0] for q, c in pool.ids.items()}
    rule = Logistic(tried(pool, lambda q, d: d == top[q]), STORE, ITEMS, "text")
    picks = pick_rule(rule, POOL, 1, "logistic")
    assert list(picks.pointer) == list(pick_similar(POOL, STORE, 1, "text").pointer)
    assert rule.table().loc[["similarity", "rank"]].to_numpy().sum() > 0
    seen = features(0, POOL[0], STORE, Answers(ITEMS), "text")
    assert seen.shape == (6, len(FEATURES)) and abs(seen).max() <= 1
    with pytest.raises(ValueError, match="nothing to be fitted"):
        Logistic(tried(pool, lambda q, d: False), STORE, ITEMS)

def test_rules_are_deterministic_and_made_by_name():
    for name in ("vote", "knn_facts", "logistic"):
        rule = rule_of(name, STORE, ITEMS, GROUPS, "text")
        for S in (1, 3):
            picks = pick_rule(rule, POOL, S, name)
            turned = Pool({q: c[::-1] for q, c in POOL.ids.items()}, POOL.recipe)
            assert list(picks.pointer) == list(pick_rule(rule, turned, S, name).pointer)
            assert all(set(p) <= set(POOL[q]) for q, p in zip(picks.question_id, picks.pointer))
    with pytest.raises(ValueError, match="choose one of"): rule_of("best", STORE)

# ---- numbers of demonstrations -----------------------------------------------------------------------------

def facts_of(pool, counts=(0, 1, 2), seed=0):
    g = rng("count facts", seed)
    rows = [(q, p) for q, c in pool.ids.items() for s in counts for p in permutations(c, s)]
    return pd.DataFrame(dict(
        question_id=[q for q, _ in rows], pointer=[p for _, p in rows], vqa_acc_score=g.choice([0, .6, 1], len(rows)),
        vqa_gt_prob=g.random(len(rows)).round(1), vqa_pred_answer="a"))

@pytest.mark.parametrize("price", [0., .3])
def test_the_oracle_over_numbers_is_brute_force(price):
    facts = facts_of(POOL)
    got = pick_oracle(facts, None, POOL, price=price).set_index("question_id")
    assert got.exact.all() and set(got.selector) == {"oracle_free"} and set(got.shots) == {2}
    for q, f in facts.groupby("question_id"):
        best = min(f.itertuples(), key=lambda r: (
            -(r.vqa_acc_score - price*len(r.pointer)), -r.vqa_gt_prob, len(r.pointer), r.pointer))
        assert got.pointer[q] == best.pointer
    some = facts.drop(index=facts.index[5])
    assert (~pick_oracle(some, None, POOL).exact).sum() == 1

def test_a_free_number_is_held_against_always_and_never():
    "By hand: two questions are right without demonstrations only, two with them only, and the free row knows which"
    pool = Pool({q: (100, 101, 102) for q in range(4)}, {})
    def fact(q, p): return dict(
        question_id=q, pointer=p, vqa_acc_score=float((q < 2) != bool(p)), vqa_gt_prob=.5, vqa_pred_answer="a")
    facts = pd.DataFrame([fact(q, p) for q in pool.ids for s in (0, 1, 2) for p in permutations(pool[q], s)])
    always = picks_frame("ours", {q: (100, 101) for q in pool.ids}, 2)
    free = picks_frame("ours_free", {0: (), 1: (), 2: (100, 101), 3: (100,)}, 2, fewer=True)
    everything = [pick_zero(pool), pick_random(pool, 1), pick_random(pool, 2), always, free,
                  pick_oracle(facts, None, pool)]
    scored = score_picks(pd.concat(everything), facts)
    table = counts_table(scored).set_index(["selector", "shots"])
    assert table.acc.to_dict() == {("zero_shot", 0): .5, ("random", 1): .5, ("random", 2): .5, ("ours", 2): .5,
                                   ("ours_free", 2): 1., ("oracle_free", 2): 1.}
    own = table.loc["ours_free", 2]
    assert own.over == .5 and own.cost == .75 and own.acc_per_cost == pytest.approx(1/1.75)
    # random in a random number: questions 0, 1 are right once in three, 2, 3 twice in three
    assert table.gap_closed.round(9).to_dict() == {
        ("zero_shot", 0): 0., ("random", 1): 0., ("random", 2): 0., ("ours", 2): 0., ("ours_free", 2): 1.,
        ("oracle_free", 2): 1.}
    assert own.verdict == "no difference shown" # four questions
    tokens = {(q, p): 10 + 100*len(p) for q, p in zip(scored.question_id, scored.pointer)}
    priced = counts_table(scored, tokens=tokens).set_index(["selector", "shots"])
    assert priced.cost["ours", 2] == 210 and priced.acc_per_cost["ours_free", 2] == pytest.approx(1000/85)
    chosen = chosen_counts(scored, "ours_free", ["zero_shot", "ours"])
    assert chosen.n.to_dict() == {0: 2, 1: 1, 2: 1} and chosen.acc.tolist() == [1, 1, 1]
    assert chosen.zero_shot.tolist() == [1, 0, 0] and chosen.ours.tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="wanted zero_shot"): counts_table(scored[scored.selector != "ours_free"])
    with pytest.raises(ValueError, match="no good rows"): chosen_counts(scored, "theirs")

def test_similar_means_the_row_that_is_there():
    text = pd.DataFrame(dict(selector=["random", "similar_text"]))
    assert named(("random", "similar", None), text) == ["random", "similar_text", None]
    assert named(["similar"], text[:1]) == ["similar"]

def test_a_vote_of_all_is_the_same_at_every_number():
    votes = vote_of_all(POOL, STORE, ITEMS, (1, 2))
    assert votes.groupby("shots").vqa_acc_score.mean().nunique() == 1
    assert (votes.pointer.map(len) == 6).all()
    one = votes[(votes.shots == 1) & (votes.question_id == 0)].iloc[0]
    count = pd.Series([ITEMS.at[d, "answer"] for d in POOL[0]]).value_counts()
    assert count[one.vqa_pred_answer] == count.max()

# ---- the second world --------------------------------------------------------------------------------------

BLIND = Path(__file__).resolve().parent.parent.parent/"shared"/"data"/"blind_okvqa"

def test_baselines_of_the_second_world(okvqa):
    "On its exhaustive dev questions, text pools: everything that knows something is better than random"
    if not BLIND.is_dir(): pytest.skip("no second world in ../shared/data/blind_okvqa")
    from leverplus.data import read_soft_labels
    items = read_soft_labels(okvqa, "train")
    items = items.set_index(pd.Index(items.question_id.tolist()))
    z = np.load(BLIND/"minilm.npz")
    at = pd.Series(range(len(z["question_id"])), z["question_id"])
    store = EmbedStore(items.index, text=torch.tensor(z["text"][at[items.index]].astype(np.float32)))
    p = pd.read_parquet(BLIND/"pools.parquet")
    p = p[(p.pool == "text") & (p.split == "dev")]
    pool = Pool(dict(zip(p.question_id, p.candidates)), dict(sampler="text", K=16))
    facts = pd.read_parquet(BLIND/"dev-text.parquet")
    facts["pointer"] = [tuple(x) for x in facts.pointer]
    picks = [pick_similar(pool, store, 2, "text"), pick_random(pool, 2),
             pick_rule(Vote(store, items, "text"), pool, 2, "vote"), pick_oracle(facts, 2, pool)]
    acc = score_picks(pd.concat(picks), facts).groupby("selector").vqa_acc_score.mean()
    assert acc["random"] < acc["similar_text"] < acc["vote"] < acc["oracle"]
    assert acc["similar_text"] == pytest.approx(.119, abs=.001) and acc["vote"] == pytest.approx(.161, abs=.001)
