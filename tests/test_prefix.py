"Shared beginnings: the plan can be computed in its order, loses nothing and never costs more tokens than it spares"
import pytest, torch
from hypothesis import given, settings, strategies as st
from leverplus.prefix import PrefixStore, plan_prefixes

words = st.lists(st.lists(st.sampled_from("abcd"), max_size=3), min_size=1, max_size=12)

def tree(prompts):
    paths = [[("r", *p[:j]) for j in range(len(p) + 1)] for p in prompts]
    return paths, {k: 7 + 10*(len(k) - 1) for p in paths for k in p}

@settings(max_examples=300)
@given(words, st.integers(0, 2), st.one_of(st.none(), st.integers(0, 80)), st.data())
def test_plan(prompts, keep, room, data):
    paths, size = tree(prompts)
    stored = data.draw(st.sets(st.sampled_from(sorted(size))))
    room = float("inf") if room is None else room
    make, where = plan_prefixes(paths, size, stored, keep, room)
    have = set(stored)
    for k, base in make: # an order that can be computed
        assert k not in have and (base is None or base in have and base == k[: len(base)])
        have.add(k)
    assert sum(size[k] for k, _ in make) <= room
    for path, w in zip(paths, where): # every prompt continues behind the longest beginning there is
        assert w == max((k for k in path if k in have), key=len, default=None)
    if room == float("inf") and not keep: # what is computed is branched behind, so it pays or costs nothing
        run = sum(size[k] - size.get(b, 0) for k, b in make) + sum(
            size[p[-1]] - size.get(w, 0) for p, w in zip(paths, where)
        )
        assert run <= sum(size[p[-1]] for p in paths)

@given(words)
def test_everything_that_is_shared_is_computed_once(prompts):
    paths, size = tree(prompts)
    make, where = plan_prefixes(paths, size)
    run = sum(size[k] - size.get(b, 0) for k, b in make) + sum(
        size[p[-1]] - size.get(w, 0) for p, w in zip(paths, where)
    )
    # as many tokens as the tree of all prompts has
    assert run == sum(size[k] - size.get(k[:-1] or None, 0) for k in size)

@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("pgdh"), st.integers(0, 5)), max_size=40), st.integers(0, 200))
def test_store_keeps_its_budget_and_what_is_held(ops, budget):
    # 16 bytes a token
    s = PrefixStore(budget)
    kv = lambda i: torch.zeros(1, 2, 1, i + 1, 2)
    for op, i in ops:
        if op == "p": s.put(i, kv(i))
        if op == "g" and i in s: assert s[i].shape[3] == i + 1 and list(s)[-1] == i
        if op == "d": s.drop(i)
        if op == "h": s.held = frozenset([i])
        assert s.nbytes == sum(16*(k + 1) for k in s) and len(s) == len(list(s))
        if op == "p": assert s.nbytes <= budget or set(s) <= s.held
    s.clear()
    assert s.nbytes == 0 and len(s) == 0 and not s.held

def test_unknown_key():
    with pytest.raises(KeyError): PrefixStore()["x"]
