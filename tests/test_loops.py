"The closed loop and its rounds: what an interrupt costs, who may judge, what n questions may claim"
import itertools, shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from hypothesis import assume, given, settings, strategies as st
from leverplus.core import rng
from leverplus.embed import EmbedStore
from leverplus.statistics import Interval
from leverplus.groups import OtherContents, RLData
from leverplus.infer import as_pointer
from leverplus.lvlm import MockScorer
from leverplus.loops import (
    LIMITS, Check, Loop, LoopSettings, Questions, _gained, _held, _last_shrink, advise, closed_loop,
    code_fingerprint, loop_queries, loop_settings, needed, oracle_ranks, plot_rounds, rounds,
)
from leverplus.pools import Pool
from leverplus.settings import Guarding, Proposing
from leverplus.rldata_propose import SimilarityPrior
from leverplus.runs import Run
from leverplus.rldata_ask import ask
from leverplus.rldata_generate import generate
from leverplus.selector import PointerSelector
from leverplus.settings import Mining, change, plain_settings, read_settings

class Scripted:
    "Counts what it is asked, and is interrupted after `stop` prompts"
    def __init__(self, seed=0, fails=(), stop=None):
        self.inner = MockScorer(seed, fails)
        self.stop = stop
        self.asked = []
    @property
    def fingerprint(self): return self.inner.fingerprint
    def run(self, prompts, targets, generate=True, progress=False):
        for p in prompts:
            if self.stop is not None and len(self.asked) >= self.stop: raise KeyboardInterrupt
            self.asked.append((p.question_id, p.pointer))
        return self.inner.run(prompts, targets, generate, progress)

def make_world(scorer=None, n=24, D=6, K=6, seed=0):
    "Numbers only: `n` questions of each split, two to a picture, and 20 demonstrations"
    g = torch.Generator().manual_seed(seed)
    names = [(s, i) for s in ("train", "dev", "test") for i in range(n)] + [("demo", i) for i in range(20)]
    words = "cat dog car bus".split()
    rows = [
        dict(
            question_id=100 * k + 1,
            image_id=k // 2,
            image_path=f"{k}.png",
            question=f"What is {k}?",
            answers=[words[k % 4]] * 10,
            answer=words[k % 4],
            split=s,
        )
        for k, (s, i) in enumerate(names)
    ]
    items = pd.DataFrame(rows, index=pd.Index([r["question_id"] for r in rows]))
    ids = items.question_id.tolist()
    demos = items.question_id[items.split == "demo"].to_numpy()
    pools = {
        s: Pool(
            {q: rng("pool", q).choice(demos, K, replace=False) for q in items.question_id[items.split == s]}
        )
        for s in ("train", "dev", "test")
    }
    return SimpleNamespace(
        items=items,
        store=EmbedStore(ids, torch.randn(len(ids), D, generator=g), torch.randn(len(ids), D, generator=g)),
        pools=pools,
        scorer=scorer or Scripted(),
    )

FEW = dict(beam=2, random=3)
def fit(learn): return learn.fit_listwise(2, 1e-2, best=False, watch=None)
KW = dict(
    n=12, dev=10, valid=4, counts=FEW, policy_counts=FEW, model=dict(d_hidden=8), bs=6, draws=2, train=fit
)

def pictured(world, folder):
    "The same world, its pictures in files"
    paths = [folder/name for name in world.items.image_path]
    for p in paths: p.write_bytes(p.name.encode())
    world.items = world.items.assign(image_path=list(map(str, paths)))
    return world

def test_a_loop_is_not_continued_with_other_pictures(tmp_path):
    world = pictured(make_world(Scripted(stop=40)), tmp_path)
    with pytest.raises(KeyboardInterrupt): Loop(world, tmp_path/"loop", **KW).play(0)
    loop = Loop(world, tmp_path/"loop", **KW)
    one = loop.queries["dev"][0]
    file = tmp_path/f"{one//100}.png"
    file.write_bytes(b"another picture")
    with pytest.raises(OtherContents, match=f"the pictures of question_id {one} .1 of "):
        Loop(world, tmp_path/"loop", **KW)
    file.write_bytes(file.name.encode())
    Loop(world, tmp_path/"loop", **KW)

