"On-policy rounds: what is drawn is what is trained, estimators against enumeration, the cache, failures, a kill"
import itertools, json, warnings
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.data.core import DataLoaders
from hypothesis import given, settings, strategies as st
from leverplus.callback_core import SkipFlat, StageCallback, Stats
from leverplus.callback_grpo import GRPO, RLOO
from leverplus.callback_onpolicy import (
    DistinctPG, Drawing, Feedback, GreedyLoss, NoReward, OnPolicy, distinct_advantage, draw_groups,
    drawing_for, greedy_rewards,
)
from leverplus.callback_schedule import NoDropout, Phases, SplitShots
from leverplus.core import rng
from leverplus.dls import GroupDataset, GroupDL
from leverplus.embed import EmbedStore
from leverplus.groups import RLData
from leverplus.callback_track import Resume
from leverplus.synth import quiet
from leverplus.learner import selector_learner
from leverplus.losses import advantage, clipped_surrogate, inclusion_logp, policy_gradient
from leverplus.lvlm import MockScorer
from leverplus.pools import Pool
from leverplus.rewards import reward
from leverplus.rldata_ask import FactCache, ask
from leverplus.runs import Run
from leverplus.selector import PointerSelector
from leverplus.settings import Asking, Rewarding, plain_settings, read_settings

