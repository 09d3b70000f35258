"The pointer selector: probabilities, invariances, decoders, gradients, checkpoints"
import itertools, json, math, subprocess, sys
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from leverplus.checkpoints import STAMP
from leverplus.core import frozen
from leverplus.decode import check_room, gumbel_given_max
from leverplus.losses import entropy_steps, kl_exact
from leverplus.selector import PointerSelector, Shared, begin_alike, check_seqs

D, H = 6, 10
close = lambda a, b, tol=1e-5: torch.testing.assert_close(a, b, atol=tol, rtol=tol)
states = pytest.mark.parametrize("state", ["gate", "none"])

def selector(seed=0, state="gate", prior=True, stir=True, **kw):
    "A selector; `stir` moves everything that starts at 0, so that no term is switched off"
    torch.manual_seed(seed)
    m = PointerSelector(D, H, state=state, prior=prior, n_heads=2, **kw)
    if stir:
        with torch.no_grad():
            for p in m.parameters(): p.add_(.3*torch.randn_like(p))
            if prior: m.gains.copy_(torch.tensor([.3, .5]))
    return m.eval()

def pools(seed=0, B=3, K=5, pad=1):
    "Queries with pools of K, of which the last rows have `pad` fewer candidates"
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(B, K, dtype=torch.bool)
    if pad: mask[1:, K-pad:] = False
    return torch.randn(B, D, generator=g), torch.randn(B, K, D, generator=g), mask

def groups(mask, N, S, seed=0):
    "Valid sequences of unequal length, some of them wholly padding"
    g = torch.Generator().manual_seed(seed)
    seqs = (
        torch.rand(*mask.shape[:1], N, mask.shape[1], generator=g)
        .masked_fill(~mask[:, None], -1)
        .topk(S, -1)
        .indices
    )
    n = torch.randint(0, S + 1, seqs.shape[:2], generator=g)
    n[:, 0] = S
    seq_mask = torch.arange(S) < n[..., None]
    return seqs.masked_fill(~seq_mask, 0), seq_mask

def every(K, S): return torch.tensor(list(itertools.permutations(range(K), S)))

# --- probabilities --------------------------------------------------------------------------------

@states
@pytest.mark.parametrize("prior", [True, False])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), S=st.integers(1, 3), pad=st.integers(0, 1))
def test_probabilities_sum_to_one(state, prior, seed, S, pad):
    m = selector(seed, state, prior)
    q, c, mask = pools(seed, K=5, pad=pad)
    enc = m.encode(q, c, mask)
    seqs, lp = m.enumerate(enc, S)
    assert seqs.shape == (3, math.perm(5, S), S)
    close(lp.exp().sum(-1), torch.ones(3))
    close(m.logp(enc, seqs), lp)
    assert torch.equal(lp.isfinite().sum(-1), torch.tensor([math.perm(int(k), S) for k in mask.sum(-1)]))

@states
def test_enumerate_is_every_permutation_once(state):
    m = selector(1, state)
    q, c, mask = pools(1)
    seqs, lp = m.enumerate(m.encode(q, c, mask), 3)
    assert torch.equal(seqs[0], every(5, 3))
    with pytest.raises(ValueError, match="15,249,024 sequences"):
        m.enumerate(m.encode(q, torch.randn(3, 64, D)), 4)

def test_step_logp_agrees_with_teacher_forcing():
    m = selector(2)
    q, c, mask = pools(2)
    enc = m.encode(q, c, mask)
    seqs, seq_mask = groups(mask, 4, 3)
    lps = m.step_logps(enc, seqs, seq_mask)
    for t in range(3):
        want = m.step_logp(enc, seqs[..., :t])
        real = seq_mask[..., t]
        close(lps[:, :, t][real].exp(), want[real].exp())
    assert m.step_logp(enc, torch.zeros(3, 7, 0, dtype=torch.long)).shape == (3, 7, 5)
    close(m.step_logp(enc, seqs[..., :0]).exp().sum(-1), torch.ones(3, 4))

# --- invariances ----------------------------------------------------------------------------------

@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_batched_equals_one_by_one_and_padding_changes_nothing(seed):
    m = selector(seed)
    q, c, mask = pools(seed, pad=1)
    seqs, seq_mask = groups(mask, 4, 3, seed)
    lp = m(q, c, mask, seqs, seq_mask)
    for b in range(3):
        k = int(mask[b].sum())
        for n in range(4):
            s = seqs[b, n][seq_mask[b, n]]
            alone = m(q[b:b+1], c[b:b+1, :k], mask[b:b+1, :k], s[None, None]) if len(s) else torch.zeros(1, 1)
            close(lp[b, n], alone[0, 0])
    wide = torch.cat([c, torch.full((3, 2, D), 7.0)], 1), torch.cat(
        [mask, torch.zeros(3, 2, dtype=torch.bool)], 1
    )
    more = torch.nn.functional.pad(seqs, (0, 1, 0, 2)), torch.nn.functional.pad(seq_mask, (0, 1, 0, 2))
    out = m(q, *wide, *more)
    close(out[:, :4], lp)
    assert (out[:, 4:] == 0).all()

@states
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_permuting_candidates_permutes_everything(state, seed):
    m = selector(seed, state)
    q, c, mask = pools(seed)
    perm = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    back = perm.argsort()
    seqs, seq_mask = groups(mask, 4, 2, seed)
    moved = back[seqs].masked_fill(~seq_mask, 0)
    a = m.encode(q, c, mask)
    b = m.encode(q, c[:, perm], mask[:, perm])
    close(m.logp(b, moved, seq_mask), m.logp(a, seqs, seq_mask))
    close(m.step_logp(b, moved[:, :1, :1]).exp(), m.step_logp(a, seqs[:, :1, :1])[..., perm].exp())
    assert torch.equal(perm[m.greedy(b, 2)], m.greedy(a, 2))

