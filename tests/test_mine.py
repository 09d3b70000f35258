"Mining: what is added was not there, says what it is, keeps its budget and finds what a search of everything finds"
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from leverplus.groups import RLData
from leverplus.lvlm import MockScorer, Scored
from leverplus.pools import Pool
from leverplus.rldata_ask import FactCache
from leverplus.rldata_propose import SimilarityPrior
from leverplus.rldata_generate import generate
from leverplus.settings import Guarding, Mining, Proposing, change, read_settings
from leverplus.rldata_mine import lacking, mine, mining_calls, neighbours, reask
from leverplus.embed import EmbedStore

K = 6
QUERIES = list(range(1, 13))
DEMOS = list(range(100, 110))

class Rule(MockScorer):
    "The answer is right only if demonstration `query % 10 + 100` comes last; the probability tells how near it is"
    def __init__(self, always=(), never=(), fails=()):
        super().__init__(0, fails)
        self.always = set(always)
        self.never = set(never)
        self.asked = []
    @property
    def fingerprint(self): return "rule"
    def _one(self, p, t, generate):
        self.asked.append((p.question_id, p.pointer, generate))
        key = 100 + p.question_id % 10
        if p.question_id in self.fails: return super()._one(p, t, generate)
        near = .9 if p.pointer[-1] == key else .5 if key in p.pointer else .1 + .001*(sum(p.pointer) % 7)
        if p.question_id in self.always: near = .9
        if p.question_id in self.never: near = .1
        right = near > .8
        return Scored(
            p.question_id,
            p.pointer,
            ("yes" if right else "no") if generate else None,
            tuple([np.log(near)] * len(t.texts)),
            near,
            None,
            0,
        )

@pytest.fixture(scope="module")
def world():
    g = np.random.default_rng(0)
    ids = QUERIES + DEMOS
    def unit(x): return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    items = pd.DataFrame(
        dict(
            question_id=ids,
            image_id=range(len(ids)),
            image_path="x.png",
            question="q?",
            answer="yes",
            answers=[("yes",) * 10] * len(ids),
            split="train",
        )
    ).set_index("question_id", drop=False)
    store = EmbedStore(
        ids, unit(g.normal(size=(len(ids), 8))), unit(g.normal(size=(len(ids), 8))), dict(model="random")
    )
    def draw(q):
        some = {100 + q % 10, *g.choice(DEMOS, K, replace=False).tolist()}
        return tuple(sorted(some, key=lambda d: hash((q, d)))[:K])
    pool = Pool({q: draw(q) for q in QUERIES}, dict(split="train", sampler="random", K=K, seed=0))
    pool = Pool(
        {q: c if 100 + q % 10 in c else (*c[:-1], 100 + q % 10) for q, c in pool.ids.items()}, pool.recipe
    )
    return items, store, pool

def start(world, scorer, tmp_path, counts=dict(random=2), **kw):
    items, store, pool = world
    return generate(
        tmp_path / "run", QUERIES, items, pool, scorer, store, proposing=Proposing(counts=counts),
        guarding=Guarding(test=0), progress=False, **kw
    )

def test_finds_what_an_exhaustive_search_finds(world, tmp_path):
    items, store, pool = world
    s = Rule(always=[3], never=[4])
    data = start(world, s, tmp_path)
    out, log = mine(data, items, s, store, mining=Mining(tries=40, rounds=6), progress=False)
    # what can be found is found
    left = lacking(out)
    assert left[3] == "contrast"
    assert left[4] == "positive"
    assert set(left.drop([3, 4])) == {""}
    before = lacking(data)
    assert log.found.sum() == (before != "").sum() - (left != "").sum()
    assert log.failed.sum() == 0

@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 3),
    st.one_of(st.none(), st.integers(1, 60)),
    st.integers(0, 3),
)
def test_rows_are_new_marked_and_within_the_budget(tmp_path_factory, world, tries, top, rounds, budget, seed):
    items, store, pool = world
    s = Rule()
    data = start(world, s, tmp_path_factory.mktemp("m"))
    s.asked.clear()
    cache = FactCache()
    mining = Mining(tries=tries, top=top, rounds=rounds, budget=budget, seed=seed)
    search = dict(mining=mining, cache=cache, progress=False)
    out, log = mine(data, items, s, store, **search)
    old = out.rows[:len(data)]
    new = out.rows[len(data):]
    pd.testing.assert_frame_equal(old, data.rows)
    assert (new.gen_method == "mined").all()
    assert not new.eval_failed.any()
    assert not out.rows.duplicated(["question_id", "pointer"]).any()
    assert set(new.question_id) <= set(lacking(data)[lambda x: x != ""].index)
    asked = log.asked.sum() + log.texts.sum()
    assert budget is None or asked <= budget
    assert asked <= mining_calls(data, mining)
    assert ((log.texts > 0) | (log.failed > 0)).all()
    assert len(s.asked) == asked
    assert log.asked.sum() == len(new)
    assert log.texts.sum() == new.vqa_acc_score.notna().sum()
    s.asked.clear()
    again, _ = mine(data, items, s, store, **search)
    assert not s.asked and again.fingerprint == out.fingerprint # the cache knows it all
    assert read_settings(Mining, out.manifest["mined"]["mining"]) == mining