@pytest.mark.parametrize("what", ["the selector", "the groups", "the round"])
def test_a_round_is_what_it_left(tmp_path, what):
    loop = Loop(make_world(), tmp_path/"loop", **KW)
    first = loop.play(0)
    other = Loop(make_world(Scripted(seed=5)), tmp_path/"other", **KW | dict(seed=1))
    other.play(0)
    part = {"the selector": "checkpoint", "the groups": "data", "the round": "."}[what]
    shutil.copytree(loop.folder(0), tmp_path/"before")
    shutil.rmtree(loop.folder(0)/part)
    shutil.copytree(other.folder(0)/part, loop.folder(0)/part)
    says = "no round of this loop, other loop.seed, seed" if what == "the round" else "not what this round has trained"
    with pytest.raises(ValueError, match=says): loop.play(1)
    with pytest.raises(ValueError, match=says): Loop(make_world(), tmp_path/"loop", **KW).play(0)
    shutil.rmtree(loop.folder(0))
    shutil.copytree(tmp_path/"before", loop.folder(0))
    pd.testing.assert_frame_equal(loop.play(0).scored, first.scored)
    loop.play(1)

# ---- settings ----------------------------------------------------------------------------------------------

@settings(max_examples=25)
@given(
    st.integers(2, 99), st.integers(1, 4), st.sampled_from([None, Mining(rounds=2, budget=9)]),
    st.sampled_from([None, dict(top=2)]), st.sampled_from([{}, dict(d_hidden=8)]), st.booleans(),
    st.integers(0, 9),
)
def test_settings_are_saved_in_the_run_and_read_back(
    tmp_path_factory, n, shots, mining, two_stage, model, warm, seed
):
    path = tmp_path_factory.mktemp("loop")
    chosen = dict(shots=shots, mining=mining, two_stage=two_stage, model=model, warm=warm, seed=seed)
    made = change(LoopSettings(), n=min(n, 24), dev=10, valid=4, counts=FEW, reward="gtprob", **chosen)
    loop = Loop(make_world(), path, made)
    assert loop.settings == made == loop_settings(path)
    assert read_settings(LoopSettings, plain_settings(made)) == made
    assert Loop(make_world(), path, loop_settings(path)).run.starts[1:]
    with pytest.raises(ValueError, match=f"draws: 5 there, {made.draws + 1} now"):
        Loop(make_world(), path, loop_settings(path), draws=made.draws + 1)

def test_flat_names_are_the_settings_of_the_groups(tmp_path):
    kw = dict(n=12, dev=10, valid=4, counts=FEW, policy_counts=FEW, draws=2)
    flat = Loop(make_world(), tmp_path / "flat", **kw, shots=3, warm=True)
    by_hand = change(LoopSettings(), **kw, shots=3, warm=True)
    assert flat.settings == by_hand and by_hand.proposing.shots == (3,) and by_hand.training.warm
    for wrong, says in [
        (dict(shot=2), "did you mean shots"), (dict(shots=(1, 2)), "one number of shots"),
        (dict(reward="nice"), "reward 'nice': choose one of"), (dict(n=0), "n 0: wanted a number >= 1"),
        (dict(mining=1), "mining"), (dict(counts=dict(beams=1)), "beams"),
    ]:
        with pytest.raises(ValueError, match=says): Loop(make_world(), tmp_path / "no", **wrong)
    with pytest.raises(ValueError, match="settings 60: wanted"): Loop(make_world(), tmp_path / "no", 60)
    assert not (tmp_path / "no").exists()

def test_a_folder_of_something_else_has_no_settings_of_a_loop(tmp_path):
    Run.create(tmp_path / "other", dict(bs=8), 0)
    with pytest.raises(ValueError, match="no folder of a loop: its settings are bs"):
        loop_settings(tmp_path / "other")

def test_seeds_of_proposing_and_mining_count_from_that_of_the_loop(tmp_path):
    loop = Loop(make_world(), tmp_path / "a", **KW | dict(seed=3))
    assert loop.proposing(None, loop.settings.seed + 2).seed == 5
    moved = change(LoopSettings(), **{k: v for k, v in KW.items() if k != "train"})
    moved = replace(moved, proposing=replace(moved.proposing, seed=10))
    assert Loop(make_world(), tmp_path / "b", moved).proposing(None, 2).seed == 12

def test_what_is_asked_is_asked_as_was_said(tmp_path):
    "Style and evaluator reach proposals, picks, mined sequences, and the fingerprints of the folder"
    styles = set()
    class Styles(Scripted):
        def run(self, prompts, *args, **kw):
            styles.update(p.style for p in prompts)
            return super().run(prompts, *args, **kw)
    chat = dict(KW, style="chat", evaluator="lmms", mining=Mining(rounds=1, tries=2))
    loop = closed_loop(make_world(Styles()), tmp_path / "a", **chat).loop
    assert styles == {"chat"}
    plain_loop = Loop(make_world(), tmp_path / "b", **KW)
    assert loop.run.fingerprints["scorer"] != plain_loop.run.fingerprints["scorer"]