def test_norms_do_not_matter():
    m = selector(3)
    q, c, mask = pools(3)
    seqs = every(4, 2).expand(3, -1, -1)
    close(m(7*q, .1*c, mask, seqs), m(q, c, mask, seqs))

# --- dependence on what was picked ----------------------------------------------------------------

def renormalised(lp, pick): return lp.index_fill(-1, torch.tensor([pick]), -torch.inf).log_softmax(-1)

def test_gate_depends_on_the_pick_and_none_only_masks():
    for state in ("gate", "none"):
        m = selector(4, state)
        q, c, mask = pools(4, pad=0)
        enc = m.encode(q, c, mask)
        one = m.step_logp(enc, torch.zeros(3, 1, 0, dtype=torch.long))[:, 0]
        gap = [
            (m.step_logp(enc, torch.full((3, 1, 1), k))[:, 0].exp() - renormalised(one, k).exp())
            .abs()
            .max()
            .item()
            for k in range(5)
        ]
        assert (min(gap) > 1e-3) if state == "gate" else (max(gap) < 1e-6)

def test_step_embedding_alone_is_not_the_dependence():
    m = selector(5)
    q, c, mask = pools(5, pad=0)
    with torch.no_grad(): m.step_emb.zero_()
    enc = m.encode(q, c, mask)
    two = [m.step_logp(enc, torch.full((3, 1, 1), k))[:, 0] for k in (0, 1)]
    rest = [x[:, 2:].softmax(-1) for x in two]   # the three candidates free in both
    assert (rest[0] - rest[1]).abs().max() > 1e-3

# --- the untrained policy is retrieval ------------------------------------------------------------

@states
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_untrained_is_similarity_order(state, seed):
    m = selector(seed, state, stir=False)
    q, c, mask = pools(seed, K=6)
    cos = torch.nn.functional.cosine_similarity(q[:, None], c, dim=-1).masked_fill(~mask, -torch.inf)
    assert torch.equal(m.greedy(m.encode(q, c, mask), 4), cos.topk(4).indices)
    close(
        m.step_logp(m.encode(q, c, mask), torch.zeros(3, 1, 0, dtype=torch.long))[:, 0].exp(),
        (10 * cos).softmax(-1),
    )

def test_one_model_serves_all_shots():
    m = selector(6)
    q, c, mask = pools(6, K=7)
    enc = m.encode(q, c, mask)
    picks = [m.greedy(enc, S) for S in (1, 2, 3, 4)]
    for a, b in zip(picks, picks[1:]): assert torch.equal(a, b[:, :-1])
    assert m.greedy(enc, 0).shape == (3, 0)   # no pick is a number, too
    for S in (-1, 5):
        with pytest.raises(ValueError, match=r"0\.\.4"): m.greedy(enc, S)

@pytest.mark.parametrize("kw", [{}, dict(stop=True)])
def test_no_shots_are_one_certain_sequence(kw):
    m = selector(6, **kw)
    q, c, mask = pools(6)
    shared = Shared(c[0], torch.arange(5).repeat(3, 1))
    for enc in (m.encode(q, c, mask), m.encode(q, c, mask, top_m=2), m.encode(q, shared), m.encode(q, c[0])):
        nothing = torch.zeros(3, 1, 0, dtype=torch.long)
        for seqs, lp in (
            m.beam(enc, 0, 1),
            m.sample(enc, 0, 1),
            m.sample(enc, 0, 1, distinct=False),
            m.enumerate(enc, 0),
        ):
            assert torch.equal(seqs, nothing) and torch.equal(lp, torch.zeros(3, 1))
        barred = dict(stop=False) if kw else {}
        assert m.step_logps(enc, nothing, **barred).shape == (3, 1, 0, enc.mask.shape[1])
        assert torch.equal(m.logp(enc, nothing, **barred), torch.zeros(3, 1))
    assert torch.equal(m.logp_set(enc, nothing), m.logp(enc, nothing))
    with pytest.raises(ValueError, match="width 2: wanted 1..1"): m.beam(enc, 0, 2)

# --- decoding -------------------------------------------------------------------------------------

def slow_beam(m, q, c, S, W):
    "Beam search of one query in plain Python"
    beams = [((), 0.)]
    enc = m.encode(q[None], c[None])
    for t in range(S):
        grown = []
        for s, lp in beams:
            step = m.step_logp(enc, torch.tensor(s, dtype=torch.long).view(1, 1, t))[0, 0]
            grown += [((*s, k), lp + step[k].item()) for k in range(len(c)) if k not in s]
        beams = sorted(grown, key=lambda x: -x[1])[:W]
    return beams