WORDS = "cat dog car".split()
IDS = [*range(24), *range(100, 120)]
G = torch.Generator().manual_seed(0)
STORE = EmbedStore(IDS, torch.randn(len(IDS), 6, generator=G), torch.randn(len(IDS), 6, generator=G))
ITEMS = pd.DataFrame(
    [
        dict(
            question_id=i,
            image_id=i,
            image_path=f"{i}.png",
            question=f"What is {i}?",
            answers=[WORDS[i % 3]] * 7 + [WORDS[i // 3 % 3]] * 3,
            answer=WORDS[i % 3],
        )
        for i in IDS
    ],
    index=IDS,
)
POOL = Pool({q: rng("pool", q).choice(np.arange(100, 120), 3 + q % 3, replace=False) for q in range(24)})
QS = list(range(16))
def facts_of(pool, S=2):
    return ask(
        pd.DataFrame(
            [(q, p) for q in pool for p in itertools.permutations(pool[q], S)],
            columns=["question_id", "pointer"],
        ),
        MockScorer(0),
        ITEMS,
    )
FACTS = facts_of(POOL)

def test_a_state_knows_what_its_rewards_come_from(tmp_path):
    "Other stored facts where nobody is asked, another question, another CLIP: the rounds of before are not continued"
    def go(judge, at=None):
        class Die(StageCallback):
            order = 7
            def after_backward(self):
                if self.train_iter == at: raise SystemExit("killed")
        learn = learner()
        how = dict(drawing=Drawing(G=3), cbs=Die(), resume=tmp_path/"run")
        with quiet(learn): learn.fit_onpolicy(judge, STORE, 3, **how)
    with pytest.raises(SystemExit): go(Feedback(None, ITEMS, FACTS), at=6)
    other = FACTS.assign(vqa_acc_score=1 - FACTS.vqa_acc_score)
    asked = ITEMS.assign(question=ITEMS.question.where(ITEMS.index != 3, "What else?"))
    for judge in (Feedback(None, ITEMS, other), Feedback(None, asked, FACTS)):
        with pytest.raises(ValueError, match="on_policy.fingerprint"): go(judge)
    go(Feedback(None, ITEMS, FACTS))
    elsewhere = FACTS.assign(vqa_acc_score=FACTS.vqa_acc_score.where(FACTS.question_id != 20, .5))
    def prints(facts, items=ITEMS): return GreedyLoss(Feedback(None, items, facts), POOL, STORE, 2, QS).fingerprint
    assert prints(FACTS) == prints(elsewhere)   # of a query that is not asked about
    assert len({prints(FACTS), prints(other), prints(FACTS, asked)}) == 3

class Counting:
    "MockScorer that counts prompts, and spoils or breaks off on request"
    def __init__(self, spoil=None, stop=10**9):
        self.inner = MockScorer(0)
        self.spoil = spoil
        self.stop = stop
        self.asked = []
    @property
    def fingerprint(self): return self.inner.fingerprint
    def run(self, prompts, targets, generate=True, progress=False):
        if len(self.asked) >= self.stop: raise KeyboardInterrupt
        self.asked += [(p.question_id, tuple(p.pointer)) for p in prompts]
        out = self.inner.run(prompts, targets, generate, progress)
        return out if self.spoil is None else [self.spoil(s) for s in out]

def selector(seed=0, **kw):
    torch.manual_seed(seed)
    m = PointerSelector(STORE.dim("mixed"), **dict(d_hidden=8, dropout=0.0) | kw)
    with torch.no_grad(): [p.add_(.1*torch.randn_like(p)) for p in m.parameters()]
    return m
def learner(cbs=(), **kw):
    rows = FACTS.groupby("question_id").head(4)
    ds = lambda qs: GroupDataset(r := rows[rows.question_id.isin(qs)], POOL.only(qs), STORE, r.vqa_gt_prob)
    return selector_learner(
        DataLoaders(GroupDL(ds(QS), 5, shuffle=True), GroupDL(ds(range(16, 24)), 8)), selector(**kw), cbs=cbs
    )
def feedback(scorer=None, cache=None, reward="hard_plus_soft"):
    "Rewards of a scorer, or of the table of facts"
    if cache is None and scorer is None: cache = FACTS
    return Feedback(scorer, ITEMS, cache, Rewarding(reward=reward))
def policy(judge=None, queries=None, **drawing):
    drawing = dict(G=3, queries_per_round=12, patience=None) | drawing
    return OnPolicy(judge or feedback(), STORE, Drawing(**drawing), queries=queries)
def fit(learn, n, cbs, lr=1e-2):
    with quiet(learn): learn.fit(n, lr, cbs=cbs)
    return learn
def weights(learn): return torch.cat([p.detach().flatten().clone() for p in learn.model.parameters()])

class Spy(StageCallback):
    "Ratios of a batch against the policy that drew it, before the update"
    order = 5
    def __init__(self, cb): self.cb, self.ratios, self.seen = cb, [], []
    def after_loss(self):
        self.ratios.append(
            ((self.pred.detach().double() - self.cb.drawn).exp() - 1)
            .masked_fill(~self.yb[1], 0.0)
            .abs()
            .max()
            .item()
        )
        self.seen.append(self.xb[3].clone())

# --- drawing --------------------------------------------------------------------------------------
@settings(max_examples=10)
@given(st.booleans(), st.integers(1, 3), st.integers(0, 99), st.sampled_from(["fixed", "stop"]))
def test_what_is_drawn_is_in_the_pool_with_its_log_probability(distinct, S, seed, kind):
    pool = Pool({q: p for q, p in POOL.ids.items() if len(p) > S})
    stop = kind == "stop" and S > 1
    m = selector(seed, max_shots=max(S, 2), stop=stop, dropout=0.3).train()
    qs = list(pool)[:4]
    d = draw_groups(m, pool, STORE, qs, None if stop else S, 5, distinct, (seed,))
    assert m.training
    m.eval()
    with torch.no_grad():
        lp = m(*(d[k] for k in ("query", "cands", "cand_mask", "seqs", "seq_mask"))).double()
    assert ((lp - d["logp"]).masked_fill(~d["mask"], 0.0).abs() < 1e-4).all() and (
        d["seq_mask"].any(-1) <= d["mask"]
    ).all()
    assert stop or (d["seq_mask"].any(-1) == d["mask"]).all()   # who ends by itself may show nothing
    for b, q in enumerate(qs):
        drawn = [tuple(s[k].tolist()) for s, k, ok in zip(d["seqs"][b], d["seq_mask"][b], d["mask"][b]) if ok]
        assert all(len(set(s)) == len(s) and max(s, default=0) < len(pool[q]) for s in drawn)
        assert not distinct or len(set(drawn)) == len(drawn)
        one = draw_groups(m, pool, STORE, [q], None if stop else S, 5, distinct, (seed,))
        n = one["seqs"].shape[1]
        # whoever is in the batch
        assert torch.equal(one["seqs"][0], d["seqs"][b, :n]) and torch.equal(one["greedy"][0], d["greedy"][b])
    with torch.no_grad():
        enc = m.encode(d["query"], d["cands"], d["cand_mask"])
        g = m.greedy(enc, None if stop else S)
        g, real = g if stop else (g, torch.ones_like(g, dtype=torch.bool))
    assert torch.equal(g.masked_fill(~real, 0), d["greedy"]) and torch.equal(real, d["greedy_mask"])

def test_samples_are_from_the_policy():
    "Frequencies of 3,000 equal questions, against the enumeration; distinct ones through their inclusion"
    n = 3000
    store = EmbedStore(
        [*range(n), *range(5000, 5004)],
        *[torch.cat([torch.ones(n, 3), torch.randn(4, 3, generator=torch.Generator().manual_seed(3))])] * 2
    )
    pool = Pool({q: tuple(range(5000, 5004)) for q in range(n)})
    torch.manual_seed(0)
    m = PointerSelector(store.dim("mixed"), d_hidden=8, dropout=0.0, prior_scale=2.0).eval()
    first = draw_groups(m, pool, store, [0])
    with torch.no_grad():
        seqs, lp = m.enumerate(m.encode(first["query"], first["cands"], first["cand_mask"]), 2)
    code = lambda s: s[..., 0] * 4 + s[..., 1]
    p = torch.zeros(16, dtype=torch.float64)
    p[code(seqs[0])] = lp[0].double().exp()
    d = draw_groups(m, pool, store, range(n), 2, 2)
    freq = torch.bincount(code(d["seqs"]).flatten(), minlength=16) / (2 * n)
    assert ((freq - p).abs() < 5 * (p / (2 * n)).sqrt() + 1e-9).all()
    assert not torch.equal(d["seqs"], draw_groups(m, pool, store, range(n), 2, 2, key=(1,))["seqs"])
    d = draw_groups(m, pool, store, range(n), 2, 3, True)
    w = (d["logp"] - inclusion_logp(d["logp"], d["kappa"][:, None])).exp()
    est = torch.zeros(n, 16, dtype=torch.float64).scatter_add(1, code(d["seqs"]), w)
    # .9 where the root of the keys is not drawn
    assert ((est.mean(0) - p).abs() < 5 * est.std(0) / n**0.5 + 1e-9).all()
    whole = w.sum(-1)
    assert abs(whole.mean() - 1) < 4 * whole.std() / n**0.5

@pytest.mark.parametrize("distinct", [False, True])
def test_a_policy_that_ends_by_itself_draws_every_count_as_often_as_it_should(distinct):
    n = 3000
    g = torch.Generator().manual_seed(3)
    parts = torch.cat([torch.ones(n, 3), torch.randn(3, 3, generator=g)])
    store = EmbedStore([*range(n), *range(5000, 5003)], parts, parts)
    pool = Pool({q: tuple(range(5000, 5003)) for q in range(n)})
    torch.manual_seed(0)
    m = PointerSelector(store.dim("mixed"), d_hidden=8, dropout=0., prior_scale=2., stop=True, max_shots=2).eval()
    with torch.no_grad(): m.stop.bias[0] = .5
    d = draw_groups(m, pool, store, range(n), None, 2, distinct)
    with torch.no_grad():
        every, lp, real = m.enumerate(m.encode(d["query"][:1], d["cands"][:1], d["cand_mask"][:1]), None)
    def code(seqs, real): return ((seqs + 1) * real * torch.tensor([1, 4])).sum(-1)   # 0: nothing
    p = torch.zeros(16, dtype=torch.float64)
    p[code(every[0], real[0])] = lp[0].double().exp()
    assert len(every[0]) == 10 and .5 < p[0] < .7
    first = code(d["seqs"], d["seq_mask"])[:, 0]
    freq = torch.bincount(first, minlength=16) / n
    assert ((freq - p).abs() < 5 * (p / n).sqrt() + 1e-9).all()

def facts_of_all_counts(pool):
    pairs = [(q, p) for q in pool for S in range(3) for p in itertools.permutations(pool[q], S)]
    return ask(pd.DataFrame(pairs, columns=["question_id", "pointer"]), MockScorer(0), ITEMS)

@pytest.mark.parametrize("objective, drawing", [
    (RLOO, dict(every="batch")),
    (DistinctPG, dict(distinct=True)),
    (GRPO, dict(every="round", passes=2)),
    (GRPO, dict(every="round", distinct=True)),
])
def test_rounds_of_a_policy_that_may_show_nothing(objective, drawing):
    "What pays here is to show nothing: the policy learns it, and its record holds the empty sequence"
    facts = facts_of_all_counts(POOL)
    nothing = facts.pointer.map(len) == 0
    facts["vqa_acc_score"] = np.where(nothing, 1., .2 * facts.vqa_acc_score)
    facts["vqa_gt_prob"] = np.where(nothing, .9, .1)
    judge = feedback(cache=facts, reward="soft_only")
    m = selector(stop=True, max_shots=2)
    rows = facts.groupby("question_id").head(4)
    def ds(qs): return GroupDataset(r := rows[rows.question_id.isin(qs)], POOL.only(qs), STORE, r.vqa_gt_prob)
    learn = selector_learner(DataLoaders(GroupDL(ds(QS), 5), GroupDL(ds(range(16, 24)), 8)), m)
    before = greedy_rewards(m, POOL, STORE, judge, None, QS)
    cb = policy(judge, G=4, shots=None, **drawing)
    spy = Spy(cb)
    fit(learn, 12, [objective(), cb, spy], lr=3e-2)
    if drawing.get("every") != "round": assert max(spy.ratios) < 1e-3   # what is trained is what drew
    after = greedy_rewards(m, POOL, STORE, judge, None, QS)
    assert before.mean() < .5 and after.mean() > .9
    data = cb.data()
    empty = data.rows.pointer.map(len) == 0
    assert empty.any() and data.rows.similarity_score[empty].isna().all()
    assert data.rows.similarity_score[~empty].notna().all() and set(data.shots) >= {0, 1}
    assert cb.table.reward.iloc[-1] > cb.table.reward.iloc[0]

# --- estimators -----------------------------------------------------------------------------------
def test_rloo_is_the_policy_gradient_in_expectation():
    "All 6^3 groups of three independent sequences of a pool of three, each with its probability, against d E[r]"
    m = selector().double()
    q = next(q for q in POOL if len(POOL[q]) == 3)
    d = draw_groups(m.float(), POOL, STORE, [q])
    m = m.double()
    xb = [d[k].double() if k != "cand_mask" else d[k] for k in ("query", "cands", "cand_mask")]
    seqs, lp = m.enumerate(m.encode(*xb), 2)
    r = torch.tensor([0.1, 0.9, 0.3, 0.3, 1.0, 0.0], dtype=torch.float64)
    ps = list(m.parameters())
    want = torch.autograd.grad((lp[0].exp() * r).sum(), ps, allow_unused=True)
    i = torch.tensor(list(itertools.product(range(6), repeat=3)))
    lp = m.enumerate(m.encode(*xb), 2)[1][0]
    logp = lp[i]
    rewards = r[i]
    mask = torch.ones_like(i, dtype=torch.bool)
    prob = logp.detach().sum(-1).exp()
    assert abs(prob.sum() - 1) < 1e-9
    each = -(advantage(rewards, mask, "loo") * logp).mean(-1)
    assert torch.allclose(each.mean(), policy_gradient(logp, advantage(rewards, mask, "loo"), mask))
    got = torch.autograd.grad(-(prob * each).sum(), ps, allow_unused=True, retain_graph=True)
    some = [(a, b) for a, b in zip(want, got) if a is not None]
    assert (
        len(some) > 4
        and all(torch.allclose(a, b, atol=1e-10) for a, b in some)
        and max(a.abs().max() for a, _ in some) > 1e-3
    )
    ratio = clipped_surrogate(logp, logp.detach(), advantage(rewards, mask, "loo"), mask)
    g = [torch.autograd.grad(x, ps, allow_unused=True, retain_graph=True) for x in (ratio, each.mean())]
    # at ratio 1 GRPO's loss has that gradient too
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*g) if a is not None)

