"Objectives as pure functions: values by hand, gradients by finite differences, and what must change nothing"
import math
from itertools import permutations
import numpy as np, pytest, torch
from hypothesis import example, given, settings, strategies as st
from leverplus.core import masked_log_softmax
from leverplus.losses import *
from leverplus.synth import ToySelector, SynthGroups, pad_groups

LEVELS = torch.tensor([0., .3, .6, 1.], dtype=torch.float64)

def groups(seed, B=4, N=6, flat=True):
    "Ragged random groups in float64: one flat, one of a single sequence, one empty"
    g = torch.Generator().manual_seed(seed)
    logp = -5*torch.rand(B, N, generator=g, dtype=torch.float64) - .1
    rewards = LEVELS[torch.randint(4, (B, N), generator=g)]
    mask = torch.rand(B, N, generator=g) < 0.8
    mask[0, :3] = True
    rewards[0, 0], rewards[0, 1] = 0.0, 1.0
    if flat: rewards[1], mask[2], mask[3] = .6, torch.arange(N) == 2, False
    return logp.masked_fill(~mask, -torch.inf), rewards.masked_fill(~mask, float("nan")), mask

def away(l):
    "A fixed other policy, in the place of whatever is compared with"
    return 1.3 * l.detach().nan_to_num(neginf=0.0) - 0.2

LOSSES = {
    "regret": regret,
    "rce": lambda l, r, m: rce_loss(l, r, m, 0.4),
    "rce_zscore": lambda l, r, m: rce_loss(l, r, m, 0.4, "zscore"),
    "rce_rank": lambda l, r, m: rce_loss(l, r, m, 0.4, weights="rank"),
    "rce_top1": lambda l, r, m: rce_loss(l, r, m, weights="top1"),
    "listwise": lambda l, r, m: listwise_loss(l, r, m, away(l), temp=0.3),
    "listwise_ess": lambda l, r, m: listwise_loss(l, r, m, away(l)),
    "listnet": lambda l, r, m: listwise_loss(l, r, m, ess=0.6),
    "top2": lambda l, r, m: imitation_loss(l, top_weights(r, m, 2), m),
    "pg": lambda l, r, m: policy_gradient(l, advantage(r, m, "loo"), m),
    "k3": lambda l, r, m: kl_k3(l, away(l), m),
}
POLICY = {
    "regret": regret,
    "pg": LOSSES["pg"],
    "listwise_start": lambda l, r, m: listwise_loss(l, r, m, l),
    "rce_live": lambda l, r, m: rce_loss(l, r, m & live_groups(r, m)[:, None], 0.4),
    **{
        f"{baseline}_{sc}": lambda l, r, m, baseline=baseline, sc=sc: clipped_surrogate(
            l, l.detach(), advantage(r, m, baseline, sc), m
        )
        for baseline in SCALES
        for sc in SCALES[baseline]
    },
}

@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_the_finite_difference(name, monkeypatch):
    for seed in range(3):
        logp, rewards, mask = groups(seed)
        i = mask.nonzero(as_tuple=True)
        other = away(logp)
        monkeypatch.setitem(globals(), "away", lambda l: other)   # what is compared with stays where it is
        assert torch.autograd.gradcheck(
            lambda x: LOSSES[name](logp.index_put(i, x), rewards, mask), logp[mask].clone().requires_grad_()
        )
        x = logp.clone().requires_grad_()
        LOSSES[name](x, rewards, mask).backward()
        assert x.grad.isfinite().all() and (x.grad[~mask] == 0).all()
        monkeypatch.undo()

@pytest.mark.parametrize("kw", [{}, dict(dual=None), dict(clip_low=.05, clip_high=.05)])
def test_gradient_of_clipped_surrogate(kw):
    logp, rewards, mask = groups(1)
    old = (
        logp.nan_to_num(neginf=0.0)
        + 0.4 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(0)).double()
    )
    adv = advantage(rewards, mask)
    i = mask.nonzero(as_tuple=True)
    f = lambda x: clipped_surrogate(logp.index_put(i, x), old, adv, mask, **kw)
    assert torch.autograd.gradcheck(f, logp[mask].clone().requires_grad_())

@pytest.mark.parametrize("name", POLICY)
def test_zero_signal_zero_gradient_and_no_nan(name):
    logp, rewards, mask = groups(3)
    x = logp.clone().requires_grad_()
    POLICY[name](x, rewards, mask).backward()
    assert (
        x.grad.isfinite().all()
        and (x.grad[1:].abs() < 1e-15).all()
        and (x.grad[~mask] == 0).all()
        and (x.grad[0] != 0).any()
    )
    x = logp.clone().requires_grad_()
    POLICY[name](x, torch.where(mask, 0.3, rewards), mask).backward()
    assert (x.grad.abs() < 1e-15).all()