@states
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), S=st.integers(1, 3))
def test_beam_equals_brute_force(state, seed, S):
    m = selector(seed, state)
    q, c, mask = pools(seed, K=5, pad=1)
    enc = m.encode(q, c, mask)
    # wide enough to lose nothing
    W = math.perm(4, S)
    seqs, lp = m.beam(enc, S, math.perm(5, S))
    close(lp[:, :W], m.enumerate(enc, S)[1].topk(W, -1).values)
    close(m.logp(enc, seqs[:, :W]), lp[:, :W])
    # what a padded pool does not have is -inf
    assert torch.equal(lp[1:].isfinite().sum(-1), torch.full((2,), W))
    check_seqs(seqs[:, :W], None, mask)
    seqs, lp = m.beam(enc, S, 3)                                          # and a narrow one
    for b in range(3):
        want = slow_beam(m, q[b], c[b, mask[b]], S, 3)
        assert [tuple(s) for s in seqs[b].tolist()] == [s for s, _ in want]
        close(lp[b], torch.tensor([x for _, x in want]))
    assert torch.equal(m.beam(enc, S, 1)[0][:, 0], m.greedy(enc, S))

def test_decoders_refuse_too_much():
    m = selector(7)
    q, c, mask = pools(7, K=3, pad=1)
    enc = m.encode(q, c, mask)
    for f in (
        lambda: m.greedy(enc, 2),
        lambda: m.sample(enc, 2, 1),
        lambda: m.sample(enc, 2, 1, distinct=False),
    ):
        with pytest.raises(ValueError, match="row 1 has 2 candidates for S = 2"): f()
    with pytest.raises(ValueError, match="width 4"): m.beam(enc, 1, 4)
    with pytest.raises(ValueError, match="smallest pool has 2"): m.sample(enc, 1, 3)
    check_room(mask, 1)

@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), S=st.integers(1, 3), temp=st.sampled_from([.5, 1., 2.]))
def test_distinct_samples(seed, S, temp):
    m = selector(seed)
    q, c, mask = pools(seed, K=5, pad=1)
    enc = m.encode(q, c, mask)
    n = math.perm(4, S)
    g = torch.Generator().manual_seed(seed)
    seqs, lp = m.sample(enc, S, n, temp, generator=g)
    assert all(len(set(map(tuple, s.tolist()))) == n for s in seqs)
    check_seqs(seqs, None, mask)
    assert lp.isfinite().all()
    if temp == 1: close(m.logp(enc, seqs), lp, 1e-4)
    again, _ = m.sample(enc, S, n, temp, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(seqs, again)
    close(lp[1:].exp().sum(-1), torch.ones(2), 1e-4) # a padded pool was drawn empty

@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("temp", [1., 2.])
def test_first_draw_has_the_policys_frequencies(distinct, temp):
    m = selector(8, prior_scale=2., temp=1.)
    q, c, mask = pools(8, B=2, K=4, pad=1)
    n = 6000
    q, c, mask = (x[1:].expand(n, *x.shape[1:]) for x in (q, c, mask))
    enc = m.encode(q, c, mask)
    seqs, lp = m.sample(enc, 2, 3 if distinct else 1, temp, distinct, torch.Generator().manual_seed(0))
    small = m.encode(q[:1], c[:1], mask[:1])
    all_seqs = every(3, 2)
    st0 = m.start(small)
    p = {}
    for s in all_seqs.tolist():
        st1 = m.take(small, st0, torch.tensor([[s[0]]]))
        p[tuple(s)] = (
            (
                m.point(small, st0, 0, temp)[0, 0, s[0]]
                + m.point(small, st1, 1, temp)[0, 0, s[1]]
            )
            .exp()
            .item()
        )
    assert abs(sum(p.values()) - 1) < 1e-5
    drawn = [tuple(s) for s in seqs[:, 0].tolist()]
    for s, want in p.items():
        assert abs(drawn.count(s)/n - want) < 4*math.sqrt(want*(1-want)/n) + 1e-3, (s, want)
    close(lp[:, 0].exp(), torch.tensor([p[s] for s in drawn]))
    if distinct:   # second draws follow the policy renormalised without the first (Plackett-Luce)
        second = [tuple(s) for s in seqs[:, 1].tolist()]
        for s in p:
            want = sum(p[f] * p[s]/(1-p[f]) for f in p if f != s)
            assert abs(second.count(s)/n - want) < 4*math.sqrt(want*(1-want)/n) + 1e-3

def test_gumbel_given_max_has_that_maximum():
    phi = torch.tensor([[0.1, -torch.inf, -3.0, 0.4]], dtype=torch.float64)
    top = torch.tensor([0.7], dtype=torch.float64)
    g = gumbel_given_max(phi, top, torch.randn(1, 4, dtype=torch.float64))
    close(g.amax(-1), top)
    assert g[0, 1] == -torch.inf and not g.isnan().any()

# --- gradients ------------------------------------------------------------------------------------

@states
def test_gradients_are_finite_with_padding_everywhere(state):
    m = selector(9, state).train()
    q, c, mask = pools(9, K=5, pad=2)
    seqs, seq_mask = groups(mask, 6, 3)
    c = c.masked_fill(~mask[..., None], 0.)
    lp = m(q, c, mask, seqs, seq_mask)
    assert lp.isfinite().all()
    lp.sum().backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())
    m.zero_grad()
    m.enumerate(m.encode(q, c, mask), 2)[1].exp().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())

@states
@pytest.mark.parametrize("prior", [True, False])
def test_every_parameter_learns(state, prior):
    m = selector(10, state, prior, stir=False, n_layers=2, max_shots=2).train()
    q, c, mask = pools(10, B=8, K=6)
    start = frozen(m)
    opt = torch.optim.Adam(m.parameters(), 1e-2)
    seqs, seq_mask = groups(mask, 4, 2)
    for step in range(3):
        opt.zero_grad()
        m(q, c, mask, seqs, seq_mask).mean().neg().backward()
        live = {n for n, p in m.named_parameters() if p.grad.abs().sum() > 0}
        if step == 0 and prior: assert live == {"gains"}   # ReZero: the gain first, then everything
        opt.step()
    assert live == {n for n, _ in m.named_parameters()}
    for (n, a), b in zip(m.named_parameters(), start.parameters()): assert (a - b).abs().max() > 1e-4, n