# ---- questions ---------------------------------------------------------------------------------------------

@settings(max_examples=15)
@given(st.integers(2, 20), st.integers(2, 10), st.integers(2, 6), st.integers(0, 99))
def test_judges_share_no_picture_with_those_who_choose_and_fewer_are_a_part_of_more(n, dev, valid, seed):
    w = make_world()
    q = loop_queries(w.items, Questions(n=n, dev=dev, valid=valid), seed)
    image = lambda k: set(w.items.image_id.loc[q[k]])
    assert not image("dev") & image("valid")
    assert {k: len(v) for k, v in q.items()} == dict(train=n, dev=dev, valid=valid)
    assert [set(w.items.split.loc[q[k]]) for k in ("train", "valid", "dev")] == [{"train"}, {"dev"}, {"dev"}]
    more = loop_queries(w.items, Questions(n=n + 3, dev=dev + 2, valid=2), seed)
    assert more["train"][:n] == q["train"] and more["dev"][:dev] == q["dev"]

# ---- numbers -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("S", [1, 2])
def test_ranks_are_those_of_brute_force(tmp_path, S):
    w = make_world()
    qs = w.pools["dev"].only(list(w.pools["dev"])[:8])
    data = generate(
        tmp_path / "d",
        list(qs),
        w.items,
        qs,
        w.scorer,
        w.store,
        proposing=Proposing(shots=S, counts=FEW),
        guarding=Guarding(test=0),
        progress=False,
    )
    for policy in (
        SimilarityPrior(5.0),
        PointerSelector(w.store.get(list(qs), "mixed").shape[-1], d_hidden=8),
    ):
        got = oracle_ranks(policy, data, w.store, bs=3).set_index("question_id")
        assert torch.is_grad_enabled()
        if isinstance(policy, torch.nn.Module):
            assert policy.training
            policy.eval()
        for q, g in data.groups():
            cands = w.store.get(list(qs[q]), "mixed")[None]
            cos = None
            enc = policy.encode(w.store.get([q], "mixed"), cands, torch.ones(1, len(qs[q]), dtype=torch.bool))
            lp = []
            for p in g.pointer:
                at = torch.tensor([[[qs[q].index(i) for i in p]]])
                lp.append(sum(policy.step_logp(enc, at[..., :t])[0, 0, at[0, 0, t]].item() for t in range(S)))
            acc = g.vqa_acc_score.to_numpy()
            lp = np.array(lp)
            best = acc >= acc.max() - 1e-9
            assert (q in got.index) == (not best.all())
            if not best.all():
                assert got.loc[q, ["sequences", "best", "rank", "chance"]].tolist() == [
                    len(g),
                    best.sum(),
                    1 + (lp > lp[best].max() + 1e-9).sum(),
                    (len(g) + 1) / (best.sum() + 1),
                ]

def test_a_round_adds_up_and_the_test_split_is_never_asked(tmp_path):
    w = make_world()
    r = rounds(w, tmp_path / "loop", most=2, patience=9, **KW)
    f, L = r.frame, r.loop
    assert f.known.tolist() == f.new.cumsum().tolist()
    assert (f.new <= f.asked).all()
    assert len(f) == 2
    assert (f.headroom >= -1e-9).all()
    assert (f.train_headroom >= -1e-9).all()
    # every fact is paid for once
    asked = pd.DataFrame(w.scorer.asked, columns=["q", "p"])
    assert not asked.duplicated().any()
    assert set(asked.q) == set(sum(L.queries.values(), []))
    assert set(w.items.split.loc[asked.q.unique()]) == {"train", "dev"}
    # all labels are the scorer's
    last = r.played[-1]
    facts = ask(last.data.rows, MockScorer(0), w.items)
    np.testing.assert_allclose(last.data.rows.vqa_acc_score, facts.vqa_acc_score)
    # the oracle is the best that is known, recomputed from what was asked about development questions
    dev = asked[asked.q.isin(L.queries["dev"])]
    dev = dev[dev.p.map(len) == 2]
    own = ask(pd.DataFrame(dict(question_id=dev.q, pointer=dev.p)), MockScorer(0), w.items)
    assert f.best_known.iloc[-1] == pytest.approx(own.groupby("question_id").vqa_acc_score.max().mean())
    picks = last.scored[(last.scored.part == "dev") & (last.scored.selector == "selector")]
    assert f.acc.iloc[-1] == pytest.approx(picks.vqa_acc_score.mean())
    assert f.headroom.iloc[-1] == pytest.approx(f.best_known.iloc[-1] - f.acc.iloc[-1])
    assert r.best == int(f.headroom.argmin())
    assert r.played[1].data.manifest["sources"] and all((p.path / "settings.json").exists() for p in r.played)
    plot_rounds(f)

