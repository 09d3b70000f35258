import itertools, numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from leverplus.all import *
from leverplus.dls import GroupDL, GroupDataset
from leverplus.pools import make_pool
from leverplus.selector import check_seqs
from leverplus.warmup import AnswerGroups, contained, word_ids

def world(n=40, D=6, images=20, seed=0):
    g = np.random.default_rng(seed)
    ids = np.arange(100, 100 + n)
    words = ["red", "blue", "bus", "dog", "cat"]
    items = pd.DataFrame(
        dict(
            question_id=ids,
            image_id=g.integers(0, images, n),
            question="q",
            answer=[" ".join(g.choice(words, g.integers(1, 3), replace=False)) for _ in ids],
        ),
        index=ids,
    )
    x = torch.tensor(g.normal(size=(n, D))).float()
    return items, EmbedStore(ids.tolist(), x, x)
def rng_(seed=0): return torch.Generator().manual_seed(seed)

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), S=st.integers(1, 3), B=st.integers(1, 4))
def test_rewards_are_shares_of_words(seed, S, B):
    g = np.random.default_rng(seed)
    text = lambda: " ".join(g.choice(list("bcdef"), g.integers(1, 4)))
    want = [text() for _ in range(B)]
    have = [[text() for _ in range(5)] for _ in range(B)]
    ids, words = word_ids(want + sum(have, []))
    seqs = torch.tensor(list(itertools.permutations(range(5), S))).expand(B, -1, -1)
    r = contained(ids[:B], ids[B:].view(B, 5, -1), seqs)
    for b in range(B):
        for i, s in enumerate(seqs[b].tolist()):
            a = set(want[b].split())
            assert float(r[b, i]) == pytest.approx(
                len(a & set(" ".join(have[b][k] for k in s).split())) / len(a)
            )

def test_pools_are_fresh_and_never_show_the_query():
    items, store = world()
    ds = AnswerGroups(items, store, 6, (1, 2), rounds=3)
    assert len(ds) == 120
    g = rng_()
    where = {tuple(v.tolist()): q for q, v in zip(items.question_id, store.get(items.question_id, "mixed"))}
    seen = set()
    for _ in range(6):
        q, c, mask, seqs, sm, r, m = ds.batch(range(40), g)
        assert mask.all() and sm.all() and m.all() and 0 <= r.min() and r.max() <= 1
        assert seqs.shape[1] == {1: 6, 2: 30}[seqs.shape[2]] and len(seqs[0].unique(dim=0)) == seqs.shape[1]
        seen.add(seqs.shape[2])
        ids = [[where[tuple(v.tolist())] for v in row] for row in c]
        for qid, row in zip(items.question_id, ids):
            assert len(set(row)) == 6 and items.image_id[qid] not in set(items.image_id[row])
        check_seqs(seqs, sm, mask)
    assert seen == {1, 2}
    a = ds.batch(range(8), rng_(1))
    b = ds.batch(range(8), rng_(1))
    assert all(map(torch.equal, a, b))
    assert not torch.equal(a[1], ds.batch(range(8), rng_(2))[1])
    few = AnswerGroups(items, store, 12, 3, n=50).batch(range(8), g)[3]
    assert few.shape == (8, 50, 3) and len(few[0].unique(dim=0)) == 50

@pytest.mark.parametrize("sampler", ["text", "image", "mixed"])
def test_retrieved_pools_are_those_of_the_job(sampler):
    "What `make_pool` retrieves for a query is in all of its pools, the rest changes; none shows the query's image"
    items, _ = world()
    ids = items.question_id.tolist()
    items["question"] = [f"q{i}" for i in ids]
    g = np.random.default_rng(1)
    x, y = (torch.tensor(g.normal(size=(40, 5))).float() for _ in range(2))
    store = EmbedStore(ids, x, y)
    K = 8
    ds = AnswerGroups(items, store, K, sampler=sampler)
    where = {tuple(v.tolist()): q for q, v in zip(ids, store.get(ids, "mixed"))}
    n_near = K - ds.parts.get("random", 0)
    pools = [
        [frozenset(where[tuple(v.tolist())] for v in row) for row in ds.batch(range(40), rng_(i))[1]]
        for i in range(12)
    ]
    jobs = [make_pool(items, items, K, sampler, store, seed=s) for s in range(12)]
    for b, q in enumerate(ids):
        always = frozenset.intersection(*(p[b] for p in pools))
        those = frozenset.intersection(*(frozenset(j[q]) for j in jobs))
        assert (
            all(len(p[b]) == K and items.image_id[q] not in set(items.image_id[list(p[b])]) for p in pools)
            and len(always & those) >= n_near
        )
    assert (len({p[0] for p in pools}) == 1) == ("random" not in ds.parts)
    # a twin is nobody's candidate
    two = items.copy()
    two.loc[ids[1], ["question", "image_id"]] = two.loc[ids[0], ["question", "image_id"]].values
    assert not any(
        torch.equal(store.get([ids[1]])[0], v)
        for v in AnswerGroups(two, store, 30, sampler=sampler).batch(range(40), rng_())[1].flatten(0, 1)
    )
    with pytest.raises(ValueError, match="choose one of"): AnswerGroups(items, store, K, sampler="nearest")