def test_learns_a_rule_that_similarity_gets_wrong():
    m = PointerSelector(D, 16, dropout=0.0)
    torch.manual_seed(0)
    opt = torch.optim.Adam(m.parameters(), 1e-2)
    batch = lambda B=64: (torch.randn(B, D), torch.randn(B, 6, D))
    # similar to the *reversed* query
    target = (
        lambda q, c: (torch.nn.functional.normalize(c, dim=-1) * q.flip(-1)[:, None]).sum(-1).topk(2).indices
    )
    q0, c0 = batch(256)
    hit = lambda: (m.eval().greedy(m.encode(q0, c0), 2) == target(q0, c0)).float().mean().item()
    before = hit()
    for _ in range(250):
        q, c = batch()
        opt.zero_grad()
        m.train()(q, c, None, target(q, c)[:, None]).mean().neg().backward()
        opt.step()
    assert before < .35 and hit() > .7

# --- parts by argument ----------------------------------------------------------------------------

BLOCKS = [
    dict(state="scalar"),
    dict(state="gru"),
    dict(scorer="additive"),
    dict(scorer="bilinear"),
    dict(scorer="heads"),
    dict(scorer="and"),
    dict(cand_layers=2),
    dict(match="heads", n_match=3),
    dict(match="and", n_match=2),
    dict(prior="match", match="heads", n_match=1),
    dict(diversity="mmr"),
    dict(diversity="coverage"),
    dict(diversity="dpp"),
    dict(stop=True),
    dict(match="net", n_match=3),
    dict(state="none", match="net", n_match=2, diversity="dpp", stop=True, max_shots=3),
    dict(
        state="gru",
        scorer="and",
        cand_layers=1,
        match="heads",
        n_match=2,
        diversity="coverage",
        stop=True,
        max_shots=3,
    ),
]
blocks = pytest.mark.parametrize("kw", BLOCKS, ids=lambda kw: ",".join(f"{k}={v}" for k, v in kw.items()))

@blocks
@pytest.mark.parametrize("prior", [True, False])
def test_blocks_make_one_policy(kw, prior):
    m = selector(13, **{"prior": prior, **kw})
    q, c, mask = pools(13, K=5)
    stop = None if m.stop else 2
    enc = m.encode(q, c, mask)
    seqs, lp, *real = m.enumerate(enc, stop)
    real = real[0] if real else None
    close(lp.exp().sum(-1), torch.ones(3))
    ok = lp.isfinite()
    close(m.logp(enc, seqs, real)[ok], lp[ok])
    close(m.encode(7 * q, 0.1 * c, mask).sim, enc.sim)
    # wide enough to lose nothing
    _, lp_top, *_ = m.beam(enc, stop, lp.shape[1])
    close(lp_top, lp.sort(-1, descending=True).values)
    for distinct in (True, False):
        drawn, lp_drawn, *mk = m.sample(
            enc, stop, 6, distinct=distinct, generator=torch.Generator().manual_seed(0)
        )
        close(m.logp(enc, drawn, *mk), lp_drawn, 1e-4)
    # other names for the candidates
    perm = torch.tensor([3, 0, 4, 1, 2])
    back = perm.argsort()
    moved = m.encode(q, c[:, perm], mask[:, perm])
    close(m.logp(moved, back[seqs] if real is None else back[seqs].masked_fill(~real, 0), real)[ok], lp[ok])
    wide = m.encode(
        q,
        torch.cat([c, torch.full((3, 2, D), 7.0)], 1),
        torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], 1),
    )
    close(m.logp(wide, seqs, real)[ok], lp[ok])
    alone = torch.cat(
        [
            m.logp(
                m.encode(q[b : b + 1], c[b : b + 1, :k], mask[b : b + 1, :k]),
                seqs[b : b + 1] % k,
                None if real is None else real[b : b + 1],
            )
            for b, k in enumerate(mask.sum(-1).tolist())
        ]
    )
    close(alone[ok], lp[ok])