@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), pad=st.integers(1, 4), perm=st.permutations(range(6)))
def test_padding_permutation_and_company(seed, pad, perm):
    logp, rewards, mask = groups(seed, flat=False)
    perm = torch.tensor(perm)
    more = lambda t, v: torch.cat([t, torch.full((len(t), pad), v, dtype=t.dtype)], 1)
    for name, f in {
        **LOSSES,
        **POLICY,
        "surrogate": lambda l, r, m: clipped_surrogate(
            l, l.detach().nan_to_num(neginf=0.0) - 0.3, advantage(r, m, "loo"), m
        ),
    }.items():
        v = f(logp, rewards, mask)
        assert torch.isclose(f(more(logp, 0.), more(rewards, 9.), more(mask, False)), v), name
        assert torch.isclose(f(logp[:, perm], rewards[:, perm], mask[:, perm]), v), name
        if "batch" in name: continue   # depends on company by definition
        counts = live_groups(rewards, mask) if name == "rce_live" else mask.any(-1)
        one_by_one = torch.stack(
            [f(logp[b : b + 1], rewards[b : b + 1], mask[b : b + 1]) for b in counts.nonzero()[:, 0].tolist()]
        ).mean()
        assert torch.isclose(one_by_one, v), name

def test_regret_bounds_and_reductions():
    logp, rewards, mask = groups(5)
    each = regret(logp, rewards, mask, reduction="none")
    assert each.shape == (4,) and (each >= 0).all() and each[3] == 0
    assert torch.isclose(regret(logp, rewards, mask), each[:3].mean())
    sure = torch.where(rewards == 1., 0., -50.).masked_fill(~mask, -torch.inf).double()
    assert regret(sure, rewards, mask, reduction="none")[0] < 1e-12
    with pytest.raises(ValueError, match="reduction"): regret(logp, rewards, mask, reduction="sum")

@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), baseline=st.sampled_from(list(SCALES)))
def test_advantages(seed, baseline):
    _, r, m = groups(seed)
    a = advantage(r, m, baseline)
    assert (
        (a[~m] == 0).all()
        and (a[1:] == 0).all()
        and torch.allclose(a.sum(-1), torch.zeros(4).double(), atol=1e-9)
    )
    i, j = m[0].nonzero()[:, 0].tolist()[:2]
    assert (a[0, i] - a[0, j]).sign() == (r[0, i] - r[0, j]).sign()
    assert torch.allclose(a, advantage(r + 5, m, baseline), atol=1e-6)
    if baseline == "rank": assert a.abs().max() <= 1
    assert advantage(r, m, baseline, clip=.2).abs().max() <= .2

def test_advantage_by_hand():
    r = torch.tensor([[1., 0, 0, 0, 7]])
    m = torch.tensor([[True]*4 + [False]])
    assert torch.allclose(advantage(r, m, "center"), torch.tensor([[.75, -.25, -.25, -.25, 0]]))
    assert torch.allclose(advantage(r, m, "loo"), torch.tensor([[1., -1/3, -1/3, -1/3, 0]]))
    assert torch.allclose(advantage(r, m, "rank"), torch.tensor([[1., -1/3, -1/3, -1/3, 0]]))
    assert torch.allclose(advantage(r, m), torch.tensor([[1.5, -.5, -.5, -.5, 0]]))
    small = torch.tensor([[.01, 0, 0, 0, 0]])
    assert torch.allclose(advantage(small, m), advantage(small, m, "center") / .1)
    assert torch.allclose(
        advantage(r, m, "center", "batch", min_std=0.0), advantage(r, m, "center") / (3 / 16) ** 0.5
    )
    # the reports' top-3
    assert math.isclose(
        advantage(torch.tensor([[1.0, 0, 0]]), torch.ones(1, 3).bool(), min_std=0.0).max(),
        1.1547,
        rel_tol=1e-4,
    )
    for baseline, scale in (("zscore", "none"), ("rank", "group"), ("zscore", "batch")):
        with pytest.raises(ValueError, match="normalised already"): advantage(r, m, baseline, scale)
    with pytest.raises(ValueError, match="zscore, center, loo, rank"): advantage(r, m, "z")

def test_ratio_one_is_policy_gradient():
    logp, rewards, mask = groups(7)
    adv = advantage(rewards, mask)
    x = logp.clone().requires_grad_()
    y = logp.clone().requires_grad_()
    clipped_surrogate(x, logp, adv, mask).backward()
    (-group_mean(adv * y.masked_fill(~mask, 0), mask)).backward()
    assert torch.allclose(x.grad, y.grad)

