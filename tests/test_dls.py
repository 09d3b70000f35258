"Groups as batches: tensors against a slow reference, what is refused, seeds, and a Learner on top"
import numpy as np, pandas as pd, pytest, torch
from fastai.learner import Learner
from hypothesis import given, settings, strategies as st
from leverplus.core import fingerprint, rng
from leverplus.dls import GroupDataset, GroupDL, check_choice, group_dls, show_group
from leverplus.embed import EmbedStore
from leverplus.groups import RLData
from leverplus.infer import pick_model
from leverplus.learner import selector_learner
from leverplus.pools import Pool
from leverplus.selector import PointerSelector, check_seqs
from leverplus.synth import pad_groups, quiet
from leverplus.warmup import warmup_dls

NAMES = "query cands cand_mask seqs seq_mask rewards mask".split()

def world(seed=0, Q=6, demos=30, first=1000, shots=(1, 2, 3), fail=.1):
    "Ragged pools, groups and shots, shuffled rows, some of them failed"
    g = rng("test_dls", seed, first)
    qid = [first + 7*i for i in range(Q)]
    pool = Pool(
        {q: g.choice(demos, g.integers(5, 9), replace=False) for q in qid}, dict(sampler="random", K=8)
    )
    rows = pd.DataFrame(
        [
            (q, tuple(g.choice(pool[q], g.choice(shots), replace=False).tolist()))
            for q in qid
            for _ in range(g.integers(2, 7))
        ],
        columns=["question_id", "pointer"],
    ).drop_duplicates()
    rows = rows.sample(frac=1, random_state=seed).reset_index(drop=True)
    rows["eval_failed"] = g.random(len(rows)) < fail
    rows.loc[rows.drop_duplicates("question_id").index, "eval_failed"] = False
    rows["vqa_acc_score"] = np.where(rows.eval_failed, np.nan, g.choice([0, .3, .6, 1], len(rows)))
    rows["vqa_correct"] = np.where(rows.eval_failed, np.nan, rows.vqa_acc_score > 0)
    return rows, pool

def vectors(seed=0, d=3):
    g = rng("test_dls vectors", seed)
    ids = [*range(30), *range(1000, 1200), *range(5000, 5200)]
    return EmbedStore(ids, *(torch.tensor(g.normal(size=(len(ids), d))).float() for _ in range(2)))

STORE = vectors()
def dataset(rows, pool, **kw): return GroupDataset(rows, pool, STORE, rows.vqa_acc_score, **kw)

def slow_item(rows, pool, q, kind):
    part = rows[(rows.question_id == q) & ~rows.eval_failed]
    return (
        STORE.get(q, kind),
        STORE.get(list(pool[q]), kind),
        [pool.local(q, p) for p in part.pointer],
        torch.tensor(part.vqa_acc_score.to_numpy()).float(),
    )

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["image", "text", "mixed"]))
def test_batch_equals_slow_padding(seed, kind):
    rows, pool = world(seed)
    ds = dataset(rows, pool, kind=kind)
    assert len(ds) == 6
    assert ds.d == STORE.dim(kind)
    assert len(ds.rows) + ds.n_failed == len(rows)
    i = rng(seed).permutation(6)[:4]
    fast = ds.batch(i)
    slow = pad_groups([slow_item(rows, pool, ds.question_ids[j], kind) for j in i])
    for name, a, b in zip(NAMES, fast, slow): assert torch.equal(a, b), name
    for name, a, b in zip(NAMES, fast, pad_groups([ds[int(j)] for j in i])): assert torch.equal(a, b), name
    check_seqs(fast[3], fast[4], fast[2])