@blocks
def test_blocks_start_as_retrieval_and_every_parameter_learns(kw):
    kw = {"max_shots": 2, **kw}
    m = selector(10, stir=False, **{"state": "gate", **kw})
    q, c, mask = pools(10, B=8, K=6)
    if not m.stop:
        close(
            m(q, c, mask, every(5, 2).expand(8, -1, -1)),
            selector(10, "none", stir=False)(q, c, mask, every(5, 2).expand(8, -1, -1)),
        )
    start = frozen(m)
    opt = torch.optim.Adam(m.train().parameters(), 1e-2)
    seqs, seq_mask = groups(mask, 5, m.max_shots)
    seq_mask[:, 1, 1:] = False
    for step in range(4):
        opt.zero_grad()
        m(q, c, mask, seqs, seq_mask).mean().neg().backward()
        live = {n for n, p in m.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        # only gains, then everything
        if step == 0 and m.prior is True:
            assert live <= {
                "gains",
                "match_gain",
                "diversity.weight",
                "stop.weight",
                "stop.worth",
                "stop.bias",
                "match.out.weight",
            }, live
        opt.step()
    assert live == {n for n, _ in m.named_parameters()}
    for (n, a), b in zip(m.named_parameters(), start.parameters()): assert (a - b).abs().max() > 1e-4, n

@blocks
def test_blocks_through_a_checkpoint(kw, tmp_path):
    m = selector(14, **{"state": "gate", **kw})
    q, c, mask = pools(14)
    m.save_pretrained(tmp_path)
    back = PointerSelector.from_pretrained(tmp_path)
    assert back.config == m.config and torch.equal(
        back(q, c, mask, every(4, 2).expand(3, -1, -1)), m(q, c, mask, every(4, 2).expand(3, -1, -1))
    )
    # each once
    names = sorted(n for ns in m.groups().values() for n in ns)
    assert names == sorted(n for n, _ in m.named_parameters())

@blocks
def test_one_pool_shared_pools_and_coarse_to_fine_give_the_same(kw):
    m = selector(15, **{"state": "gate", **kw})
    torch.manual_seed(15)
    q = torch.randn(4, D)
    vecs = torch.randn(9, D)
    S = None if m.stop else 2
    index = torch.stack([torch.randperm(9)[:6] for _ in range(4)])
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[0, 4:] = False
    plain = m.encode(q, vecs[index], mask)
    def same(a, b):
        for x, y in zip(m.beam(a, S, 6), m.beam(b, S, 6)): close(x, y, 1e-4)
        seqs = every(4, 2).expand(4, -1, -1)
        close(m.logp(a, seqs), m.logp(b, seqs), 1e-4)
        close(m.step_logp(a, seqs[..., :1]).exp(), m.step_logp(b, seqs[..., :1]).exp(), 1e-4)
    same(plain, m.encode(q, Shared(vecs, index), mask))
    same(plain, m.encode(q, vecs[index], mask, top_m=6))
    same(plain, m.encode(q, Shared(vecs, index), mask, top_m=6))
    m.fold = True
    same(plain, m.encode(q, vecs[index], mask))
    m.fold = False
    # all alike, and each without one
    for own in (torch.ones(4, 9, dtype=torch.bool), torch.arange(9) != torch.arange(4)[:, None]):
        one = m.encode(q, vecs, own)
        same(one, m.encode(q, vecs.expand(4, -1, -1), own))
        assert len(one.cands) == 1 or kw.get("cand_layers")
        a, b = (m.encode(q, x, own, top_m=5) for x in (vecs, vecs.expand(4, -1, -1)))
        best = (
            torch.nn.functional.cosine_similarity(q[:, None], vecs, dim=-1)
            .masked_fill(~own, -9.0)
            .topk(5)
            .indices
        )
        for x, y in zip(m.beam(a, S, 6), m.beam(b, S, 6)): close(x, y, 1e-4)
        seqs, lp, *real = m.beam(a, S, 6)
        close(m.logp(a, seqs, *real), lp, 1e-4)
        real = real[0] if real else torch.ones_like(seqs, dtype=torch.bool)
        assert ((seqs[..., None] == best[:, None, None]).any(-1) | ~real).all()
        two = m.step_logp(a, torch.zeros(4, 1, 0, dtype=torch.long))[:, 0, :9].isfinite()
        assert torch.equal(two.nonzero()[:, 1].view(4, 5), best.sort(-1).values)

@blocks
def test_shared_beginnings_change_nothing(kw):
    m = selector(17, **{"state": "gate", **kw})
    q, c, mask = pools(17, pad=0)
    seqs = every(c.shape[1], 2).expand(3, -1, -1)
    enc = m.encode(q, c, mask)
    assert begin_alike(enc, seqs)
    one = m.step_logps(enc, seqs)
    few = m.step_logps(enc, torch.cat([seqs, seqs.flip(0)[:, :1].flip(-1)], 1))
    mixed = seqs.clone()
    mixed[0] = mixed[0].flip(0)
    assert not begin_alike(enc, mixed)
    plain = m.step_logps(enc, mixed)
    close(one[1:].exp(), plain[1:].exp())
    close(one[0].exp(), plain[0].flip(0).exp())
    close(few[:, :-1].exp(), one.exp())

def test_gradients_agree_between_the_forms():
    torch.manual_seed(0)
    vecs, q, index = (
        torch.randn(30, D),
        torch.randn(4, D),
        torch.stack([torch.randperm(30)[:9] for _ in range(4)]),
    )
    seqs = every(4, 2).expand(4, -1, -1)
    grads = []
    for fold, pool in ((False, vecs[index]), (True, vecs[index]), (False, Shared(vecs, index))):
        m = selector(16)
        m.fold = fold
        m(q, pool, None, seqs).square().mean().backward()
        grads.append([p.grad for p in m.parameters()])
    for g in grads[1:]:
        for a, b in zip(g, grads[0]): close(a, b, 1e-3)

def test_a_stored_sequence_from_outside_is_refused():
    m = selector(17)
    q, c, mask = pools(17)
    enc = m.encode(q, c, mask, top_m=2)
    out = enc.sim.new_tensor(0)
    full = m.encode(q, c, mask)
    worst = full.sim.masked_fill(~mask, 9.0).argmin(-1)
    with pytest.raises(
        ValueError, match=f"query 0, sequence 0: candidate {int(worst[0])} is not among the 2 most similar"
    ):
        m.logp(enc, worst[:, None, None])

# --- STOP -----------------------------------------------------------------------------------------

@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), pad=st.integers(0, 2), least=st.integers(0, 2))
def test_stop_sequences_of_all_lengths_sum_to_one(seed, pad, least):
    m = selector(seed, stop=True, min_shots=least, max_shots=3)
    q, c, mask = pools(seed, K=4, pad=pad)
    if pad == 2 and least == 2: mask[1:, 2] = True   # a pool of two leaves no choice of two
    enc = m.encode(q, c, mask)
    seqs, lp, real = m.enumerate(enc, None)
    assert seqs.shape[1] == sum(math.perm(4, n) for n in range(least, 4))
    close(lp.exp().sum(-1), torch.ones(3))
    assert (real.sum(-1) >= least).all() and (seqs[~real] == 0).all()
    assert (real.sum(-1) == 0).sum() == 3 * (least == 0)
    # barred from stopping
    seqs2, lp2 = m.enumerate(enc, 2)
    close(lp2.exp().sum(-1), torch.ones(3))
    close(m.logp(enc, seqs2, stop=False), lp2)
    by_hand = []
    for s, n in zip(seqs[0].tolist(), real[0].sum(-1).tolist()):
        steps = [
            m.step_logp(enc, torch.tensor(s[:t]).view(1, 1, t).expand(3, -1, -1))[0, 0]
            for t in range(min(n + 1, 3))
        ]
        if n < least: continue
        by_hand.append(sum(steps[t][s[t]] for t in range(n)) + (steps[n][4] if n < 3 else 0.))
    close(torch.stack(by_hand), lp[0])
    close(m.logp(enc, seqs[:1].expand(3, -1, -1), real[:1].expand(3, -1, -1))[0], lp[0])
    # a row without a pick: STOP at once, or padding where that is not possible
    row = torch.zeros(3, 1, 2, dtype=torch.long)
    lp_row = m.logp(enc, row, row.bool())
    close(lp_row, m.logp(enc, row[..., :0]))
    first = m.step_logp(enc, row[..., :0])[..., -1]
    close(lp_row, first if least == 0 else torch.zeros(3, 1))
    assert least == 0 or (first == -torch.inf).all()