def test_clip_and_dual_clip():
    m = torch.ones(1, 1).bool()
    z = torch.zeros(1, 1)
    f = lambda ratio, A, **kw: float(
        clipped_surrogate(torch.tensor([[math.log(ratio)]]), z, torch.tensor([[A]]), m, **kw)
    )
    assert f(2., 1.) == pytest.approx(-1.28) and f(.5, 1.) == pytest.approx(-.5)
    assert (
        f(0.5, -1.0) == pytest.approx(0.8)
        and f(10.0, -1.0) == pytest.approx(3.0)
        and f(10.0, -1.0, dual=None) == pytest.approx(10.0)
    )
    assert (
        math.isfinite(f(1e8, 1.0))
        and clipped_surrogate(torch.tensor([[500.0]]), z, torch.tensor([[-1.0]]), m).isfinite()
    )
    with pytest.raises(ValueError, match="dual"): f(1., 1., dual=.5)
    lp = torch.tensor([[2., 1., .5, .5]]).log()
    adv = torch.tensor([[1., 1., -1., 1.]])
    assert [
        float(s) for s in clip_shares(lp, torch.zeros(1, 4), adv, torch.ones(1, 4).bool())
    ] == pytest.approx([1 / 3, 1.0])

# --- exact divergence --------------------------------------------------------------------------------------
def table_policy(seed, B, K, S, cand_mask, scale=2.):
    "A random policy given by a table of logits for every prefix"
    g = torch.Generator().manual_seed(seed)
    logits = {
        p: scale * torch.randn(B, K, generator=g, dtype=torch.float64)
        for t in range(S)
        for p in permutations(range(K), t)
    }
    def step(prefix):
        out = torch.stack([logits[tuple(p)] for p in prefix[0].tolist()], 1)
        taken = torch.zeros(out.shape, dtype=torch.bool).scatter(2, prefix, True)
        return masked_log_softmax(out, cand_mask[:, None] & ~taken)
    return step, logits

def brute(step_p, step_q, B, K, S):
    "KL and entropy by summing over all sequences"
    kl = h = total = 0.
    for y in permutations(range(K), S):
        lp, lq = (
            sum(
                s(torch.tensor(y[:t], dtype=torch.long).view(1, 1, t).expand(B, 1, t))[:, 0, y[t]]
                for t in range(S)
            )
            for s in (step_p, step_q)
        )
        ok = lp > -torch.inf
        p = lp.exp()
        total = total + p
        kl = kl + (p*(lp - lq)).masked_fill(~ok, 0.)
        h = h - (p*lp).masked_fill(~ok, 0.)
    return kl, h, total

@pytest.mark.parametrize("S, B", [(1, 100), (2, 1000), (3, 300)])
def test_exact_kl_and_entropy_are_brute_force(S, B):
    "1,400 random policies, pools of 3 to 5"
    K = 5
    cm = torch.arange(K) < torch.randint(3, K + 1, (B, 1), generator=torch.Generator().manual_seed(S))
    (p, _), (q, _) = table_policy(S, B, K, S, cm), table_policy(S+100, B, K, S, cm)
    kl, h, total = brute(p, q, B, K, S)
    assert torch.allclose(total, torch.ones(B).double())
    assert torch.allclose(kl_exact(p, q, cm, S), kl, rtol=1e-9) and torch.allclose(
        entropy_exact(p, cm, S), h, rtol=1e-9
    )
    per = kl_steps(p, q, cm, S)
    assert per.shape == (B, S) and (per >= -1e-12).all()
    assert (kl_exact(p, p, cm, S).abs() < 1e-12).all()
    norm = entropy_steps(p, cm, S, normed=True)
    assert ((norm >= 0) & (norm <= 1 + 1e-9)).all()

def test_stop_is_an_option_of_the_entropy():
    K = 4
    mask = torch.tensor([[True]*4, [True]*3 + [False]])
    def step(prefix, odds=1.): # all options alike, but STOP, from the second step on, `odds` times as likely
        B, P, t = prefix.shape
        w = (mask[:, None].expand(-1, P, -1).scatter(-1, prefix, False)).double()
        w = torch.cat([w, torch.full((B, P, 1), odds if t else 0.0, dtype=torch.float64)], -1)
        return (w / w.sum(-1, keepdim=True)).log()
    assert torch.allclose(entropy_steps(step, mask, 3, normed=True), torch.ones(2, 3, dtype=torch.float64))
    assert torch.allclose(
        entropy_steps(step, mask, 3)[0],
        torch.tensor([4.0, 4.0, 3.0], dtype=torch.float64).log()
        * torch.tensor([1.0, 1.0, 0.75], dtype=torch.float64),
    )
    often = entropy_steps(lambda p: step(p, 9.0), mask, 3, normed=True)
    assert torch.allclose(often[:, 0], torch.ones(2, dtype=torch.float64)) and (often[:, 1:] < 0.9).all()
    with pytest.raises(ValueError, match="5 options per step against 4"):
        kl_steps(step, lambda p: step(p)[..., :4], mask, 2)

