import itertools, numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from leverplus.all import *
from leverplus.dls import GroupDL, GroupDataset
from leverplus.pools import make_pool
from leverplus.selector import check_seqs
from leverplus.vqa import token_f1, vqa_accuracy
from leverplus.warmup import (
    AnswerGroups, vector_cosines, answer_scores, best_shown, choose_sampler, contained, live_share, soft_scores,
    token_f1s, warmup_dls, warmup_parts, warmup_shares, word_ids,
)

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

# --- graded rewards -----------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), B=st.integers(1, 4))
def test_f1_is_that_of_distinct_words(seed, B):
    g = np.random.default_rng(seed)
    def text(): return " ".join(g.choice(list("bcdef"), g.integers(1, 4), replace=False))
    want = [text() for _ in range(B)]
    have = [[text() for _ in range(5)] for _ in range(B)]
    ids, _ = word_ids(want + sum(have, []))
    f1 = token_f1s(ids[:B], ids[B:].view(B, 5, -1))
    for b in range(B): assert f1[b].tolist() == pytest.approx([token_f1(a, want[b]) for a in have[b]])

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_soft_scores_are_vqa_accuracies(seed):
    "Of every answer for every question; spelling, articles and unanimous people included"
    g = np.random.default_rng(seed)
    words = ["bus", "Bus", "a bus", "coach", "two", "2", "cat!", "van"]
    shown = g.choice(words, 6).tolist()
    said = [g.choice(words[:g.integers(1, 9)], g.integers(1, 11)).tolist() for _ in range(6)]
    number, which, worth = answer_scores(shown, said)
    soft = soft_scores(which, worth, number.expand(6, -1))
    want = [[vqa_accuracy(text, answers) for text in shown] for answers in said]
    assert soft.tolist() == [pytest.approx(row) for row in want]

def test_cosines_and_the_best_shown():
    x = torch.nn.functional.normalize(torch.randn(7, 5, generator=rng_()), dim=-1)
    cos = vector_cosines(x[:2], x[2:].expand(2, -1, -1))
    assert torch.allclose(cos, (x[:2] @ x[2:].T).clamp(min=0), atol=1e-6)
    seqs = torch.tensor([[[0, 1], [4, 2]], [[3, 3], [1, 0]]])
    best = best_shown(cos, seqs)
    for b in range(2):
        for i in range(2): assert best[b, i] == max(cos[b, k] for k in seqs[b, i].tolist())

def with_answers(n=40):
    items, store = world(n)
    g = np.random.default_rng(5)
    items["answers"] = [[a] * 6 + g.choice(items.answer, 4).tolist() for a in items.answer]
    x = torch.tensor(g.normal(size=(n, 5))).float()
    return items, store, EmbedStore(items.question_id.tolist(), x, x)

@pytest.mark.parametrize("reward", ["f1", "soft", "cosine"])
def test_a_sequence_is_worth_its_best_demonstration(reward):
    items, store, answers = with_answers()
    ds = AnswerGroups(items, store, 6, 2, reward=reward, answers=answers)
    where = {tuple(v.tolist()): q for q, v in zip(items.question_id, store.get(items.question_id, "mixed"))}
    _, cands, _, seqs, _, rewards, _ = ds.batch(range(40), rng_())
    v = {q: x for q, x in zip(items.question_id, answers.get(items.question_id, "text"))}
    grade = dict(
        f1=lambda q, c: token_f1(items.answer[c], items.answer[q]),
        soft=lambda q, c: vqa_accuracy(items.answer[c], items.answers[q]),
        cosine=lambda q, c: max(0., float(v[q] @ v[c])),
    )[reward]
    for b, q in enumerate(items.question_id):
        pool = [where[tuple(x.tolist())] for x in cands[b]]
        want = [max(grade(q, pool[k]) for k in s) for s in seqs[b].tolist()]
        assert rewards[b].tolist() == pytest.approx(want, abs=1e-6)

def test_what_a_reward_compares_is_part_of_what_groups_are():
    items, store, answers = with_answers()
    prints = {r: str(AnswerGroups(items, store, 6, 2, reward=r, answers=answers).content()["rewards"])
              for r in ("contained", "f1", "soft", "cosine")}
    assert len(set(prints.values())) == 4
    with pytest.raises(ValueError, match="wants a column `answers`"):
        AnswerGroups(items.drop(columns="answers"), store, 6, 2, reward="soft")
    with pytest.raises(ValueError, match="wants vectors of the answers"):
        AnswerGroups(items, store, 6, 2, reward="cosine")