@pytest.mark.parametrize("N", [2, 4, 9])
def test_distinct_advantage_is_unbiased(N):
    g = torch.Generator().manual_seed(N)
    n, M = 20_000, 9
    lp = (1.5 * torch.randn(M, generator=g, dtype=torch.float64)).log_softmax(-1)
    r = torch.rand(M, generator=g, dtype=torch.float64)
    pi = lp.exp()
    top = (lp - torch.empty(n, M, dtype=torch.float64).exponential_(generator=g).log()).sort(
        -1, descending=True
    )
    i = top.indices[:, :N]
    kappa = top.values[:, N] if N < M else torch.full((n,), -torch.inf)
    A = distinct_advantage(lp[i], kappa, r[i], torch.ones_like(i, dtype=torch.bool))
    grad = torch.zeros(n, M, dtype=torch.float64).scatter_add(1, i, A) - A.sum(-1, keepdim=True) * pi
    assert ((grad.mean(0) - pi*(r - pi @ r)).abs() <= 5*grad.std(0)/n**.5 + 1e-9).all()
    pad = torch.nn.functional.pad
    wide = distinct_advantage(
        pad(lp[i], (0, 2)),
        kappa,
        pad(r[i], (0, 2), value=float("nan")),
        pad(torch.ones_like(i, dtype=torch.bool), (0, 2)),
    )
    assert torch.equal(wide[:, :N], A) and (wide[:, N:] == 0).all()