def may_end(seed, K, mask, T, first=True):
    "A random policy with STOP, from the first step on or from the second"
    g = torch.Generator().manual_seed(seed)
    w = torch.rand(len(mask), (K + 1)**(T + 1), K + 1, generator=g, dtype=torch.float64) + .1
    def step(prefix):
        B, P, t = prefix.shape
        number = (prefix + 1) @ torch.tensor([(K + 1)**i for i in range(t)], dtype=torch.long)
        free = mask[:, None].expand(-1, P, -1).scatter(-1, prefix, False)
        stop = torch.full((B, P, 1), first or t > 0)
        x = w.gather(1, number[..., None].expand(-1, -1, K + 1)) * torch.cat([free, stop], -1)
        return (x / x.sum(-1, keepdim=True)).log()
    return step

@pytest.mark.parametrize("T, first", [(1, True), (2, True), (3, True), (2, False)])
def test_exact_sums_over_all_lengths_are_brute_force(T, first):
    "Sequences of 0 to T picks, pools of 4 and 3: probabilities, KL, entropy and counts, one sequence at a time"
    K = 4
    mask = torch.tensor([[True]*4, [True]*3 + [False]])
    p, q = (may_end(seed, K, mask, T, first) for seed in (0, 1))
    total, kl, h = (torch.zeros(2, dtype=torch.float64) for _ in range(3))
    counts = torch.zeros(2, T + 1, dtype=torch.float64)
    for n in range(T + 1):
        for s in permutations(range(K), n):
            picks = torch.tensor(s, dtype=torch.long).expand(2, 1, n)
            steps = [*s, K][:T]   # STOP behind the last pick, unless there are T
            lps = [sum(f(picks[..., :t])[:, 0, k] for t, k in enumerate(steps)) for f in (p, q)]
            ok = lps[0] > -torch.inf
            lp, lq = (x.masked_fill(~ok, 0.) for x in lps)
            w = lps[0].exp()
            total += w
            kl += w * (lp - lq)
            h -= w * lp
            counts[:, n] += w
    close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    close(total, torch.ones(2, dtype=torch.float64))
    close(kl_exact(p, q, mask, T).double(), kl)
    close(entropy_exact(p, mask, T).double(), h)
    close(shot_chances(p, mask, T).double(), counts)
    assert (counts[:, 0] > 0).all() == first
    drawn = torch.stack([shot_chances(p, mask, T, 3, np.random.default_rng(i)) for i in range(400)])
    off = (drawn.mean(0) - counts).abs()
    assert (off <= 5 * drawn.std(0) / 20 + 1e-6).all() and off.max() < .1
    normed = entropy_steps(p, mask, T, normed=True)
    assert ((normed > 0) & (normed < 1)).all()

def test_a_policy_without_stop_takes_all_its_picks():
    mask = torch.ones(1, 3, dtype=torch.bool)
    def step(prefix):
        free = mask[:, None].expand(-1, prefix.shape[1], -1).scatter(-1, prefix, False)
        return (free / free.sum(-1, keepdim=True)).log()
    assert torch.allclose(shot_chances(step, mask, 2), torch.tensor([[0., 0., 1.]]))

@pytest.mark.parametrize("width", [0, 1, 2])
def test_merge_orders_knows_the_empty_set(width):
    "An empty sequence is one set; padding, which looks the same, is none"
    seqs = torch.zeros(1, 4, width, dtype=torch.long)
    real = torch.zeros(1, 4, width, dtype=torch.bool)
    rewards = torch.tensor([[.2, .6, 1., 7.]])
    mask = torch.tensor([[True, True, True, False]])
    if width == 2:
        seqs[0, 1:3] = torch.tensor([[0, 1], [1, 0]])
        real[0, 1:3] = True
    merged, kept = merge_orders(seqs, real, rewards, mask)
    if width == 2:
        assert kept.tolist() == [[True, True, False, False]]
        assert merged[0, :2].tolist() == pytest.approx([.2, .8])
    else:
        assert kept.tolist() == [[True, False, False, False]]
        assert merged[0, 0].item() == pytest.approx(.6)

def test_uniform_policy_has_all_the_entropy():
    cm = torch.ones(2, 6, dtype=torch.bool)
    cm[1, 4:] = False
    flat, _ = table_policy(0, 2, 6, 2, cm, scale=0.0)
    assert torch.allclose(entropy_exact(flat, cm, 2), torch.tensor([30., 12.]).double().log())
    assert torch.allclose(entropy_steps(flat, cm, 2, normed=True), torch.ones(2, 2).double())

