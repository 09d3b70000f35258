"Blocks of the selector: formulas against brute force, one pool against many, STOP"
import itertools, math
import pytest, torch
from torch.nn import functional as F
from hypothesis import given, settings, strategies as st
from leverplus.blocks import (
    DIVERSITY, SCORERS, STATES, Additive, CrossAttend, DPP, Heads, SelfAttend, Stop, best_and_mean, dots,
    picked, with_stop,
)

close = lambda a, b, tol=1e-5: torch.testing.assert_close(a, b, atol=tol, rtol=tol)
unit = lambda *shape: F.normalize(torch.randn(*shape), dim=-1)

def made(names, name, *args, seed=0):
    "A block with everything moved off its start"
    torch.manual_seed(seed)
    b = names[name](*args)
    with torch.no_grad():
        for p in b.parameters(): p.add_(.3*torch.randn_like(p))
    return b

@pytest.mark.parametrize("block", [CrossAttend, SelfAttend])
def test_attention_is_the_same_where_a_fixed_order_is_asked_for(block):
    "Values and gradients; the kernels that CUDA would take are another matter, and `make gpu` looks at them"
    torch.manual_seed(0)
    b = block(8, 2)
    c = unit(3, 5, 8).requires_grad_()
    mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
    def run():
        if block is CrossAttend: return b(q, c, mask)
        return b(c, mask).masked_fill(~mask[..., None], 0.)
    q = unit(3, 8)
    plain = run()
    want = torch.autograd.grad(plain.square().sum(), c)[0]
    torch.use_deterministic_algorithms(True)
    try:
        steady = run()
        got = torch.autograd.grad(steady.square().sum(), c)[0]
    finally: torch.use_deterministic_algorithms(False)
    close(steady, plain)
    close(got, want)

@pytest.mark.parametrize("name", SCORERS)
def test_scorers_keep_pools_and_prefixes_apart(name):
    s = made(SCORERS, name, 8)
    q = unit(3, 4, 8)
    c = unit(3, 6, 8)
    f = s(q, s.keys(c))
    for b, p, k in itertools.product(range(3), range(4), range(6)):
        close(f[b, p, k], s(q[b:b+1, p:p+1], s.keys(c[b:b+1, k:k+1]))[0, 0, 0])
    close(s(q, s.keys(c[:1])), s(q, s.keys(c[:1]).expand(3, -1, -1)))     # one pool for all

def test_scorers_by_hand():
    q = unit(1, 1, 8)
    c = unit(1, 1, 8)
    a = made(SCORERS, "additive", 8)
    want = a.v.weight[0] @ torch.tanh(a.wq(q[0, 0] * 8**0.5) + a.wc(c[0, 0] * 8**0.5))
    close(a(q, a.keys(c))[0, 0, 0], want)
    small = Additive(8, room=1)
    small.load_state_dict(a.state_dict())
    c5 = unit(1, 5, 8)
    close(small(q, small.keys(c5)), a(q, a.keys(c5)))
    b = made(SCORERS, "bilinear", 8)
    close(b(q, b.keys(c))[0, 0, 0], q[0, 0] @ b.w @ c[0, 0])
    for soft in (False, True):
        h = made(dict(h=Heads), "h", 8, 2, soft)
        u = h.proj.weight.view(2, 4, 8)
        cos = torch.stack([F.cosine_similarity(u[i] @ q[0, 0], u[i] @ c[0, 0], dim=0) for i in range(2)])
        want = (h.weights * (h.temp * F.logsigmoid((cos - h.bias) / h.temp) if soft else cos)).sum()
        close(h(q, h.keys(c))[0, 0, 0], want)
        assert (h.weights > 0).all()
    close(Heads(8, 2).weights.sum(), torch.tensor(1.))