# --- on policy ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "objective, kw, every",
    [
        (lambda: RLOO(), {}, 1),
        (DistinctPG, dict(distinct=True), 1),
        (lambda: GRPO(refresh=1), {}, 1),
        (lambda: GRPO(), dict(every="round", passes=2), 4),
    ],
)
def test_the_ratio_is_one_where_it_must_be(objective, kw, every):
    "At every batch that is drawn when its turn comes; at the first of a round's otherwise, and not later"
    learn = learner(dropout=0.3)
    cb = policy(**kw)
    spy = Spy(cb)
    fit(learn, 2, [NoDropout(), objective(), cb, spy])
    first = spy.ratios[::every]
    later = [x for i, x in enumerate(spy.ratios) if i % every]
    assert (
        len(spy.ratios) == 2 * 2 * kw.get("passes", 1)
        and max(first) < 1e-5
        and (every == 1 or max(later) > 1e-3)
    )
    f = learn.history.frame
    assert "ratio_off" not in f or f.ratio_off.max() < 1e-5
    assert cb.name not in {c.name for c in learn.cbs} and learn.dls.train.dataset is learn.dls.train_ds

@pytest.mark.parametrize(
    "objective, kw, steps",
    [
        (lambda: RLOO(skip_flat=False), {}, 3),
        (DistinctPG, dict(distinct=True), 3),
        (lambda: GRPO(skip_flat=False), dict(every="round", passes=2), 6),
    ],
)
def test_several_shot_counts_are_groups_of_their_own(objective, kw, steps):
    """A group of each count for every query of a batch, with the samples, thresholds and rewards of that count alone

    Facts in any other mixture would be noticed.
    """
    class Groups(Spy):
        def before_batch(self):
            picks = self.seq_mask.sum(-1).masked_fill(~self.mask, 0)
            self.groups.append((self.query[:, 0].tolist(), picks, self.seqs, self.yb))
    large = [q for q in QS if len(POOL[q]) > 3]
    cache = pd.concat([facts_of(POOL.only(large), S) for S in (1, 2, 3)])
    learn = learner()
    spy = Groups(None)
    spy.groups = []
    drawing = dict(shots=(3, 1, 2), G=4, queries_per_round=None, bs=4) | kw
    spy.cb = cb = policy(feedback(cache=cache), large, **drawing)
    fit(learn, 1, [NoDropout(), objective(), cb, spy])
    seen = spy.groups
    assert len(seen) == steps
    assert cb.drawing.shots == (3, 1, 2)
    assert len(large) == 10
    assert cb.table.queries.tolist() == [10]
    for qs, n, seqs, (r, m) in seen:
        k = len(qs) // 3
        assert qs == qs[:k] * 3
        assert [set(x[x > 0].tolist()) for x in n] == [{s} for s in (3, 1, 2) for _ in range(k)]
        assert m.any(-1).all()
        at = {round(float(STORE.get([q])[0, 0]), 4): q for q in large}
        for q, ss, ms, rr, ok in zip(qs, seqs.tolist(), n.tolist(), r.tolist(), m.tolist()):
            q = at[round(q, 4)]
            f = cache[cache.question_id == q].set_index("pointer")
            want = [
                reward(f.loc[[tuple(POOL[q][i] for i in s[:c])]], "hard_plus_soft")[0]
                for s, c, o in zip(ss, ms, ok)
                if o
            ]
            assert want == pytest.approx([x for x, o in zip(rr, ok) if o], abs=1e-6)
    if kw.get("every") != "round": assert max(spy.ratios) < 1e-4
    # thresholds of the first batch; one shot from four or five candidates leaves none or one out
    if kw.get("distinct"):
        first = cb.data().rows
        store, pool, _ = cb.world()
        batch = {round(x, 4) for x in seen[0][0]}
        there = [q for q in large if round(float(STORE.get([q])[0, 0]), 4) in batch]
        for S in (3, 1, 2):
            d = draw_groups(learner().model, pool, store, there, S, 4, True, (0, 0, S))
            mine = first[(first.pointer.map(len) == S) & (first.gen_method == "policy")]
            got = mine.groupby("question_id").kappa.first()
            assert [got[q] for q in there] == pytest.approx(d["kappa"].tolist(), abs=1e-5)
            assert (S == 1) == (d["kappa"] == -torch.inf).any().item()
    rows = cb.data().validate(ITEMS).rows
    assert set(rows.pointer.map(len)) == {1, 2, 3}
    assert cb.data().manifest["onpolicy"]["shots"] == [3, 1, 2]
    assert set(cb.seen) == {(q, s) for q in large for s in (1, 2, 3)}
    by_group = rows.assign(r=reward(rows, "hard_plus_soft")).groupby(["question_id", rows.pointer.map(len)])
    best = by_group.r.max()
    assert {k: pytest.approx(v, abs=1e-6) for k, v in best.items()} == cb.seen