def test_gradient_of_exact_kl():
    B = 1
    K = 4
    S = 3
    cm = torch.ones(B, K, dtype=torch.bool)
    cm[0, 3] = False
    cm4 = torch.ones(B, K, dtype=torch.bool)
    for mask in (cm, cm4):
        _, logits = table_policy(0, B, K, S, mask)
        q, _ = table_policy(9, B, K, S, mask)
        keys = list(logits)
        def f(*ls):
            tab = dict(zip(keys, ls))
            def step(prefix):
                out = torch.stack([tab[tuple(p)] for p in prefix[0].tolist()], 1)
                return masked_log_softmax(
                    out, mask[:, None] & ~torch.zeros(out.shape, dtype=torch.bool).scatter(2, prefix, True)
                )
            return kl_exact(step, q, mask, S).sum(), entropy_exact(step, mask, S).sum()
        assert torch.autograd.gradcheck(f, tuple(logits[k].clone().requires_grad_() for k in keys))

def test_drawn_prefixes_are_unbiased_for_values_and_gradients():
    "Two of up to twelve prefixes, often: KL, entropy and gradients, within five standard errors of the exact ones"
    B = 2
    K = 4
    S = 3
    n = 1500
    mask = torch.ones(B, K, dtype=torch.bool)
    mask[1, 3] = False
    _, logits = table_policy(0, B, K, S, mask, 1.0)
    q, _ = table_policy(9, B, K, S, mask)
    for v in logits.values(): v.requires_grad_()
    def step(prefix): # each query has prefixes of its own
        out = torch.stack(
            [torch.stack([logits[tuple(p)][b] for p in ps]) for b, ps in enumerate(prefix.tolist())]
        )
        return masked_log_softmax(
            out, mask[:, None] & ~torch.zeros(out.shape, dtype=torch.bool).scatter(2, prefix, True)
        )
    def ref(prefix):
        return torch.cat(
            [
                torch.cat([q(p.expand(B, 1, -1))[b : b + 1] for p in ps[:, None]], 1)
                for b, ps in enumerate(prefix)
            ]
        )
    def look(limit, draw=None):
        out = []
        for f in (
            lambda: kl_steps(step, ref, mask, S, limit, draw),
            lambda: entropy_steps(step, mask, S, limit, draw=draw),
        ):
            x = f()
            g = torch.autograd.grad(x.sum(), list(logits.values()), allow_unused=True, materialize_grads=True)
            out += [x.detach().flatten(), *(y.flatten() for y in g)]
        return torch.cat(out)
    # nothing to draw
    exact = look(12)
    draw = np.random.default_rng(0)
    assert torch.allclose(look(12, draw), exact)
    each = torch.stack([look(2, draw) for _ in range(n)])
    err = (each.mean(0) - exact).abs()
    se = each.std(0) / n**0.5
    assert (err <= 5*se + 1e-9).all() and (se > 1e-4).sum() > 20

def test_four_shots_from_a_large_pool():
    cm = torch.arange(64) < torch.tensor([[64], [40]])
    w = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).double()
    def step(a):
        return lambda p: masked_log_softmax(
            (a * w)[:, None].expand(-1, p.shape[1], -1),
            cm[:, None] & ~torch.zeros(2, p.shape[1], 64, dtype=torch.bool).scatter(2, p, True),
        )
    draws = torch.stack(
        [kl_steps(step(2.0), step(1.0), cm, 4, 256, np.random.default_rng(i)) for i in range(8)]
    )
    exact = kl_steps(step(2.0), step(1.0), cm, 3)
    assert (
        torch.allclose(draws[:, :, :2].mean(0), exact[:, :2])
        and torch.allclose(draws[:, :, 2].mean(0), exact[:, 2], rtol=0.02)
        and (draws[:, :, 3].std(0) < 0.1 * draws[:, :, 3].mean(0)).all()
    )
    with pytest.raises(ValueError, match="wanted >= 2"): kl_steps(step(1.), step(1.), cm, 2, 1)

def test_kl_refuses_what_it_cannot_do():
    cm = torch.ones(2, 5, dtype=torch.bool)
    p, _ = table_policy(0, 2, 5, 2, cm)
    less = cm.clone()
    less[0, 2] = False
    q, _ = table_policy(1, 2, 5, 2, less)
    with pytest.raises(ValueError, match="probability 0"): kl_exact(p, q, cm, 2)
    with pytest.raises(ValueError, match="at most 5"): kl_exact(p, p, cm, 6)
    with pytest.raises(ValueError, match="249,984 prefixes"): kl_exact(p, p, torch.ones(1, 64).bool(), 4)

def test_k3_is_unbiased_only_on_policy():
    cm = torch.ones(1, 5, dtype=torch.bool)
    (p, _), (q, _) = table_policy(0, 1, 5, 2, cm, 1.0), table_policy(1, 1, 5, 2, cm, 1.0)
    first = lambda s: s(torch.zeros(1, 1, 0, dtype=torch.long))[0, 0]
    lp = first(p)
    lq = first(q)
    i = torch.multinomial(lp.exp(), 200_000, True, generator=torch.Generator().manual_seed(0))[None]
    assert float(kl_k3(lp[i], lq[i], torch.ones_like(i, dtype=torch.bool))) == pytest.approx(
        float(kl_exact(p, q, cm, 1)), abs=0.02
    )