@pytest.mark.parametrize("shots", [(0, 1, 2), (0,)])
def test_the_empty_sequence_is_a_member(shots):
    rows, pool = world(2, shots=shots, fail=0)
    ds = dataset(rows, pool)
    empty = rows.pointer.map(len) == 0
    assert ds.n_empty == empty.sum() > 0
    assert f"{'/'.join(map(str, shots))} shots" in repr(ds)
    query, cands, cand_mask, seqs, seq_mask, rewards, mask = ds.batch(range(6))
    assert seqs.shape[-1] == max(1, *shots) and check_seqs(seqs, seq_mask, cand_mask) is seqs
    assert (mask & ~seq_mask.any(-1)).sum() == ds.n_empty   # and not padding
    for a, b in zip(ds.batch(range(6)), pad_groups([ds[i] for i in range(6)])): assert torch.equal(a, b)
    one = ds.select(ds.question_ids[:1])
    assert one.n_empty == empty[rows.question_id == ds.question_ids[0]].sum()
    assert "(none)" in show_group(ds, rows.question_id[empty.idxmax()]).demonstrations.tolist()
    m = PointerSelector(6, d_hidden=8, dropout=0., stop=True, max_shots=3).eval()
    lp = m(query, cands, cand_mask, seqs, seq_mask)
    alone = m(*(x[:1] for x in (query, cands, cand_mask)), torch.zeros(1, 1, 0).long(), torch.zeros(1, 1, 0).bool())
    first = mask[0] & ~seq_mask[0].any(-1)
    torch.testing.assert_close(lp[0][first], alone[0].expand(int(first.sum())))

def test_a_policy_that_always_picks_does_not_meet_the_empty_sequence():
    (train, pool), (valid, other) = world(2, shots=(0, 1, 2), fail=0), world(0, shots=(1, 2), first=5000)
    dls = group_dls(RLData(train, pool), RLData(valid, other), STORE, "soft_only", any_pool=True)
    n = (train.pointer.map(len) == 0).sum()
    for kw in ({}, dict(stop=True, min_shots=1)):
        with pytest.raises(ValueError, match=f"{n} stored sequences without a demonstration.*stop=True"):
            selector_learner(dls, d_hidden=8, **kw)
    learn = selector_learner(dls, d_hidden=8, stop=True)
    learn.model = PointerSelector(6, d_hidden=8)   # put there later: the fit looks again
    with pytest.raises(ValueError, match="cannot choose to show nothing"), quiet(learn): learn.fit_rce(1)
    check_choice(PointerSelector(6, d_hidden=8), dls.valid_ds)

def test_padding_is_to_the_batch_not_to_the_dataset():
    rows, pool = world(3)
    ds = dataset(rows, pool)
    shapes = {tuple(ds.batch([i])[1].shape[1:2]) + tuple(ds.batch([i])[3].shape[1:]) for i in range(6)}
    assert len(shapes) > 1
    for i in range(6):
        q, c, cm, s, sm, r, m = ds.batch([i])
        assert cm.all()
        assert m.all()
        assert sm.any(-1).all()
        assert sm[..., -1].any()

def test_queries_can_be_chosen_and_ordered():
    rows, pool = world(1)
    want = [1014, 1000]
    ds = dataset(rows, pool, question_ids=want)
    assert ds.question_ids.tolist() == want
    assert set(ds.rows.question_id) == set(want)
    assert len(ds.lost) == 4
    full = dataset(rows, pool)
    for a, b in zip(ds.batch([0, 1]), full.batch(full.question_ids.get_indexer(want))):
        assert torch.equal(a, b)

def test_a_query_that_only_failed_is_left_out_and_counted():
    rows, pool = world(2, fail=0)
    rows["eval_failed"] = rows.question_id == 1007
    rows.loc[rows.eval_failed, "vqa_acc_score"] = np.nan
    ds = dataset(rows, pool)
    assert ds.lost == [1007]
    assert 1007 not in ds.question_ids
    assert "1 queries" in repr(ds)
    with pytest.raises(ValueError, match="question_id 1007: no row"):
        dataset(rows, pool, question_ids=[1000, 1007])
    with pytest.raises(ValueError, match="none is left"): dataset(rows.assign(eval_failed=True), pool)

def one_bad(rows, pointer):
    return rows.assign(pointer=[pointer if i == 0 else p for i, p in enumerate(rows.pointer)])