@settings(max_examples=60)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0, .3))
def test_the_last_shrink_is_a_record(h, min_shrink):
    at = _last_shrink(h, min_shrink)
    assert all(x >= h[at] - min_shrink - 1e-9 for x in h[at+1:])
    assert at == 0 or h[at] < min(h[:at]) or min_shrink > 0

# ---- resume ------------------------------------------------------------------------------------------------

def _same(a, b):
    for k in ("scored", "ranks", "pairs"): pd.testing.assert_frame_equal(getattr(a, k), getattr(b, k))
    assert a.data.fingerprint == b.data.fingerprint
    assert all(torch.equal(v, b.model.state_dict()[k]) for k, v in a.model.state_dict().items())

TIMES = [0]
def fit_or_die(learn):
    TIMES[0] -= 1
    if not TIMES[0]:
        learn.fit_listwise(1, 1e-2, best=False, watch=None)
        raise KeyboardInterrupt
    return fit(learn)

def play(scorer, path, k): # rounds 0 to k
    loop = Loop(make_world(scorer), path, **KW | dict(train=fit_or_die))
    return [loop.play(i) for i in range(k + 1)]

def test_interrupted_anywhere_it_ends_as_if_nothing_had_been(tmp_path):
    TIMES[0] = 0
    s = Scripted()
    whole = play(s, tmp_path / "whole", 1)
    n = len(s.asked)
    # while it asks, early and late; while round 0, then round 1, is trained
    for stop, dies in [(3, 0), (n - 10, 0), (None, 1), (None, 2)]:
        TIMES[0], s, d = dies, Scripted(stop=stop), tmp_path/f"{stop} {dies}"
        with pytest.raises(KeyboardInterrupt): play(s, d, 1)
        # nothing is paid for twice
        TIMES[0], s.stop = 0, None
        _same(play(s, d, 1)[1], whole[1])
        assert stop or len(s.asked) == n
    # read, neither asked nor trained
    TIMES[0], s = 0, Scripted()
    a = play(s, tmp_path / "whole", 1)
    _same(a[0], whole[0])
    _same(a[1], whole[1])
    assert not s.asked and not TIMES[0]

def test_one_more_round_leaves_the_others_as_they_were(tmp_path):
    s = Scripted()
    a = rounds(make_world(s), tmp_path / "loop", most=1, **KW)
    c = closed_loop(make_world(s), tmp_path / "loop", **KW)
    n = len(s.asked)
    b = rounds(make_world(s), tmp_path / "loop", most=2, **KW)
    assert len(a.frame) == 1 and len(b.frame) == 2 and b.frame.acc[0] == a.frame.acc[0] and len(s.asked) > n
    _same(b.played[0], c.round)
    assert repr(closed_loop(make_world(s), tmp_path / "loop", **KW)) == repr(c)

def test_a_folder_refuses_what_is_not_its_own(tmp_path):
    w = make_world()
    Loop(w, tmp_path / "a", **KW)
    for kw, what in [
        (dict(reward="hard_only"), "reward"),
        (dict(seed=1), "seed"),
        (dict(train=lambda l: l.fit_rce(1)), "train: 'fit"),
        (dict(n=11), "n: 12 there, 11 now"),
    ]:
        with pytest.raises(ValueError, match=what): Loop(w, tmp_path/"a", **KW | kw)
    with pytest.raises(ValueError, match="fingerprint of scorer"):
        Loop(make_world(Scripted(1)), tmp_path / "a", **KW)
    with pytest.raises(ValueError, match="valid=4, but 0"): Loop(w, tmp_path/"b", **KW | dict(dev=23))
    with pytest.raises(ValueError, match="patience 0: wanted a whole number >= 1"): rounds(w, tmp_path/"b", patience=0)

def test_other_ways_through(tmp_path):
    s = Scripted()
    kw = dict(mining=Mining(rounds=1), two_stage=dict(top=2, random=1), warm=True, n=6, dev=6)
    a = rounds(make_world(s), tmp_path / "a", most=2, **KW | kw)
    mined = a.played[0].data.rows
    assert (mined.gen_method == "mined").any() and mined.vqa_acc_score.isna().any() and len(a.frame) == 2
    b = closed_loop(
        make_world(),
        tmp_path / "b",
        **KW
        | dict(shots=1, reward="gtprob", train=lambda learn: learn.fit_rce(1, 1e-2, watch=None), n=6, dev=6)
    )
    assert b.round.data.shots == (1,) and b.health.reward == "gtprob"