def test_toy_selector_sums_to_one_and_ignores_padding():
    items = [SynthGroups(20, K=(4, 6), N=(3, 6), shots=(1, 2, 3), seed=1)[i] for i in range(20)]
    model = ToySelector(8)
    (*xb, r, m) = pad_groups(items)
    whole = model(*xb)
    for b in range(20):
        *one, r1, m1 = pad_groups(items[b:b+1])
        assert torch.allclose(model(*one)[m1], whole[b][m[b]], atol=1e-5)
    assert {int(k) for k in xb[4].sum(-1).unique()} == {0, 1, 2, 3}

# --- imitation and listwise targets ------------------------------------------------------------------------
@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), top=st.integers(1, 7))
def test_top_weights_are_the_mean_over_ways_to_break_ties(seed, top):
    _, r, m = groups(seed)
    w = top_weights(r, m, top)
    g = torch.Generator().manual_seed(seed)
    assert torch.allclose(w.sum(-1), m.any(-1).double()) and (w[~m] == 0).all()
    # ties broken at random, 4,000 times
    x = r.masked_fill(~m, -9.0)[0] + 1e-3 * torch.rand(4000, 6, generator=g)
    ways = torch.zeros_like(x).scatter(1, x.topk(min(top, int(m[0].sum())), -1).indices, 1.0)
    ways = ways / ways.sum(-1, keepdim=True)
    assert torch.allclose(w[0], ways.mean(0).double(), atol=.04)
    assert torch.allclose(rce_weights(r, m, weights="rank"), rce_weights(r**3 + 7, m, weights="rank"))

def test_the_listwise_optimum_does_not_depend_on_the_sampler():
    "At pi = ref * exp(r/temp) every group of every sampler is met: no loss, no gradient. RCE follows what was drawn"
    g = torch.Generator().manual_seed(0)
    ref, r, temp = (
        torch.randn(12, generator=g).double().log_softmax(-1),
        torch.rand(12, generator=g).double(),
        0.3,
    )
    best = (ref + r / temp).log_softmax(-1)
    pulls = {}
    for name, w in dict(
        even=torch.ones(12), late=torch.linspace(0, 4, 12).exp(), early=torch.linspace(4, 0, 12).exp()
    ).items():
        i = torch.multinomial(w.expand(500, 12), 5, generator=g)
        m = torch.rand(500, 5, generator=g) < 0.8
        x = best.clone().requires_grad_()
        listwise_loss(x[i], r[i], m, ref[i], temp).backward()
        assert (
            float(listwise_loss(x[i], r[i], m, ref[i], temp).detach()) < 1e-12 and x.grad.abs().max() < 1e-9
        ), name
        # and only there
        y = best + 0.5 * torch.randn(12, generator=g)
        assert float(listwise_loss(y[i], r[i], m, ref[i], temp)) > 0.01
        z = best.clone().requires_grad_()
        rce_loss(z.log_softmax(-1)[i], r[i], m, temp).backward()
        pulls[name] = z.grad
    assert (pulls["late"] - pulls["early"]).abs().max() > .05

@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), want=st.floats(.1, .95), scale=st.floats(.01, 100.))
@example(seed=2000, want=.585180299646517, scale=1.) # a share that falls from 1 to 0 within half a decade
def test_tau_meets_the_wanted_share_in_any_unit(seed, want, scale):
    g = torch.Generator().manual_seed(seed)
    r = torch.rand(8, 12, generator=g).double()
    m = torch.rand(8, 12, generator=g) < 0.8
    m[:, :3] = True
    r[7] = 0.6
    for ref in (None, 3*torch.randn(8, 12, generator=g).double()):
        wide = (1e-4 * scale, 1e4 * scale)
        lt, temp = listwise_target(r * scale, m, ref, ess=want, limits=wide)
        lr = masked_log_softmax(torch.zeros_like(r) if ref is None else ref, m)
        chi = ((2 * lt - lr).masked_fill(~m, -torch.inf)).logsumexp(-1)
        share = (-chi).exp()
        least = 1 / ((lt.exp()**2 / lr.exp()).masked_fill(~m, 0.).sum(-1))
        assert torch.allclose(share, least)                      # 1 / (1 + chi^2)
        step = (wide[1] / wide[0]) ** (2**-16)
        cooler = masked_log_softmax(lr.masked_fill(~m, 0.0) + r * scale * step / temp[:, None], m)
        below = (-(2 * cooler - lr).masked_fill(~m, -torch.inf).logsumexp(-1)).exp()
        # as near as the last halving, which is all there is where the share jumps
        met = ((share - want).abs() < 1e-3) | (below <= want) & (want <= share)
        out = temp < wide[0]*1.01
        assert (met | out)[:7].all() and (share[out] >= want - 1e-3).all()
        # flat: the target is the reference
        assert temp[7] == wide[1] and torch.allclose(lt[7][m[7]], lr[7][m[7]])
        if ref is None: assert torch.allclose(share, globals()["ess"](lt.exp(), m))
        assert torch.allclose(
            listwise_target(r, m, ref, ess=want, limits=(1e-4, 1e4))[1][met & ~out],
            temp[met & ~out] / scale,
            rtol=1e-3,
        )