def test_shot_counts_of_their_own_are_trained_as_if_alone():
    "One update on groups of one and of two shots is the mean of the updates on each: no comparison crosses them"
    def grads(shots):
        learn = learner(seed=1)
        known = feedback(cache=pd.concat([facts_of(POOL, 1), FACTS]))
        cb = policy(known, QS, G=4, shots=shots, queries_per_round=None, bs=16)
        out = []
        class Grad(StageCallback):
            order = 50
            def before_step(self):
                out.append(
                    torch.cat(
                        [
                            (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                            for p in self.model.parameters()
                        ]
                    )
                )
        cb.draw = lambda qs: _drawn(cb, qs)
        fit(learn, 1, [NoDropout(), RLOO(scale="none", adv_clip=None, skip_flat=False), cb, Grad()], lr=0.0)
        return out[0]
    def _drawn(cb, qs): # the same noise whatever else is drawn
        from leverplus.callback_onpolicy import stack_padded
        store, pool, _ = cb.world()
        drawing = cb.drawing
        parts = [draw_groups(cb.model, pool, store, qs, S, drawing.G, key=(7, S)) for S in drawing.shots]
        return {k: None if parts[0][k] is None else stack_padded([d[k] for d in parts]) for k in parts[0]}
    one = grads(1)
    two = grads(2)
    both = grads((1, 2))
    assert (
        torch.allclose(both, (one + two) / 2, atol=1e-6)
        and one.norm() > 1e-3
        and not torch.allclose(one, two, atol=1e-4)
    )

def test_dropout_is_noticed():
    class Noisy(DistinctPG): dropout = True
    with pytest.raises(ValueError, match="NoDropout"):
        fit(learner(dropout=0.5), 1, [Noisy(), policy(distinct=True)])
    fit(learner(dropout=0.5), 1, [DistinctPG(), policy(distinct=True)])

def test_it_learns_what_pays():
    "Greedy reward of the questions that are trained on, after rounds on a table of all pairs; every objective"
    judge = feedback(reward="gtprob")
    drawing = Drawing(G=4, bs=16, queries_per_round=None, patience=None)
    value = lambda l: greedy_rewards(l.model, POOL, STORE, judge, queries=QS).mean()
    for objective in ("rloo", "grpo", "distinct"):
        learn = learner()
        before = value(learn)
        with quiet(learn):
            assert (
                learn.fit_onpolicy(
                    feedback(reward="gtprob"), STORE, 12, 5e-2, objective, drawing, beta=0.001, best=False,
                    watch=None,
                )
                is learn
            )
        t = learn.onpolicy.table
        assert (
            value(learn) > before + 0.05
            and t.headroom.iloc[-1] < t.headroom.iloc[0]
            and (t.headroom >= -1e-9).all()
            and len(t) == 12
        )
        assert {"headroom", "prompts_new", "kl"} <= set(learn.history.frame)

def test_prompts_are_counted_and_asked_once():
    s = Counting()
    cache = FactCache()
    learn = fit(learner(), 3, [RLOO(), a := policy(feedback(s, cache))])
    t = a.table
    assert (
        t.new.sum() == len(s.asked) == len(set(s.asked)) == len(cache) == t.pairs.iloc[-1]
        and t.queries.tolist() == [8, 8, 8]
        and t.known.sum() > 0
    )
    again = Counting()
    b = None
    other = fit(learner(), 3, [RLOO(), b := policy(feedback(again, cache))])
    assert (
        not again.asked
        and b.tried == a.tried
        and torch.equal(weights(learn), weights(other))
        and b.table.known.sum() == t.new.sum() + t.known.sum()
    )
    assert learn.history.frame.prompts_new.tolist() == t.new.tolist()
    asked = [set(a.round_queries(k)) for k in range(3)]
    assert asked[0] | asked[1] == set(QS) and len(asked[2]) == 8
    table = fit(learner(), 3, [RLOO(), c := policy()])
    assert torch.equal(weights(table), weights(learn)) and c.table.new.sum() == 0

def test_rounds_end_without_less_headroom():
    flat = FACTS.assign(vqa_acc_score=1.0, vqa_correct=1.0)
    learn = learner()
    cb = policy(feedback(cache=flat), patience=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(learn, 9, [RLOO(), SkipFlat(), cb])
    assert (
        len(cb.table) == 3
        and (cb.table.headroom == 0).all()
        and (cb.table.live == 0).all()
        and not learn.model.training
    )

# --- settings -------------------------------------------------------------------------------------
@given(st.integers(2, 20), st.one_of(st.none(), st.integers(1, 4), st.sets(st.integers(1, 6), min_size=1)),
       st.sampled_from([None, "batch", "round"]), st.sampled_from([None, True, False]), st.integers(0, 99))
def test_a_drawing_is_saved_and_read_back(G, shots, every, distinct, seed):
    shots = tuple(shots) if isinstance(shots, set) else shots
    drawing = Drawing(G=G, shots=shots, every=every, distinct=distinct, seed=seed)
    assert drawing.shots == (shots if isinstance(shots, tuple) else (shots,))
    if shots: assert Drawing(shots=np.array(shots)).shots == drawing.shots
    assert read_settings(Drawing, json.loads(json.dumps(plain_settings(drawing)))) == drawing

@pytest.mark.parametrize("objective, every, distinct", [
    (RLOO, "batch", False),
    (GRPO, "round", False),
    (lambda: GRPO(refresh=1), "batch", False),
    (DistinctPG, "batch", True),
])
def test_what_is_left_open_goes_with_the_objective(objective, every, distinct):
    "Filled in for every fit anew, as if it had been said; what was said stays"
    said = policy(every=every, distinct=distinct)
    cb = policy()
    a = fit(learner(), 2, [objective(), said])
    b = fit(learner(), 2, [objective(), cb])
    assert torch.equal(weights(a), weights(b)) and said.tried == cb.tried
    assert (cb.drawing.every, cb.drawing.distinct) == (every, distinct)
    fit(learner(), 1, [RLOO(), cb])
    assert (cb.drawing.every, cb.drawing.distinct) == ("batch", False)
    assert drawing_for(objective(), Drawing(every="round", distinct=False)) == Drawing(every="round", distinct=False)

def test_grpo_can_be_told_to_draw_every_batch():
    learn = learner()
    drawing = Drawing(G=3, every="batch")
    with quiet(learn): learn.fit_onpolicy(feedback(), STORE, 2, 1e-2, "grpo", drawing, watch=None)
    assert learn.onpolicy.drawing == replace(drawing, distinct=False) and len(learn.onpolicy.table) == 2

@pytest.mark.parametrize("objective, drawing, says", [
    ("rloo", dict(distinct=True), "biased"),
    ("rloo", dict(every="round"), "no ratio"),
    ("rloo", dict(passes=2), "a second pass"),
    ("distinct", dict(distinct=False), "without replacement"),
    ("distinct", dict(passes=2), "a second pass"),
    ("ppo", {}, "wanted 'rloo', 'grpo', 'distinct'"),
])
def test_a_stage_refuses_a_drawing_that_contradicts_its_objective(objective, drawing, says):
    learn = learner()
    with pytest.raises(ValueError, match=says), quiet(learn):
        learn.fit_onpolicy(feedback(), STORE, 2, 1e-2, objective, Drawing(**drawing))

def test_rewards_are_those_of_the_mode_and_its_weights():
    weighted = Feedback(None, ITEMS, FACTS, Rewarding(reward="hard_plus_soft", weights=dict(hard_weight=2.)))
    pairs = FACTS[["question_id", "pointer"]].head(9)
    assert weighted(pairs).tolist() == reward(FACTS.head(9), "hard_plus_soft", hard_weight=2.).tolist()
    assert weighted.fingerprint != feedback().fingerprint
    with pytest.raises(TypeError, match="heavy"): Feedback(None, ITEMS, FACTS, Rewarding(weights=dict(heavy=1)))

def test_the_scorer_is_asked_as_was_said():
    class Styles(Counting):
        def run(self, prompts, *args, **kw):
            self.styles = {p.style for p in prompts}
            return super().run(prompts, *args, **kw)
    scorer = Styles()
    chat = Feedback(scorer, ITEMS, asking=Asking(style="chat"))
    chat(FACTS[["question_id", "pointer"]].head(2))
    assert scorer.styles == {"chat"} and chat.fingerprint != Feedback(Counting(), ITEMS).fingerprint

def test_a_run_is_not_continued_with_another_drawing(tmp_path):
    def run(**kw): return fit(learner(), 1, [RLOO(), policy(**kw), Resume(tmp_path / "r")])
    run()
    with pytest.raises(ValueError, match="on_policy.drawing.G: 3 there, 4 now"): run(G=4)

def test_a_run_is_not_continued_with_other_items(tmp_path):
    "The pictures and texts behind its pool count, others do not"
    items = ITEMS.assign(image_path=[str(tmp_path/f"{i}.png") for i in ITEMS.index])
    for path in items.image_path: Path(path).write_bytes(path.encode())
    shown = QS[0]
    def run(items=items):
        judge = Feedback(Counting(), items, FactCache(tmp_path/"facts"))
        return fit(learner(), 1, [RLOO(), policy(judge, queries=QS), Resume(tmp_path/"r")])
    run()
    run()
    Path(items.image_path[shown]).write_bytes(b"another picture")
    with pytest.raises(ValueError, match="on_policy"): run()
    Path(items.image_path[shown]).write_bytes(items.image_path[shown].encode())
    with pytest.raises(ValueError, match="on_policy"): run(items.assign(question="Who?"))
    run()

# --- failures -------------------------------------------------------------------------------------
def test_a_sequence_without_reward_stops_everything_by_name():
    bad = lambda s: (
        replace(s, error="OSError: no image", text=None, logprobs=(), gt_prob=float("nan"))
        if s.question_id == 3
        else s
    )
    cache = FactCache()
    s = Counting(bad)
    learn = learner()
    with pytest.raises(NoReward, match=r"question_id 3, pointer \(1\d\d, 1\d\d\): OSError: no image"):
        fit(learn, 2, [RLOO(), policy(feedback(s, cache), QS)])
    kept = len(cache)
    assert kept and "on_policy" not in {c.name for c in learn.cbs}
    mended = Counting()
    fit(learner(), 2, [RLOO(), cb := policy(feedback(mended, cache), QS)])
    assert cb.table.pairs.iloc[-1] == kept + len(mended.asked) and any(q == 3 for q, _ in mended.asked)

def test_a_table_that_lacks_a_pair_names_it():
    with pytest.raises(KeyError, match=r"question_id \d+, pointer .* no scorer to ask"):
        fit(learner(), 2, [RLOO(), policy(feedback(cache=FACTS[FACTS.question_id != 3]))])

@pytest.mark.parametrize(
    "cbs, says",
    [
        (lambda: [policy()], "add an objective"),
        (lambda: [RLOO(), policy(distinct=True)], "biased"),
        (lambda: [RLOO(), policy(every="round")], "no ratio"),
        (lambda: [GRPO(), policy(every="batch")], "refresh=1"),
        (lambda: [GRPO(refresh=1), policy(every="round")], "refresh='epoch'"),
        (lambda: [DistinctPG(), policy(distinct=False)], "without replacement"),
        (lambda: [DistinctPG(), policy(every="round")], "without replacement"),
        (lambda: [policy(every="batch", passes=2)], "every='round'"),
        (lambda: [policy(every="day")], "choose one of 'batch', 'round'"),
        (lambda: [GRPO(refresh="never"), policy(every="round")], "refresh='epoch'"),
        (lambda: [DistinctPG()], "without replacement"),
        (lambda: [RLOO(), Phases({"a": (None, 1)}), policy()], "Phases"),
        (lambda: [RLOO(), policy(shots=None)], "without STOP"),
        (lambda: [RLOO(), policy(shots=3)], "pool has 3 candidates"),
        (lambda: [RLOO(), SplitShots(), policy()], "would order them anew"),
        (lambda: [policy(shots=())], "several different"),
        (lambda: [policy(shots=(2, 2))], "several different"),
        (lambda: [policy(shots=(None, 2))], "several different"),
        (lambda: [RLOO(), policy(passes=2)], "every='round'"),
        (lambda: [policy(G=1)], "G >= 2"),
        (lambda: [policy(Feedback(None, ITEMS))], "pass a scorer"),
        (lambda: [policy(feedback(reward="nice"))], "nice"),
        (lambda: [policy(seeds=1)], "seeds: no such setting; did you mean seed?"),
    ],
)
def test_refusals(cbs, says):
    with pytest.raises(ValueError, match=says): fit(learner(), 1, cbs())

# --- what is kept ---------------------------------------------------------------------------------
def test_what_was_drawn_becomes_a_record(tmp_path):
    from leverplus.rldata_merge import merge
    fit(learner(), 2, [DistinctPG(), cb := policy(feedback(Counting()), distinct=True)])
    d = cb.data().validate(ITEMS)
    r = d.rows
    manifest = d.manifest["onpolicy"]
    assert (
        set(r.gen_method) <= {"policy", "beam"}
        and len(r) == cb.table.pairs.iloc[-1]
        and len(manifest["round"]) == len(r)
        and json.loads(json.dumps(manifest, allow_nan=False)) == manifest
    )
    drawn = r.gen_method == "policy"
    assert r[["logprob_score", "kappa"]][drawn].notna().all(axis=None) and r[["logprob_score", "kappa"]][
        ~drawn
    ].isna().all(axis=None)
    assert sum(map(len, (cb.data([0]), cb.data([1])))) == len(d)
    cos = [float((STORE.get(list(p)) @ STORE.get([q])[0]).mean()) for q, p in zip(r.question_id, r.pointer)]
    assert np.allclose(cos, r.similarity_score, atol=1e-6)
    d.save(tmp_path / "d")
    stored = RLData.load(tmp_path / "d")
    assert stored.rows.equals(r)
    # appended to groups that hold some of them
    both = merge(RLData(d.rows[:5], d.pool), d)
    assert len(both) == len(d)

def test_a_killed_run_goes_on(tmp_path):
    "Killed in the third round and started again: weights, rounds and samples of an unbroken run, no prompt twice"
    def run(scorer, folder, cache):
        learn = learner()
        return fit(learn, 4, [RLOO(), cb := policy(feedback(scorer, FactCache(cache))), Resume(folder)]), cb
    s = Counting()
    whole, a = run(s, tmp_path / "a", tmp_path / "fa")
    stop = int(a.table.new[:2].sum()) + 1
    first = Counting(stop=stop)
    rest = Counting()
    with pytest.raises(KeyboardInterrupt): run(first, tmp_path/"b", tmp_path/"fb")
    got, b = run(rest, tmp_path/"b", tmp_path/"fb")
    assert (
        torch.equal(weights(got), weights(whole))
        and b.tried == a.tried
        and b.seen == a.seen
        and set(first.asked).isdisjoint(rest.asked)
        and len(first.asked) + len(rest.asked) == len(s.asked)
    )
    pd.testing.assert_frame_equal(b.table, a.table)   # what each round cost, too
    assert b.table.new.sum() == len(s.asked)
    assert got.history.frame.prompts_new.tolist() == whole.history.frame.prompts_new.tolist()

def test_a_fit_that_was_killed_at_its_very_end_is_finished_by_the_next_start(tmp_path, monkeypatch):
    "The state says so already; history and settings.json are brought up to it"
    def run():
        cb = policy(feedback(Counting(), FactCache(tmp_path/"f")))
        return fit(learner(), 2, [RLOO(), cb, Resume(tmp_path/"run")])
    def die(self): raise SystemExit("killed")
    kept = Resume.write_beside
    with monkeypatch.context() as m:
        m.setattr(Resume, "write_beside", lambda self: die(self) if self.finished else kept(self))
        with pytest.raises(SystemExit): run()
    assert Run(tmp_path/"run").finished is None
    run()
    there = Run(tmp_path/"run")
    assert there.finished and there.metrics == dict(epochs=2)
    assert len(there.history) == 2

# --- beside stored groups -------------------------------------------------------------------------
@pytest.mark.parametrize("objective", [RLOO, GRPO])
def test_lr_find_asks_no_scorer(objective, tmp_path):
    "The losses are those of the stored groups, and the stage behind it is that without"
    def run(look):
        scorer = Counting()
        learn = learner()
        learn.path = tmp_path
        cb = policy(feedback(scorer, FactCache()))
        learn.add_cbs([objective(), cb])
        with quiet(learn):
            if look:
                learn.lr_find(num_it=20, show_plot=False)
                assert scorer.asked == [] and not cb.trace and len(learn.recorder.losses) == 20
            learn.fit(2, 1e-2)
        return weights(learn), cb.table, scorer.asked
    (a, table, asked), (b, again, asked_again) = run(False), run(True)
    assert torch.equal(a, b) and asked == asked_again
    pd.testing.assert_frame_equal(table, again)

def test_lr_find_with_what_only_weighs_draws_is_refused(tmp_path):
    learn = learner()
    learn.path = tmp_path
    with quiet(learn), pytest.raises(ValueError, match="look for a rate with `RLOO"):
        learn.lr_find(num_it=20, cbs=[DistinctPG(), policy()], show_plot=False)

def test_stored_groups_that_cannot_teach_do_not_matter():
    def flat():
        rows = FACTS.groupby("question_id").head(1)
        ds = lambda qs: GroupDataset(
            r := rows[rows.question_id.isin(qs)], POOL.only(qs), STORE, r.vqa_gt_prob
        )
        return selector_learner(
            DataLoaders(GroupDL(ds(QS), 5, shuffle=True), GroupDL(ds(range(16, 24)), 8)), selector()
        )
    with pytest.raises(ValueError, match="RLOO: 0 of 16 groups have any reward difference"):
        fit(flat(), 1, [RLOO()])
    learn = flat()
    before = weights(learn)
    fit(learn, 1, [RLOO(), policy()])
    assert not torch.equal(weights(learn), before)

def test_a_sequence_that_was_drawn_twice_has_its_mass_once():
    class Mass(StageCallback):
        order = 5
        def before_fit(self): self.seen, self.repeated = [], 0
        def after_loss(self):
            for lp, s, m in zip(self.pred.detach().exp().tolist(), self.xb[3].tolist(), self.yb[1].tolist()):
                once = {tuple(x): p for p, x, ok in zip(lp, s, m) if ok}
                self.seen.append(sum(once.values()))
                self.repeated += sum(m) - len(once)
    learn = learner()
    fit(learn, 1, [RLOO(skip_flat=False), policy(G=9), spy := Mass()])
    assert spy.repeated > 20
    assert (
        learn.history.frame.mass.iloc[0] == pytest.approx(np.mean(spy.seen), rel=1e-4)
        and max(spy.seen) <= 1 + 1e-5
    )

# --- choosing an epoch ----------------------------------------------------------------------------
DEV = list(range(16, 24))
def judge(scorer=None, shots=2, **kw):
    return GreedyLoss(feedback(scorer, reward="soft_only"), POOL, STORE, shots, DEV, **kw)

def test_greedy_loss_is_what_a_table_would_say():
    "The same number by `pick_model` and facts looked up one by one; no batch, mode or random state is touched"
    from leverplus.infer import pick_model
    m = selector(3)
    truth = FACTS.set_index(["question_id", "pointer"]).vqa_acc_score
    learn = learner()
    learn.model = m.train()
    state = torch.get_rng_state()
    picks = pick_model(m, POOL.only(DEV), STORE, 2)
    want = [1 - truth[q, tuple(p)] for q, p in zip(picks.question_id, picks.pointer)]
    got = judge()(learn)
    assert (
        got.dtype == torch.float64
        and got.tolist() == pytest.approx(want)
        and m.training
        and torch.equal(torch.get_rng_state(), state)
    )
    assert greedy_rewards(
        m, POOL, STORE, feedback(reward="soft_only"), queries=DEV, bs=3
    ).tolist() == pytest.approx([1 - w for w in want])
    both = judge(MockScorer(0), (1, 2))(learn)
    one = judge(MockScorer(0), 1)(learn)
    assert both.tolist() == pytest.approx(((one + got) / 2).tolist())
    with pytest.raises(ValueError, match="shots \\(\\)"): judge(shots=())
    with pytest.raises(ValueError, match="no queries"):
        GreedyLoss(feedback(), POOL, STORE, queries=[])
    with pytest.raises(NoReward, match=f"question_id {DEV[0]}"):
        judge(Counting(lambda s: replace(s, error="broken")))(learn)
    assert (
        judge(shots=range(2, 3)).shots == judge(shots=np.array([2])).shots == (2,)
        and judge(shots=np.array([2])).fingerprint == judge().fingerprint != judge(shots=(1, 2)).fingerprint
    )
    class Poor(Counting): # answers all questions but one
        def run(self, prompts, *a, **k):
            return [
                replace(r, error="broken") if p.question_id == DEV[3] else r
                for p, r in zip(prompts, super().run(prompts, *a, **k))
            ]
    with pytest.raises(NoReward, match=f"question_id {DEV[3]}"): judge(Poor())(learn)
    with pytest.warns(
        UserWarning, match=f"1 of 8 greedy picks have no reward and count as 0, first question_id {DEV[3]}"
    ):
        poor = judge(Poor(), max_failed=0.2)(learn)
    assert poor[3] == 1 and torch.equal(poor[:3], got[:3]) and torch.equal(poor[4:], got[4:])
    with pytest.raises(NoReward, match=f"1 of 8 .* first question_id {DEV[3]}"):
        judge(Poor(), max_failed=0.1)(learn)

def test_greedy_loss_judges_by_what_it_was_made_with():
    scorer = MockScorer(0)
    one = judge(scorer)
    learn = learner()
    before, was = one(learn), one.fingerprint
    scorer.seed = 1 # as a model whose weights change
    assert one.fingerprint != was
    with pytest.raises(ValueError, match="not those that it was made with"): one(learn)
    scorer.seed = 0
    assert torch.equal(one(learn), before)

def test_all_stages_choose_by_it_and_asking_costs_one_prompt_per_new_pick():
    "`choose_by` decides which weights a stage keeps, and is part of what a resumed stage must have in common"
    scorer = Counting()
    seen = []
    class Watched(GreedyLoss):
        def __call__(self, learn):
            out = super().__call__(learn)
            seen.append((out.mean().item(), weights(learn)))
            return out
    score = Watched(feedback(scorer, reward="soft_only"), POOL, STORE, 2, DEV)
    drawing = Drawing(G=3, queries_per_round=12, patience=None)
    ways = set()
    for stage, kw in (
        ("fit_rce", {}),
        ("fit_sft", {}),
        ("fit_listwise", dict(temp=0.1)),
        ("fit_grpo", dict(min_live=0.0)),
        (
            "fit_onpolicy",
            dict(feedback=feedback(), store=STORE, rounds=4, drawing=drawing),
        ),
    ):
        kept = {}
        for by in (score, None):
            learn = learner()
            learn.choose_by = by
            seen.clear()
            with quiet(learn), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                getattr(learn, stage)(**dict(lr=0.1) | (kw if "rounds" in kw else dict(n_epoch=4) | kw))
            kept[by] = weights(learn)
            if by is not None: # the first of the smallest, of the start and four epochs
                losses = [v for v, _ in seen]
                assert len(seen) == 5 and torch.equal(kept[by], seen[int(np.argmin(losses))][1])
        ways.add(torch.equal(kept[score], kept[None]))
    # another choice than regret's somewhere; nothing asked twice
    assert False in ways and len(scorer.asked) == len(set(scorer.asked))

def test_a_stage_is_not_continued_under_another_judge(tmp_path):
    def run(by):
        learn = learner()
        learn.choose_by = by
        with quiet(learn):
            learn.fit_rce(2, 0.1, resume=tmp_path / "r")
            return weights(learn)
    first = run(judge())
    assert torch.equal(first, run(judge()))
    for other in (None, judge(MockScorer(0), 1)):
        with pytest.raises(ValueError, match="other settings"): run(other)