@pytest.mark.parametrize("K", [1, 2, 3])
def test_a_pool_that_is_used_up_needs_no_stop(K):
    m = selector(31, stop=True, max_shots=3)
    q, c, mask = pools(31, K=4, pad=0)
    mask[:, K:] = False
    seqs, lp, real = m.enumerate(m.encode(q, c, mask), None)
    possible = lp.isfinite()
    assert possible.sum() == 3 * sum(math.perm(K, n) for n in range(min(K, 3) + 1))
    close(lp.exp().sum(-1), torch.ones(3))
    few = m.encode(q, c[:, :K], mask[:, :K])
    close(m.logp(few, seqs % K, real)[possible], lp[possible])
    picks, shown = m.greedy(few, None)
    assert (shown.sum(-1) <= K).all() and (picks < K).all()

def test_untrained_every_count_is_equally_likely():
    q, c, mask = pools(32, K=6)
    some = dict(max_shots=4, min_shots=1)
    for kw in (dict(max_shots=3), dict(max_shots=1), some, dict(max_shots=2, prior=False)):
        m = selector(32, stir=False, stop=True, **kw)
        _, lp, real = m.enumerate(m.encode(q, c, mask), None)
        counts = range(m.min_shots, m.max_shots + 1)
        share = [lp.masked_fill(real.sum(-1) != n, -torch.inf).logsumexp(-1).exp() for n in counts]
        close(torch.stack(share), torch.full((len(counts), 3), 1 / len(counts)))
        picks = m.greedy(m.encode(q, c, mask), None)[0]
        assert torch.equal(picks, m.greedy(m.encode(q, c, mask), m.max_shots))   # retrieval, as without STOP

def test_stop_sees_the_query_and_how_good_a_pick_would_be():
    m = selector(33, stir=False, stop=True, max_shots=2)
    q, c, mask = pools(33, K=5)
    def ends(c):
        enc = m.encode(q, c, mask)
        return m.step_logp(enc, torch.zeros(3, 1, 0, dtype=torch.long))[:, 0, -1]
    close(ends(c), torch.full((3,), math.log(1 / 3)))
    with torch.no_grad(): m.stop.worth.copy_(torch.tensor([-1., 0.]))
    better = c.clone()
    better[:, 0] = q   # a candidate that is the query itself
    assert (ends(better) < ends(c) - .1).all()
    padded = c.clone()
    padded[1:, 4] = q[1:]   # padding may hold anything
    close(ends(padded), ends(c))
    with torch.no_grad(): m.stop.weight.normal_()
    assert ends(c).std() > .1
    g = torch.autograd.grad(ends(c).sum(), [m.stop.weight, m.stop.worth, m.stop.bias])
    assert all(x.isfinite().all() and x.abs().sum() > 0 for x in g)