@pytest.mark.parametrize("name", [n for n in STATES if n != "none"])
def test_states_are_unit_and_know_the_pick(name):
    u = made(STATES, name, 8)
    q = unit(3, 4, 8)
    c = unit(3, 4, 8)
    x = u(q, c)
    close(x.norm(dim=-1), torch.ones(3, 4))
    close(x[1, 2], u(q[1, 2][None, None], c[1, 2][None, None])[0, 0])
    assert (x - u(q, unit(3, 4, 8))).abs().max() > 1e-2

def run(block, feats, Y, query):
    mem = ()
    for y in Y: mem = block.update(mem, feats, torch.full((len(query), 1), y))
    return block(mem, feats, query)[:, 0]

@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 4))
def test_diversity_is_its_formula(seed, n):
    torch.manual_seed(seed)
    x = unit(2, 6, 5)
    query = unit(2, 4)
    Y = torch.randperm(6)[:n].tolist()
    rest = [k for k in range(6) if k not in Y]
    b = made(DIVERSITY, "mmr", 5, 4, seed=seed)
    cos = x @ x.transpose(1, 2)
    close(run(b, b.prepare(x), Y, query), -b.weight * cos[:, Y].amax(1))
    b = made(DIVERSITY, "coverage", 5, 4, seed=seed)
    z = b.prepare(x)
    u = 1 - (1 - z[:, Y]).prod(1)
    need = b.need(2 * query).softmax(-1) * z.shape[-1]
    close(run(b, z, Y, query), -b.weight * (need[:, None] * z * u[:, None]).sum(-1))
    b = made(DIVERSITY, "dpp", 5, 4, seed=seed)
    L = ((1 - b.ridge) * cos + b.ridge * torch.eye(6)).double()
    gain = torch.stack([L[:, [*Y, k]][..., [*Y, k]].logdet() - L[:, Y][..., Y].logdet() for k in rest], -1)
    close(run(b, b.prepare(x), Y, query)[:, rest].double(), b.weight.double()*gain, 2e-2)

def test_greedy_dpp_maximises_the_determinant_step_by_step():
    torch.manual_seed(0)
    x = unit(1, 8, 5)
    g = torch.rand(8) + 0.5
    b = DPP(5, 4, start=1.0)
    mem = ()
    Y = []
    L = g[:, None] * ((1 - b.ridge) * x[0] @ x[0].T + b.ridge*torch.eye(8)) * g
    for _ in range(4):
        ell = 2 * g.log() + (b(mem, x, None)[0, 0] if mem else 0.0)
        ell[Y] = -torch.inf
        best = max((k for k in range(8) if k not in Y), key=lambda k: L[[*Y, k]][:, [*Y, k]].det().item())
        Y.append(int(ell.argmax()))
        assert Y[-1] == best
        mem = b.update(mem, x, torch.tensor([[best]]))

def test_dpp_stays_finite_with_twins():
    x = torch.ones(1, 4, 3) / 3**0.5
    b = DPP(3, 4, start=1.0)
    out = run(b, x, [0, 1, 2], x[:, 0])
    assert out.isfinite().all() and out[0, 3] < -5

@pytest.mark.parametrize("name", [n for n in DIVERSITY if n != "none"])
def test_diversity_of_one_pool(name):
    b = made(DIVERSITY, name, 5, 4)
    x = unit(1, 6, 5)
    q = unit(3, 4)
    f = b.prepare(x)
    close(run(b, f, [2, 4], q), run(b, f.expand(3, -1, -1), [2, 4], q))