def test_interrupted_search_goes_on_where_it_was(world, tmp_path, monkeypatch):
    items, store, pool = world
    s = Rule(never=[4, 5, 6])
    data = start(world, s, tmp_path)
    whole, _ = mine(data, items, s, store, mining=Mining(tries=3), progress=False)
    cache = FactCache(tmp_path / "facts")
    s = Rule(never=[4, 5, 6])
    real, n = s.run, []
    def run(*a, **k):
        n.append(1)
        if len(n) == 4: raise KeyboardInterrupt
        return real(*a, **k)
    s.run = run
    three = dict(mining=Mining(tries=3), progress=False)
    with pytest.raises(KeyboardInterrupt): mine(data, items, s, store, cache=cache, **three)
    first = len(s.asked)
    out, _ = mine(data, items, s, store, cache=FactCache(tmp_path / "facts"), **three)
    assert out.fingerprint == whole.fingerprint
    assert len({(q, p, g) for q, p, g in s.asked}) == len(s.asked)
    assert first

def test_failures_are_not_contrasts(world, tmp_path):
    items, store, pool = world
    s = Rule(always=QUERIES)
    data = start(world, s, tmp_path)
    assert set(lacking(data)) == {"contrast"}
    s.fails = frozenset([1, 2])
    out, log = mine(data, items, s, store, mining=Mining(rounds=1), progress=False)
    bad = out.rows[out.rows.eval_failed]
    assert set(bad.question_id) == {1, 2}
    assert log.failed[0] == len(bad)
    assert lacking(out)[1] == "contrast"

def test_policy_samples_come_from_the_policy(world, tmp_path):
    items, store, pool = world
    s = Rule(never=QUERIES)
    data = start(world, s, tmp_path)
    short = Mining(rounds=1, tries=2)
    def mined(policy=None, **kw): return mine(data, items, s, store, policy, short, progress=False, **kw)[0]
    a = mined(SimilarityPrior(0.0))
    b = mined(SimilarityPrior(500.0))
    assert a.fingerprint != b.fingerprint
    # without a policy: the prior, as sharp as `scale` says
    assert mined(proposing=Proposing(scale=500.)).fingerprint == b.fingerprint
    assert mined(proposing=Proposing(kind="text")).fingerprint != mined().fingerprint

def test_the_most_that_a_search_asks(world, tmp_path):
    items, store, pool = world
    s = Rule(never=QUERIES)
    data = start(world, s, tmp_path)
    one = Mining(rounds=1, tries=2, top=1)
    _, log = mine(data, items, s, store, mining=one, progress=False)
    # fewer where a swap is a sample, too
    assert log.asked.sum() + log.texts.sum() <= mining_calls(data, one) == len(QUERIES)*(2 + 2 + 1)
    assert mining_calls(data, Mining(rounds=3, tries=2, top=1)) == 3*mining_calls(data, one)
    assert mining_calls(data, Mining(budget=7)) == 7
    every = start(world, Rule(), tmp_path/"every", counts=dict(random=30))
    assert mining_calls(every) == 0

def test_nothing_lacking_asks_nothing(world, tmp_path):
    items, store, pool = world
    s = Rule()
    data = start(world, s, tmp_path, counts=dict(random=30))
    assert set(lacking(data)) == {""}
    s.asked.clear()
    out, log = mine(data, items, s, store, progress=False)
    assert not s.asked
    assert len(log) == 0
    assert out.fingerprint == data.fingerprint

def test_every_sequence_of_a_pool_tried_ends_the_search(world, tmp_path):
    # 6 x 5 pairs
    items, store, pool = world
    s = Rule(never=QUERIES)
    data = start(world, s, tmp_path, counts=dict(random=30))
    out, log = mine(data, items, s, store, progress=False)
    assert len(log) == 0
    assert len(out) == len(data) == 30 * len(QUERIES)