def test_stop_samples_have_the_policys_lengths():
    m = selector(18, stop=True, max_shots=3, prior_scale=2., temp=1.)
    q, c, mask = pools(18, B=1, K=4, pad=0)
    with torch.no_grad():
        m.stop.bias.zero_()
        m.stop.weight.zero_()
        m.stop.worth.zero_()
    n = 4000
    enc = m.encode(q.expand(n, -1), c.expand(n, -1, -1))
    g = torch.Generator().manual_seed(0)
    for distinct in (True, False):
        real = m.sample(enc, None, 3 if distinct else 1, 1., distinct, g)[2][:, 0].sum(-1)
        close(torch.bincount(real, minlength=4) / n, torch.tensor([.5, .25, .125, .125]), .04)
    few = enc.rows(slice(0, 2))
    for shots in range(4):   # where STOP is likely, greedy ends: also before the first pick
        with torch.no_grad(): m.stop.bias[:] = torch.where(torch.arange(3) < shots, -3., 3.)
        seqs, real = m.greedy(few, None)
        assert real.sum(-1).tolist() == [shots, shots]
        assert torch.equal(seqs[:, :shots], m.greedy(few, shots))
    with torch.no_grad(): m.stop.bias[:] = 3.
    g = torch.Generator().manual_seed(0)
    for seqs, lp, real in (m.beam(few, None, 1), m.sample(few, None, 1, generator=g)):
        assert not real.any()
        close(lp, m.logp(few, seqs, real))
    plain = selector(18)
    for f in (
        lambda: plain.greedy(plain.encode(q, c), None),
        lambda: plain.beam(plain.encode(q, c), None, 1),
        lambda: plain.logp(plain.encode(q, c), torch.zeros(1, 1, 1, dtype=torch.long), stop=True),
    ):
        with pytest.raises(ValueError, match="never stops by itself"): f()

def test_exact_kl_and_entropy_count_stop():
    a = selector(19, stop=True, max_shots=3)
    b = selector(20, stop=True, max_shots=3)
    q, c, mask = pools(19, K=4)
    ea = a.encode(q, c, mask)
    eb = b.encode(q, c, mask)
    seqs, la, real = a.enumerate(ea, None)
    lb = b.logp(eb, seqs, real)
    ok = la.isfinite()
    want = (la.exp() * (la.masked_fill(~ok, 0.) - lb.masked_fill(~ok, 0.))).sum(-1)
    close(kl_exact(lambda p: a.step_logp(ea, p), lambda p: b.step_logp(eb, p), mask, 3), want, 1e-4)
    close(
        entropy_steps(lambda p: a.step_logp(ea, p), mask, 3).sum(-1),
        -(la.exp() * la.masked_fill(~ok, 0.0)).sum(-1),
        1e-4,
    )

# --- sets -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("stop", [False, True])
def test_logp_set_is_the_sum_over_orders(stop):
    m = selector(21, stop=stop)
    q, c, mask = pools(21, K=6)
    seqs, real = groups(mask, 5, 4, 21)
    got = m.logp_set(m.encode(q, c, mask), seqs, real)
    for b, n in itertools.product(range(3), range(5)):
        k = int(real[b, n].sum())
        orders = torch.tensor(list(itertools.permutations(seqs[b, n, :k].tolist())), dtype=torch.long)
        close(
            got[b, n],
            (
                m(q[b : b + 1], c[b : b + 1], mask[b : b + 1], orders[None])[0].logsumexp(-1)
                if k
                else m(q[b : b + 1], c[b : b + 1], mask[b : b + 1], orders.view(1, 1, 0))[0, 0]
            ),
        )
    # any order
    close(m.logp_set(m.encode(q, c, mask), seqs.flip(-1)[:, :1], real.flip(-1)[:, :1]), got[:, :1])
    got.sum().backward()
    assert all(p.grad.isfinite().all() for p in m.parameters()) and m.gains.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="at most 4"):
        m.logp_set(m.encode(q, c, mask), torch.zeros(3, 1, 5, dtype=torch.long))

# --- checks and errors ----------------------------------------------------------------------------

@pytest.mark.parametrize(
    "seq, what",
    [
        ([0, 0], "repeated index"),
        ([4, 0], "padded candidate"),
        ([5, 0], "outside 0..4"),
        ([-1, 0], "outside 0..4"),
    ],
)
def test_check_seqs_names_what_is_wrong(seq, what):
    _, _, mask = pools()
    seqs = torch.tensor([[[0, 1], [2, 3]]] * 3)
    assert check_seqs(seqs, None, mask) is seqs
    seqs = seqs.clone()
    seqs[2, 1] = torch.tensor(seq)
    with pytest.raises(ValueError, match=f"query 77, sequence 1 .*{what}"):
        check_seqs(seqs, None, mask, names=[5, 6, 77])
    real = torch.ones_like(seqs, dtype=torch.bool)
    real[2, 1] = False
    check_seqs(seqs, real, mask)                                     # padding may hold anything
    real[2, 1, 1] = True
    with pytest.raises(ValueError, match="after a padded one"): check_seqs(seqs, real, mask)

def test_impossible_sequences_have_probability_zero_not_nan():
    m = selector(11)
    q, c, mask = pools(11)
    bad = torch.tensor([[[0, 0], [1, 2]]]*3)
    lp = m(q, c, mask, bad)
    assert (lp[:, 0] == -torch.inf).all() and lp[:, 1].isfinite().all()

def test_shapes_are_refused_with_a_sentence():
    m = selector()
    q, c, mask = pools()
    for f, what in (
        (lambda: m.encode(q[:, :4], c), "D = 6"),
        (lambda: m.encode(q, c[0, 0]), r"\[B,K,D\]"),
        (lambda: m.encode(q, c, mask.float()), "bool"),
        (lambda: m.encode(q, c, torch.zeros_like(mask)), "row 0"),
        (lambda: PointerSelector(4, state="lstm"), "'gru'"),
        (lambda: PointerSelector(4, temp=0.0), "temp"),
        (lambda: PointerSelector(4, scorer="dot"), "'bilinear'"),
        (lambda: PointerSelector(4, diversity="x"), "'coverage'"),
        (lambda: PointerSelector(4, match="x"), "'heads'"),
        (lambda: PointerSelector(4, prior="match"), "wanted match='heads'"),
        (lambda: PointerSelector(4, max_shots=0), "max_shots 0"),
        (lambda: PointerSelector(4, stop=True, min_shots=4), "min_shots < max_shots"),
        (lambda: PointerSelector(4, stop=True, min_shots=-1), "min_shots -1: wanted a whole number >= 0"),
        (lambda: PointerSelector(4, min_shots=1), "without stop=True"),
        (lambda: m.encode(q, c, mask, top_m=0), "top_m 0"),
        (lambda: m.encode(q, Shared(c[0], torch.tensor([[0, 5]] * 3))), r"index 0\.\.5 into 5 vecs"),
    ):
        with pytest.raises(ValueError, match=what): f()