def test_failures_are_no_negatives_and_the_advice_names_them(tmp_path):
    q = loop_queries(make_world().items, Questions(n=12, dev=10, valid=4))
    bad = q["train"][:2] + q["dev"][:1]
    r = closed_loop(make_world(Scripted(fails=bad)), tmp_path / "loop", **KW)
    assert r.frame.set_index("what").outcome["rows that failed"] == "not met"
    assert r.advice == "mend the data"
    assert any("failures" in l for l in r.lines)
    t = r.table.set_index(["part", "selector"]).n
    assert t["train", "selector"] == 10 and t["dev", "selector"] == 9

# ---- what may be claimed -----------------------------------------------------------------------------------

@settings(max_examples=80)
@given(st.floats(0, 1), st.floats(0, .5), st.floats(0, .5), st.floats(0, 1), st.booleans())
def test_a_condition_is_met_by_the_whole_interval_or_not_at_all(v, a, b, limit, at_least):
    o = _held("x", (v, v - a, v + b), limit, "", at_least).outcome
    inside = v - a < limit < v + b
    assert not inside or o == "open"
    if o == "met": assert (v >= limit) if at_least else (v <= limit)
    if o == "not met": assert (v < limit) if at_least else (v > limit)

def test_no_effect_is_not_called_one_and_a_large_effect_is_found():
    g = np.random.default_rng(0)
    out = dict(none=[], large=[])
    for i in range(100):
        # another pick at random for a third of them
        old = g.choice([0.0, 0.6, 1.0], 60, p=[0.5, 0.1, 0.4])
        move = g.random(60) < 0.3
        new = np.where(move, g.permutation(old), old)
        out["none"].append(_gained("x", "x", new, old, None, "")[0].outcome)
        if i < 20:
            out["large"].append(
                _gained("x", "x", np.where(g.random(60) < 0.5, 1.0, old), old, None, "")[0].outcome
            )
    assert np.mean([o == "open" for o in out["none"]]) >= .94 and out["large"].count("met") >= 18

def test_nothing_seen_is_not_nothing_there():
    a = np.tile([0.0, 1.0], 30)
    c, said = _gained("x", "new", a, a, None, "")
    assert c.outcome == "open" and "no score of 60 changed, so at most 6%" in said
    assert _gained("x", "seen", a, a, None, "", still="not met")[0].outcome == "not met"
    assert needed(a, a) is None
    b = a.copy()
    b[:6] = 1 - b[:6]
    n = needed(a, b, wanted=0.02)
    assert n > 1000 and needed(a, b, wanted=0.04) == pytest.approx(n / 4, abs=2)

def test_advice_by_the_first_condition_that_is_not_met():
    C = lambda o: Check("", 0., 0., 0., "", o, "")
    for outcomes in itertools.product(["met", "not met", "open"], repeat=4):
        data, room, seen, new = outcomes
        a = advise([C("met"), C(data), C(room), C(seen), C(new)])
        first = next(
            (
                k
                for k, o in zip(
                    ("mend the data", "no headroom", "mend the training", "worse on new questions"), outcomes
                )
                if o == "not met"
            ),
            "ask more" if seen == "open" else "scale",
        )
        assert a == first and (a != "scale" or seen == "met")

def test_functions_are_told_apart_by_their_code():
    def stage(k, lr=1e-3): return lambda learn, n=2: learn.fit_rce(k, lr) or n
    def other(k): return lambda learn, n=3: learn.fit_rce(k, 1e-3) or n
    assert code_fingerprint(stage(1)) == code_fingerprint(stage(1))
    fs = [
        stage(1),
        stage(2),
        stage(1, 2e-3),
        other(1),
        partial(stage, 1),
        partial(stage, 2),
        stage,
        PointerSelector,
        lambda learn: learn.fit_rce(1),
        lambda learn: learn.fit_sft(1),
    ]
    assert len({code_fingerprint(f) for f in fs}) == len(fs)
    class Recipe:
        def __init__(self, n): self.n = n
        def __call__(self, learn): return learn.fit_rce(self.n)
        def fit(self, learn): return learn
    assert code_fingerprint(Recipe(1)) == code_fingerprint(Recipe(1)) != code_fingerprint(Recipe(2))