# --- pools that follow the data -----------------------------------------------------------------------------
def test_pools_of_answers_hold_the_best_graded():
    "No candidate outside has a better grade than the worst of those that were taken for their grade"
    items, store, answers = with_answers()
    ds = AnswerGroups(items, store, 8, 2, reward="soft", sampler=dict(answers=.25, text=.25))
    assert ds.parts == dict(answers=2, text=2, random=4)
    i = torch.arange(40)
    every = ds.grades(i, torch.arange(40).expand(40, -1))
    barred = (ds.image[:, None] == ds.image) | ds.twin
    every = every.masked_fill(barred, -1)
    pool = ds.pools(i, rng_())
    best = every.topk(2).values
    assert torch.allclose(every.gather(1, pool[:, :2]).sort(descending=True).values, best)
    assert not barred.gather(1, pool).any()
    with pytest.raises(ValueError, match="at most 1 in all"): warmup_parts(dict(answers=.7, text=.5), 8)

def test_live_shares_are_those_of_the_groups():
    items, store = world()
    items["answer"] = [f"word{i}" for i in range(40)]
    assert live_share(AnswerGroups(items, store, 6, 2)) == 0
    items.loc[items.index[:20], "answer"] = "bus"
    items["image_id"] = range(40)
    ds = AnswerGroups(items, store, 39, 1)
    # the 20 that say bus find each other among all, and nobody finds the others
    assert live_share(ds) == .5
    shares = warmup_shares(items, store, K=6, shots=2)
    assert list(shares) == ["random", "text", "image", "mixed"]

def test_live_shares_where_batches_differ_in_the_number_of_sequences():
    items, store = world(n=200)
    items["answer"] = ["bus" if i < 100 else f"word{i}" for i in range(200)]
    items["image_id"] = range(200)
    ds = AnswerGroups(items, store, 30, 2, n=256)
    numbers = {len(ds.sequences(2, rng_(seed))) for seed in range(8)}
    assert len(numbers) > 1 # of 870, some are drawn twice
    assert live_share(ds) == .5

@pytest.mark.parametrize(
    "shares, own, want, said",
    [
        (dict(random=.5, text=.6, mixed=.6), "random", "random", "random pools, as the stored groups have them"),
        (dict(random=.01, text=.4, mixed=.3), "random", "mixed", "the nearest to random ones"),
        (dict(random=.01, text=.4, mixed=.05), "random", "text", "text pools, the nearest"),
        (dict(random=.01, text=.4, mixed=.3), "text", "text", "as the stored groups"),
        (dict(random=.01, text=.4), "given", "text", "text pools"),
        (dict(random=.01, text=.02), "random", "text", "no pools have 10 % live groups"),
    ],
)
def test_the_nearest_pools_with_enough_live_groups(shares, own, want, said):
    got, why = choose_sampler(shares, own)
    assert got == want and said in why

def test_loaders_draw_where_answers_meet():
    "Equal words only among neighbours: random pools are flat, and the loaders of random groups say what they take"
    items, _ = world(400, images=400)
    items["answer"] = [f"word{i // 4}" for i in range(400)]
    x = torch.eye(100).repeat_interleave(4, 0) + .01 * torch.randn(400, 100, generator=rng_())
    store = EmbedStore(items.question_id.tolist(), x, x)
    own = synth_dls(16)
    for pool in (dict(sampler="random"), dict(sampler="text"), None):
        own.info = dict(pool=pool)
        dls = warmup_dls(own, items, store, K=4, shots=1, bs=8, steps=4)
        want = dict(random="mixed", text="text").get((pool or {}).get("sampler"), "text")
        assert dls.info["warmup"]["sampler"] == want and want in dls.info["warmup_pools"]
        assert live_share(dls.train_ds) > .9
    asked = warmup_dls(own, items, store, K=4, shots=1, bs=8, steps=4, sampler="random")
    assert asked.info["warmup_pools"] == "random pools, as asked" and live_share(asked.train_ds) < .1

def test_real_questions_want_similar_pools(okvqa):
    "OKVQA's answers hardly repeat: what is measured there decides, within seconds"
    file = okvqa.parent/"blind_okvqa"/"minilm.npz"
    if not file.is_file(): pytest.skip(f"no vectors of questions in {file}")
    items = read_soft_labels(okvqa, "train")[:4000]
    z = np.load(file)
    vectors = pd.Series(range(len(z["question_id"])), index=z["question_id"])
    x = torch.tensor(z["text"][vectors[items.question_id]]).float()
    store = EmbedStore(items.question_id.tolist(), x, x)
    shares = warmup_shares(items, store, n=256, K=16, shots=2, kind="text")
    assert shares["random"] < .05 < .2 < shares["text"]
    assert choose_sampler(shares, "random")[0] == "mixed"