@settings(max_examples=100)
@given(st.data())
def test_neighbours_are_one_swap_away(data):
    cand = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=8, unique=True))
    S = data.draw(st.integers(1, len(cand)))
    p = tuple(cand[:S])
    near = neighbours(p, cand)
    assert len(near) == len(set(near)) == S*(len(cand) - S) + S*(S - 1)//2
    assert p not in near
    for n in near:
        differ = [i for i in range(S) if n[i] != p[i]]
        assert len(set(n)) == S
        assert len(differ) == 1 or len(differ) == 2 and sorted(n) == sorted(p)

@settings(max_examples=50)
@given(st.data())
def test_neighbours_of_other_lengths_gain_or_lose_one(data):
    cand = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=6, unique=True))
    S = data.draw(st.integers(0, len(cand)))
    p = tuple(cand[:S])
    near = neighbours(p, cand, range(4))
    same = neighbours(p, cand)
    assert len(near) == len(set(near))
    assert set(same) == {n for n in near if len(n) == S}
    less = {n for n in near if len(n) < S}
    more = {n for n in near if len(n) > S}
    assert less == ({p[:i] + p[i+1:] for i in range(S)} if 1 <= S <= 4 else set())
    assert more == ({(c, *p) for c in cand if c not in p} if S < 3 else set())

class Misled:
    "A model that is right alone, and misled by any demonstration"
    fingerprint = "misled"
    tolerance = 1e-3
    def run(self, prompts, targets=None, generate=True, progress=False):
        text = {True: "no", False: "yes"}
        out = []
        for p, t in zip(prompts, targets):
            shows = bool(p.demos)
            prob = .1 if shows else .9
            out.append(Scored(p.question_id, p.pointer, text[shows] if generate else None,
                              tuple(np.log(prob/len(t.texts)) for _ in t.texts), prob))
        return out

def test_what_helps_may_be_nothing(world, tmp_path):
    items, store, pool = world
    s = Misled()
    data = start(world, s, tmp_path)
    assert set(lacking(data)) == {"positive"}
    one = Mining(rounds=1, tries=2, top=1)
    def mined(**kw): return mine(data, items, s, store, mining=change(one, **kw), progress=False)
    shown, log = mined()
    assert 0 not in shown.shots and log.found.sum() == 0
    out, log = mined(zero_shot=True)
    alone = out.rows[out.rows.pointer.map(len) == 0]
    assert sorted(alone.question_id) == sorted(QUERIES)
    assert set(alone.gen_method) == {"zero_shot"}
    assert set(lacking(out)) == {""} and log.found.sum() == len(QUERIES)
    assert log.asked.sum() + log.texts.sum() <= mining_calls(data, change(one, zero_shot=True))

def test_lacking_reads_only_answers(world, tmp_path):
    data = start(world, Rule(fails=[2]), tmp_path)
    assert lacking(data)[2] == "positive"
    assert list(lacking(data).index) == QUERIES
    assert set(lacking(data, positive=1.)) == {"positive"}

def test_reask_keeps_sequences_and_replaces_facts(world, tmp_path):
    items, store, pool = world
    data = start(world, MockScorer(1), tmp_path)
    new = reask(data, items, MockScorer(2, fails=[5]), progress=False)
    assert new.rows.pointer.tolist() == data.rows.pointer.tolist()
    assert new.rows.gen_method.tolist() == data.rows.gen_method.tolist()
    assert set(new.rows.scorer.dropna()).isdisjoint(data.rows.scorer)
    assert set(new.rows[new.rows.eval_failed].question_id) == {5}
    assert new.manifest["reasked"]["were"] == sorted(set(data.rows.scorer))

def test_facts_about_other_items_are_not_gone_on_from(world, tmp_path):
    "A record of half old and half new pictures would be of nothing; asked again, it is of the new"
    items, store, pool = world
    s = Rule()
    data = start(world, s, tmp_path)
    first = data.queries[0]
    new = items.assign(question=items.question.where(items.question_id != first, "What now?"))
    n = (data.rows.question_id == first).sum()
    says = f"run: {n} of {len(data)} facts .first: question_id {first}, .* are about other questions"
    with pytest.raises(ValueError, match=says): mine(data, new, s, store, progress=False)
    again = reask(data, new, s, progress=False)
    out, _ = mine(again, new, s, store, progress=False)
    assert len(out) >= len(data)
    mine(data, items, s, store, progress=False)