def test_what_is_refused():
    rows, pool = world(4, fail=0)
    q, own = rows.question_id[0], pool[rows.question_id[0]]
    outside = next(d for d in range(30) if d not in own)
    with pytest.raises(ValueError, match=f"query {q}: demonstration {outside}"):
        dataset(one_bad(rows, (own[0], outside)), pool)
    with pytest.raises(ValueError, match=f"question_id {q} has a pointer that repeats"):
        dataset(one_bad(rows, (own[0], own[0])), pool)
    with pytest.raises(ValueError, match=f"question_id {q} has the same pointer twice"):
        dataset(pd.concat([rows, rows.iloc[:1], rows.iloc[:1]]).assign(pointer=[*rows.pointer, (), ()]), pool)
    twin = rows[rows.question_id == q].pointer.iloc[1]
    with pytest.raises(ValueError, match="same pointer twice"): dataset(one_bad(rows, twin), pool)
    with pytest.raises(ValueError, match="K > S"): dataset(one_bad(rows, own), pool)
    with pytest.raises(ValueError, match=f"question_id {q}, pointer .* reward nan"):
        dataset(rows.assign(vqa_acc_score=[np.nan] + rows.vqa_acc_score.tolist()[1:]), pool)
    with pytest.raises(ValueError, match="wanted one number per row"):
        GroupDataset(rows, pool, STORE, [1.0, 2.0])
    with pytest.raises(KeyError, match=str(q)): dataset(rows, Pool({k: pool[k] for k in pool if k != q}))
    few = EmbedStore(range(30), STORE.image[:30], STORE.text[:30])
    with pytest.raises(KeyError, match="1000"): GroupDataset(rows, pool, few, rows.vqa_acc_score)
    nan = EmbedStore(STORE.ids, STORE.image, STORE.text)
    nan.image[STORE.ids.get_loc(1000)] = torch.nan
    with pytest.raises(ValueError, match="not finite"): GroupDataset(rows, pool, nan, rows.vqa_acc_score)

def records(Q=40, **kw):
    (a, pa), (b, pb) = world(0, Q=20, first=1000, **kw), world(0, Q=8, first=5000, **kw)
    return RLData(a, pa), RLData(b, pb)

def test_same_seed_same_batches():
    trn, val = records()
    def made(seed): return group_dls(trn, val, STORE, seed=seed, bs=4, device="cpu")
    def epochs(dls): return [[b[0] for b in dls.train] for _ in range(2)]
    def flat(e): return torch.cat([x for ep in e for x in ep])
    torch.manual_seed(3)
    a = flat(epochs(made(0)))
    np.random.seed(9)
    torch.rand(5)
    b = flat(epochs(made(0)))
    assert torch.equal(a, b)
    assert not torch.equal(a, flat(epochs(made(1))))
    assert not torch.equal(a[:20], a[20:])                                # a new order every epoch
    assert torch.equal(a[:20].sort(0).values, a[20:].sort(0).values)      # of the same queries: none dropped
    dls = made(0)
    again = dls.train.new()
    assert isinstance(again, GroupDL)
    assert torch.equal(torch.cat([x[0] for x in again]), a[:20])
    plain = dls.train.new(dls.valid_ds, shuffle=False, bs=3)
    assert torch.equal(torch.cat([x[0] for x in plain]), dls.valid_ds.query)

def test_group_dls_checks_the_pair():
    trn, val = records()
    with pytest.raises(ValueError, match="in train and in valid"): group_dls(trn, trn, STORE)
    other = RLData(val.rows, Pool(val.pool.ids, dict(sampler="text", K=8)))
    with pytest.raises(ValueError, match="sampler 'random' / 'text'"): group_dls(trn, other, STORE)
    assert len(group_dls(trn, other, STORE, any_pool=True).valid_ds) == 8
    with pytest.raises(ValueError, match="vqa_gt_prob"): group_dls(trn, val, STORE, reward="gtprob")

def test_info_names_where_it_came_from():
    trn, val = records()
    dls = group_dls(trn, val, STORE, kind="text", hard_weight=2.0, device="cpu")
    assert dls.info["data"]["train"] == trn.fingerprint
    assert dls.info["pool"]["sampler"] == "random"
    assert dls.info["kind"] == "text"
    assert dls.info["reward"] == dict(mode="hard_plus_soft", hard_weight=2.)