def test_attention_folds_and_shares():
    torch.manual_seed(0)
    layer = CrossAttend(8, 2).eval()
    torch.nn.init.normal_(layer.attn.in_proj_bias)
    q = torch.randn(3, 8)
    c = torch.randn(3, 5, 8)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    mask[2, 0] = False
    close(layer(q, c, mask, fold=True), layer(q, c, mask))
    close(layer(q, c[:1], mask), layer(q, c[:1].expand(3, -1, -1), mask))
    loss = lambda **kw: layer(q, c, mask, **kw).square().sum()
    for a, b in zip(
        *(torch.autograd.grad(loss(**kw), list(layer.attn.parameters())) for kw in ({}, dict(fold=True)))
    ):
        close(a, b, 1e-4)
    c2 = c.clone()
    c2[1, 3:] = 99.0
    close(layer(q, c2, mask, fold=True), layer(q, c, mask))
    layer.train()
    layer.attn.dropout = 0.9
    torch.manual_seed(0)
    x = torch.stack([layer.folded(q, c, mask) for _ in range(3000)]).mean(0)
    # dropout keeps the mean
    layer.eval()
    close(x, layer.folded(q, c, mask), 0.3)

def test_self_attention_is_equivariant_and_blind_to_padding():
    torch.manual_seed(0)
    mix = SelfAttend(8, 2)
    c = torch.randn(2, 5, 8)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    perm = torch.tensor([4, 2, 0, 1, 3])
    close(mix(c[:, perm], mask[:, perm]), mix(c, mask)[:, perm])
    close(mix(c[1:, :3], mask[1:, :3]), mix(c, mask)[1:, :3])
    assert (mix(c, mask)[0, 0] - mix(c[:, :3], mask[:, :3])[0, 0]).abs().max() > 1e-3          # rivals matter

@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), z=st.floats(-50, 50), done=st.booleans(), offered=st.booleans())
def test_with_stop_is_a_distribution(seed, z, done, offered):
    torch.manual_seed(seed)
    lp = torch.randn(4, 5).masked_fill(torch.rand(4, 5) < 0.3, -torch.inf)
    lp[0] = -torch.inf
    lp[1, 0] = 0.0
    lp = (
        lp.nan_to_num(nan=0.0)
        if (lp == -torch.inf).all()
        else torch.where((lp == -torch.inf).all(-1, keepdim=True), lp, lp.log_softmax(-1))
    )
    out = with_stop(lp, torch.full((4,), z) if offered else None, torch.full((4,), done))
    close(out.exp().sum(-1), torch.ones(4))
    assert out[0, -1] == 0 and (not done or (out[:, -1] == 0).all())
    if not done and offered: close(out[1, -1].exp(), torch.sigmoid(torch.tensor(z)))
    if not done and not offered: assert out[1, -1] == -torch.inf

@pytest.mark.parametrize("least", [0, 1])
def test_stop_starts_fair_and_every_step_has_its_own_bias(least):
    s = Stop(8, 3, least)
    q = unit(2, 4, 8)
    logits = torch.randn(2, 1, 5)
    free = torch.rand(2, 4, 5) < .5
    for t in range(least, 3): close(s(q, logits, free, t).sigmoid(), torch.full((2, 4), 1 / (4 - t)))
    with torch.no_grad(): s.bias[-1] = 2.
    close(s(q, logits, free, 2), torch.full((2, 4), 2.0))
    close(s(q, logits, free, 1), torch.full((2, 4), -math.log(2)))

def test_best_and_mean_look_at_the_free_alone():
    logits = torch.tensor([[[1., 5, 3]]], requires_grad=True)
    free = torch.tensor([[[True, False, True], [False, False, False]]])
    out = best_and_mean(logits, free)
    close(out, torch.tensor([[[3., 2], [0, 0]]]))
    out.sum().backward()
    close(logits.grad, torch.tensor([[[.5, 0, 1.5]]]))
    perm = torch.tensor([2, 0, 1])
    close(best_and_mean(logits[..., perm], free[..., perm]), out)

def test_dots_and_picked_of_one_pool():
    q = torch.randn(3, 4, 8)
    c = torch.randn(1, 6, 8)
    i = torch.tensor([[0, 5], [1, 1], [2, 3]])
    close(dots(q, c), dots(q, c.expand(3, -1, -1)))
    assert torch.equal(picked(c, i), picked(c.expand(3, -1, -1), i))