@pytest.mark.parametrize(
    "change, kw, what",
    [
        (lambda d: d.assign(image_id=1), {}, "leaves only 0"),
        (lambda d: d.assign(answer="the"), {}, "none of the 40 items"),
        (lambda d: d.assign(answer=""), {}, "question_id .*: answer is '', wanted a text"),
        (lambda d: pd.concat([d, d[:1]]), {}, "more than once"),
        (lambda d: d, dict(shots=16), "1..K-1"),
        (lambda d: d, dict(shots=(0,)), "1..K-1"),
    ],
)
def test_bad_items_are_refused(change, kw, what):
    items, store = world()
    with pytest.raises(ValueError, match=what): AnswerGroups(change(items), store, **kw)

def test_a_stage_learns_what_answers_share_and_puts_everything_back(tmp_path):
    "Embedding = words of the answer: similarity is right, a selector without prior must find it"
    items, _ = world(120, images=120)
    ids = items.question_id.tolist()
    words, _ = word_ids(items.answer)
    x = torch.zeros(120, 8).scatter_add_(1, words.clamp(min=0), (words >= 0).float()) + 0.1 * torch.randn(
        120, 8, generator=rng_()
    )
    store = EmbedStore(ids, x, x)
    valid, train = ids[:40], ids[40:80]
    rest = items.loc[ids[40:]]
    def record(qs):
        pool = make_pool(items.loc[qs], rest, 6, "random", seed=0)
        rows = [(q, p) for q in qs for p in itertools.permutations(pool[q], 2)]
        w = items.answer.map(lambda a: set(a.split()))
        r = np.array([len(w[q] & (w[a] | w[b])) / len(w[q]) for q, (a, b) in rows])
        return GroupDataset(pd.DataFrame(rows, columns=["question_id", "pointer"]), pool, store, r)
    a = record(train)
    b = record(valid)
    dls = DataLoaders(GroupDL(a, 16, shuffle=True), GroupDL(b, 64))
    learn = selector_learner(dls, prior=False, d_hidden=16, n_layers=0, match="net", n_match=4)
    with learn.no_bar(), learn.no_logging():
        before = float(learn.validate()[0])
        learn.fit_warmup(rest, store, 4, steps=40, bs=32)
        after = float(learn.validate()[0])
        assert learn.dls is dls and after < .75*before
        met = []
        spy = Callback(before_fit=lambda _: met.append(learn.dls.info["warmup"]["sampler"]))
        few = dict(steps=1, bs=8, cbs=spy, watch=None, K=4)
        learn.fit_warmup(rest, store, 1, **few)
        learn.fit_warmup(rest, store, 1, sampler="text", **few)
        assert met == ["random", "text"]
        learn.fit_warmup(rest, store, 1, resume=tmp_path / "warm", **few)
        same = {k: v.clone() for k, v in learn.model.state_dict().items()}
        # how it draws is part of what a stage is
        for other in (dict(sampler="text"), dict(n=5), dict(seed=9)):
            with pytest.raises(Exception, match="fingerprint of warmup"):
                learn.fit_warmup(rest, store, 1, resume=tmp_path / "warm", **other, **few)
        with pytest.raises(ValueError, match=f"question_id {valid[0]}"): learn.fit_warmup(items, store, 1)
        assert learn.dls is dls