def test_a_selector_says_what_it_is_trained_on():
    "So nobody who uses it need say so; what it says else stays"
    trn, val = records()
    dls = group_dls(trn, val, STORE, kind="text", device="cpu")
    model = selector_learner(dls, d_hidden=8).model
    assert model.info == dict(kind="text")
    picks = pick_model(model, val.pool, STORE, 2)
    pd.testing.assert_frame_equal(picks, pick_model(model, val.pool, STORE, 2, "text"))
    model.info = dict(kind="image", seed=3)
    assert selector_learner(dls, model).model.info == dict(kind="text", seed=3)

def test_info_knows_whose_vectors_these_are():
    trn, val = records()
    assert group_dls(trn, val, STORE, device="cpu").info["encoder"] is None
    store = vectors()
    store.meta = dict(source=dict(clip="aaaa"))
    dls = group_dls(trn, val, store, device="cpu")
    assert dls.info["encoder"] == "aaaa"
    learn = selector_learner(dls, d_hidden=8)
    start = learn.model
    start.info = dict(encoder="aaaa")
    assert selector_learner(dls, start).model is start
    start.info = dict(encoder="bbbb")
    with pytest.raises(ValueError, match="vectors of CLIP bbbb, these are of CLIP aaaa"): selector_learner(dls, start)
    items = pd.DataFrame(dict(question_id=range(30), image_id=range(30), answer=[f"word{i % 5}" for i in range(30)]))
    with pytest.raises(ValueError, match="items have vectors of CLIP cccc, the groups of CLIP aaaa"):
        other = vectors()
        other.meta = dict(source=dict(clip="cccc"))
        warmup_dls(dls, items, other, K=4, bs=4, steps=2)

def test_content_follows_everything_that_a_batch_holds():
    rows, pool = world()
    ds = dataset(rows, pool)
    def differ(other):
        a, b = ds.content(), other.content()
        return [name for name in a if fingerprint(a[name]) != fingerprint(b[name])]
    assert differ(dataset(rows, pool)) == []
    about = pd.DataFrame(dict(question_id=STORE.ids, question="q?", answer="a"))   # for people, in no batch
    assert differ(dataset(rows, pool, about=about)) == []
    good = rows.index[~rows.eval_failed][3]
    better = rows.assign(vqa_acc_score=rows.vqa_acc_score.where(rows.index != good, .123))
    assert differ(dataset(better, pool)) == ["rewards"]
    again = rows.assign(eval_failed=rows.eval_failed | (rows.index == good))
    assert {"rows", "rewards"} <= set(differ(dataset(again, pool)))
    assert differ(dataset(rows, pool, kind="image")) == ["embeddings"]
    less = ds.select(ds.items[1:])
    assert "queries" in differ(less)
    turned = Pool({q: ids[::-1] for q, ids in pool.ids.items()}, pool.recipe)
    assert set(differ(dataset(rows, turned))) == {"rows", "pools"}

def test_show_group():
    rows, pool = world(5, fail=0)
    ds = dataset(rows, pool)
    t = show_group(ds, 1007)
    assert len(t) == (rows.question_id == 1007).sum()
    assert t.reward.is_monotonic_decreasing
    texts = dict(question=[f"q{i}?" for i in STORE.ids], answer=[f"a{i}" for i in STORE.ids])
    items = pd.DataFrame(dict(question_id=STORE.ids) | texts)
    t = show_group(ds, 1007, items)
    assert t.columns.name == "1007: q1007? a1007"
    best = rows[rows.question_id == 1007].sort_values("vqa_acc_score", ascending=False, kind="stable").iloc[0]
    assert t.demonstrations[0] == " | ".join(f"q{p}? a{p}" for p in best.pointer)
    with pytest.raises(KeyError, match="31415"): show_group(ds, 31415)

def test_a_learner_trains_the_selector_on_it():
    trn, val = records()
    dls = group_dls(trn, val, STORE, bs=4, device="cpu")
    def loss(lp, r, m): return -(lp.masked_fill(~m, -1e9).softmax(-1) * r).sum(-1).mean()
    torch.manual_seed(0)
    learn = Learner(dls, PointerSelector(dls.train_ds.d, 8), loss, lr=1e-2)
    with quiet(learn):
        before = learn.validate(dl=dls.train)[0]
        learn.fit(4)
        after = learn.validate(dl=dls.train)[0]
    assert np.isfinite(after)
    assert after < before