def test_listwise_refuses_and_survives():
    _, r, m = groups(0)
    for kw in (dict(temp=0.), dict(ess=1.), dict(ess=.3, limits=(0., 1.)), dict(limits=(2., 1.))):
        with pytest.raises(ValueError, match="listwise_target"): listwise_target(r, m, **kw)
    logp, *_ = groups(0)
    x = logp.clone().requires_grad_()
    y = logp.clone().requires_grad_()
    # the target is not differentiated
    listwise_loss(x, r, m, x).backward()
    listwise_loss(y, r, m, logp).backward()
    assert torch.allclose(x.grad, y.grad) and (y.grad[0] != 0).any()
    lt, temp = listwise_target(r, m, away(torch.zeros_like(r)))
    assert (
        temp.isfinite().all()
        and (temp >= 0.0199).all()
        and (temp <= 1.0).all()
        and torch.allclose(lt.exp().sum(-1), m.any(-1).double())
    )

def test_merge_orders_treats_orders_as_one():
    items = [SynthGroups(6, K=4, N=8, shots=(1, 2), seed=2)[i] for i in range(6)]
    *_, seqs, sm, r, m = pad_groups(items)
    r = torch.rand_like(r)
    r2, m2 = merge_orders(seqs, sm, r, m)
    rev = torch.where(sm[..., 1:2], seqs.flip(-1), seqs)
    r3, m3 = merge_orders(rev, sm, r, m)
    assert torch.equal(m2, m3) and torch.equal(r2[m2], r3[m3])
    for b, (_, _, ss, _) in enumerate(items):
        sets = {}
        [sets.setdefault(frozenset(s), []).append(float(x)) for s, x in zip(ss, r[b])]
        assert r2[b][m2[b]].tolist() == pytest.approx([sum(v)/len(v) for v in sets.values()])

# --- off-policy accounting ---------------------------------------------------------------------------------
def world(seed=0, K=5):
    "All pairs of 5 candidates, a policy, its step distributions, rewards that lean its way"
    cm = torch.ones(1, K, dtype=torch.bool)
    step, _ = table_policy(seed, 1, K, 2, cm, 1.0)
    seqs = torch.tensor(list(permutations(range(K), 2)))[None]
    steps = torch.stack([step(seqs[..., :t]) for t in range(2)], 2)
    logp = steps.gather(-1, seqs[..., None])[..., 0].sum(-1)
    r = (logp + torch.randn(logp.shape, generator=torch.Generator().manual_seed(seed)).double()).sigmoid()
    return cm, seqs, steps, logp, r, float((logp.exp()*r).sum())

def test_behaviour_probabilities_sum_to_one():
    cm, seqs, steps, logp, *_ = world()
    ok = torch.ones_like(seqs, dtype=torch.bool)
    assert float(random_logp(cm, 2)[0].exp()) == pytest.approx(1 / 20) and torch.allclose(
        tempered_logp(steps, seqs, ok, 1.0), logp
    )
    for T in (.3, 1., 2.): assert float(tempered_logp(steps, seqs, ok, T).exp().sum()) == pytest.approx(1.)
    assert float(tempered_logp(steps, seqs, ok, 1e6).exp().max()) == pytest.approx(1/20, rel=1e-4)
    with pytest.raises(ValueError, match="no sequence of 6"): random_logp(cm, 6)

def test_snis_converges_under_every_source_and_their_mixture():
    cm, seqs, steps, logp, r, truth = world()
    ok = torch.ones_like(seqs, dtype=torch.bool)
    g = torch.Generator().manual_seed(0)
    mus = dict(
        random=random_logp(cm, 2)[:, None].expand(1, 20).double(),
        hot=tempered_logp(steps, seqs, ok, 2.0),
        own=logp,
    )
    draw = lambda mu, n: torch.multinomial(mu[0].exp(), n, True, generator=g)
    for name, mu in mus.items():
        i = draw(mu, 40_000)[None]
        v = off_policy_value(logp[0][i], r[0][i], i >= 0, mu[0][i], cut=None)
        assert float(v.value) == pytest.approx(truth, abs=.004), name
        assert 0 < float(v.ess) <= 1 + 1e-9 and (float(v.ess) > .999) == (name == "own")
    n = torch.tensor([10_000, 20_000, 5_000])
    mix = mixture_logp(torch.stack(list(mus.values()), -1), n)
    assert torch.allclose(mix.exp(), (10*mus["random"].exp() + 20*mus["hot"].exp() + 5*mus["own"].exp())/35)
    i = torch.cat([draw(mu, int(k)) for mu, k in zip(mus.values(), n)])[None]
    assert float(off_policy_value(logp[0][i], r[0][i], i >= 0, mix[0][i], cut=None).value) == pytest.approx(
        truth, abs=0.004
    )