# --- checkpoints ----------------------------------------------------------------------------------

@pytest.fixture
def ckpt(tmp_path):
    m = selector(12, "gate", max_shots=3)
    d = tmp_path / "ckpt"
    m.save_pretrained(d, info=dict(pool=dict(sampler="random", K=16), data="abc", metrics=dict(regret=.1)))
    return m, d

def test_roundtrip(ckpt):
    m, d = ckpt
    q, c, mask = pools()
    seqs = every(4, 2).expand(3, -1, -1)
    back = PointerSelector.from_pretrained(d)
    assert torch.equal(back(q, c, mask, seqs), m(q, c, mask, seqs)) and not back.training
    assert back.config == m.config and back.info["pool"]["K"] == 16
    assert json.loads((d/"config.json").read_text())["class"] == "PointerSelector"
    # info survives a second save
    back.save_pretrained(d)
    assert PointerSelector.from_pretrained(d).info == back.info
    copy = frozen(m)
    close(copy(q, c, mask, seqs), m(q, c, mask, seqs))

def edit_config(d, **kw):
    c = json.loads((d / "config.json").read_text())
    c.update(kw)
    (d / "config.json").write_text(json.dumps({k: v for k, v in c.items() if v != "DROP"}))

def test_strict_weights(ckpt):
    m, d = ckpt
    w = load_file(d / "model.safetensors")
    save_file({k.replace("query_proj", "q_proj"): v for k, v in w.items()}, d/"model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"missing: query_proj.bias, query_proj.weight; unexpected: q_proj.bias, q_proj.weight",
    ):
        PointerSelector.from_pretrained(d)
    save_file({k: v for k, v in w.items() if k != "gains"}, d/"model.safetensors")
    with pytest.raises(ValueError, match="missing: gains"): PointerSelector.from_pretrained(d)
    save_file({**w, "step_emb": torch.zeros(9, H)}, d/"model.safetensors")
    with pytest.raises(ValueError, match=r"misshaped: step_emb \[9, 10\] for \[3, 10\]"):
        PointerSelector.from_pretrained(d)
    save_file(w, d / "model.safetensors")
    edit_config(d, n_layers=2)
    with pytest.raises(ValueError, match="missing: layers.1.attn"): PointerSelector.from_pretrained(d)

def test_strict_config(ckpt):
    _, d = ckpt
    edit_config(d, surprise=1)
    with pytest.raises(ValueError, match="unknown: surprise"): PointerSelector.from_pretrained(d)
    edit_config(d, surprise="DROP", state="DROP")
    with pytest.raises(ValueError, match="missing: state"): PointerSelector.from_pretrained(d)
    edit_config(d, state="gate", **{"class": "PointerSelectorV3"})
    with pytest.raises(ValueError, match="checkpoint of 'PointerSelectorV3'"):
        PointerSelector.from_pretrained(d)
    edit_config(d, temperature=.2, **{"class": "PointerSelector"})   # both words for one setting
    with pytest.raises(ValueError, match="unknown: temperature"): PointerSelector.from_pretrained(d)
    (d/"config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"): PointerSelector.from_pretrained(d)

UNSTAMPED = dict.fromkeys(STAMP, "DROP") # as checkpoints were before they had a stamp

def test_a_checkpoint_that_says_temperature_loads(ckpt):
    m, d = ckpt
    edit_config(d, temp="DROP", temperature=.3, **UNSTAMPED)
    back = PointerSelector.from_pretrained(d)
    assert back.pointer_temp == back.config["temp"] == .3 and "temperature" not in back.config
    assert PointerSelector.from_pretrained(d, temp=.5).pointer_temp == .5
    back.save_pretrained(d)
    assert json.loads((d/"config.json").read_text())["temp"] == .3

def test_a_checkpoint_from_before_the_empty_sequence(ckpt):
    m, d = ckpt
    edit_config(d, min_shots="DROP", **UNSTAMPED)
    assert PointerSelector.from_pretrained(d).config == m.config   # without STOP it means the same
    edit_config(d, stop=True)   # STOP was another one
    with pytest.raises(ValueError, match="config.json: a selector with stop=True from before.*train it again"):
        PointerSelector.from_pretrained(d)

def test_incomplete_and_odd(ckpt):
    m, d = ckpt
    with pytest.raises(TypeError, match="colour"): PointerSelector.from_pretrained(d, colour="red")
    with pytest.raises(TypeError): m.save_pretrained(d, info=dict(x=torch.ones(1)))
    PointerSelector.from_pretrained(d) # a refused save left the checkpoint whole
    (d/"model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"): PointerSelector.from_pretrained(d)

def test_imports_without_fastai():
    code = (
        "import sys; sys.modules['fastai'] = sys.modules['fastcore'] = None; import leverplus.selector;"
        " assert not any(m.startswith('transformers') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