def test_enumerated_stratum_and_truncation():
    cm, seqs, steps, logp, r, truth = world(3)
    all20 = torch.ones(1, 20, dtype=torch.bool)
    g = torch.Generator().manual_seed(0)
    v = off_policy_value(logp, r, all20, logp, det=all20)
    assert float(v.value) == pytest.approx(truth) and float(v.mass) == pytest.approx(1.0) and v.trust.all()
    det = torch.zeros(20, dtype=torch.bool)
    det[logp[0].topk(5).indices] = True
    rest = (~det).double()
    i = torch.cat([det.nonzero()[:, 0], torch.multinomial(rest, 20_000, True, generator=g)])[None]
    v = off_policy_value(
        logp[0][i],
        r[0][i],
        i >= 0,
        torch.zeros_like(i).double(),
        det=torch.arange(i.shape[1])[None] < 5,
        cut=None,
    )
    assert float(v.value) == pytest.approx(truth, abs=0.004) and float(v.mass) == pytest.approx(
        float(logp[0][det].exp().sum())
    )
    # the rest was never looked at
    none = off_policy_value(logp, r, det[None], logp, det=det[None])
    assert none.value.isnan().all() and not none.trust.any()
    twice = [0] * 20 + list(range(20))
    m = torch.ones(1, 40, dtype=torch.bool)
    with pytest.raises(ValueError, match="stored twice"):
        off_policy_value(logp[:, twice], r[:, twice], m, logp[:, twice], det=m)
    wild = torch.tensor([[0., -9, -9, -9, -9, -9, -9, -9]]).double()
    free, cut = (
        off_policy_value(wild, r[:, :8], all20[:, :8], torch.zeros_like(wild), cut=c) for c in (None, 5.0)
    )
    assert (
        float(free.ess) == pytest.approx(1 / 8, rel=0.01)
        and float(cut.ess) > float(free.ess)
        and not free.trust.any()
    )

def test_padding_changes_no_value():
    cm, seqs, steps, logp, r, _ = world(1)
    m = torch.ones(1, 20, dtype=torch.bool)
    det = torch.arange(20)[None] < 3
    pad = torch.nn.functional.pad
    a = off_policy_value(logp, r, m, logp/2, det)
    b = off_policy_value(
        pad(logp, (0, 3), value=-torch.inf),
        pad(r, (0, 3), value=float("nan")),
        pad(m, (0, 3)),
        pad(logp / 2, (0, 3)),
        pad(det, (0, 3), value=True),
    )
    assert all(torch.allclose(x.double(), y.double()) for x, y in zip(a, b))

def test_inclusion_probabilities_make_the_stochastic_beam_unbiased():
    "Horvitz-Thompson over 20,000 Gumbel top-6 beams (Kool et al. 2019)"
    *_, logp, r, truth = world(2)
    g = torch.Generator().manual_seed(0)
    top = (logp - torch.empty(20_000, 20, dtype=torch.float64).exponential_(generator=g).log()).topk(7, -1)
    i, kappa = top.indices[:, :6], top.values[:, 6:]
    q = inclusion_logp(logp[0][i], kappa)
    assert (q <= 0).all()
    assert float((logp[0][i] - q).exp().mul(r[0][i]).sum(-1).mean()) == pytest.approx(truth, abs=.004)
    assert float(inclusion_logp(torch.tensor(-60.0).double(), torch.tensor(0.0).double())) == pytest.approx(
        -60.0
    )

@pytest.mark.parametrize("dual", [None, 1.5, 3.])
def test_clip_shares_are_those_of_the_gradient(dual):
    "Sequences whose log-probability gets no gradient, by sign of the advantage; the dual clip silences, too"
    torch.manual_seed(1)
    lp = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    old = torch.randn(8, 6, dtype=torch.float64)
    mask = torch.rand(8, 6) > .2
    adv = advantage(torch.rand(8, 6, dtype=torch.float64), mask)
    clipped_surrogate(lp, old, adv, mask, dual=dual).backward()
    silent = lp.grad == 0
    for share, which in zip(clip_shares(lp.detach(), old, adv, mask, dual=dual), (adv > 0, adv < 0)):
        those = mask & which
        assert share.item() == pytest.approx((silent & those).sum().item() / those.sum().item())
