"Proposals, facts, cache, and runs that survive kill -9, in one process or in shards"
import itertools, json, math, os, shutil, subprocess, sys, textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from leverplus.settings import Asking, Guarding, Job, Proposing, check_counts, read_settings, settings_of
from leverplus.core import read_json, rng, stable_hash
from leverplus.decode import best_sequences
from leverplus.embed import EmbedStore
from leverplus.groups import PROPOSAL_COLUMNS, OtherContents, RLData, other_items
from leverplus.losses import inclusion_logp
from leverplus.lvlm import MockScorer, Scored
from leverplus.pools import Pool
from leverplus.rldata_propose import SimilarityPrior, nearest_sets, propose
from leverplus.runs import Busy
from leverplus.rldata_generate import (
    Contents, Generation, NotVerified, TimeLimit, flat_queries, generate, generate_together, run_lock,
    shard_queries, summary_text, verified_text, with_kind,
)
from leverplus.rldata_ask import (
    FactCache, about_items, as_cache, ask, ask_around, check_contents, content_keys, facts_fingerprint,
    item_contents, item_hashes, known_facts, pair_keys, same_scorer, self_test, stored_facts,
)
from leverplus.selector import PointerSelector

def world(n_q=12, n_d=30, K=8, D=6, seed=0):
    "items, pool, store: numbers only"
    g = torch.Generator().manual_seed(seed)
    ids = [*range(n_q), *range(1000, 1000 + n_d)]
    words = "cat dog car bus".split()
    items = pd.DataFrame(
        [
            dict(
                question_id=i,
                image_id=i,
                image_path=f"{i}.png",
                question=f"What is {i}?",
                answers=[words[i % 4]] * 7 + [words[i // 4 % 4]] * 3,
                answer=words[i % 4],
            )
            for i in ids
        ],
        index=ids,
    )
    pool = Pool({q: rng("test", q).choice(np.arange(1000, 1000 + n_d), K, replace=False) for q in range(n_q)})
    return (
        items,
        pool,
        EmbedStore(ids, torch.randn(len(ids), D, generator=g), torch.randn(len(ids), D, generator=g)),
    )

ITEMS, POOL, STORE = world()
QS = list(POOL)

class Scripted:
    "A scorer that counts, and spoils what `spoil` says"
    def __init__(self, spoil=None, seed=0): self.inner, self.spoil, self.asked = MockScorer(seed), spoil, []
    @property
    def fingerprint(self): return self.inner.fingerprint
    def run(self, prompts, targets, generate=True, progress=False):
        self.asked += [(p.question_id, p.pointer, generate) for p in prompts]
        out = self.inner.run(prompts, targets, generate, progress)
        return out if self.spoil is None else [self.spoil(s) for s in out]

def all_logp(logits, S, T=1.):
    "{sequence: Plackett-Luce log-probability}, one pick after the other"
    out = {}
    for s in itertools.permutations(range(len(logits)), S):
        left = list(range(len(logits)))
        lp = 0.
        for i in s:
            z = logits[left] / T
            lp += logits[i] / T - np.log(np.exp(z).sum())
            left.remove(i)
        out[s] = lp
    return out

# ---- search ------------------------------------------------------------------------------------------------

def test_beam_of_full_width_is_the_enumeration():
    logits = np.random.default_rng(0).normal(size=5)
    for S, T in ((1, 1.), (2, 1.3), (3, .7)):
        want = all_logp(logits, S, T)
        seqs, lp = best_sequences(SimilarityPrior(), torch.tensor(logits)[None], 1, S, 99, T)
        n = len(want)
        assert (
            lp[0].isfinite().sum() == n
            and (lp[:, n:] == -torch.inf).all()
            and (lp[:, :n].diff() <= 1e-12).all()
        )
        seqs, lp = seqs[:, :n], lp[:, :n]
        for s, l in zip(seqs[0].tolist(), lp[0].tolist()): assert abs(want[tuple(s)] - l) < 1e-9

def test_samples_follow_the_policy_without_replacement():
    logits = np.array([1.0, 0.0, -0.5, 0.3])
    want = all_logp(logits, 2, 1.3)
    n = 40_000
    noise = -torch.log(
        torch.empty(n, 2, 3, 4, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0))
    )
    seqs, lp = best_sequences(SimilarityPrior(), torch.tensor(logits).expand(n, -1), n, 2, 3, 1.3, noise)
    code = seqs[..., 0] * 4 + seqs[..., 1]
    first = Counter(code[:, 0].tolist())
    second = Counter(code[:, 1].tolist())
    p = {a * 4 + b: math.exp(l) for (a, b), l in want.items()}
    assert (code.sort(-1).values.diff() > 0).all()
    for c, q in p.items():
        assert abs(first[c]/n - q) < .01
        # a second draw without replacement
        assert abs(second[c] / n - sum(o * q / (1 - o) for d, o in p.items() if d != c)) < 0.01
    assert all(
        abs(want[tuple(s)] - l) < 1e-9
        for s, l in zip(seqs[:50].flatten(0, 1).tolist(), lp[:50].flatten().tolist())
    )

@given(st.integers(2, 7), st.integers(1, 3), st.integers(1, 8), st.integers(0, 99))
def test_nearest_sets_against_brute_force(K, S, n, seed):
    if S > K: return
    cos = torch.rand(1, K, generator=torch.Generator().manual_seed(seed))
    seqs, score = nearest_sets(cos, S, n)
    want = sorted(
        (sum(cos[0, i].item() for i in c) for c in itertools.combinations(range(K), S)), reverse=True
    )[:n]
    np.testing.assert_allclose(score[0].numpy(), want, atol=1e-5)
    np.testing.assert_allclose(cos[0][seqs[0]].sum(-1).numpy(), want, atol=1e-5)
    # most similar last
    assert (
        len({frozenset(s) for s in seqs[0].tolist()}) == len(want)
        and (cos[0][seqs[0]].diff(dim=-1) >= 0).all()
    )

# ---- propose -----------------------------------------------------------------------------------------------

def test_default_counts_and_columns():
    rows = propose(POOL, STORE, QS)
    assert list(rows) == list(PROPOSAL_COLUMNS) and rows.question_id.drop_duplicates().tolist() == QS
    assert (
        not rows.duplicated(["question_id", "pointer"]).any()
        and (rows.groupby("question_id").size() == 15).all()
    )
    per = rows.groupby(["gen_method", rows.temperature.fillna(0)]).size() / len(QS)
    assert per.to_dict() == {
        ("beam", 0): 5,
        ("random", 0): 1,
        ("retrieval", 0): 5,
        ("sample", 1.0): 2,
        ("sample", 1.3): 2,
    }
    assert rows.beam_rank.dropna().tolist() == [0, 1, 2, 3, 4]*len(QS)
    assert all(set(p) <= set(POOL[q]) and len(set(p)) == 2 for q, p in zip(rows.question_id, rows.pointer))

@pytest.mark.parametrize("S", [1, 2, 3, 4])
def test_log_probabilities_and_similarity(S):
    rows = propose(POOL, STORE, QS[:3], S=S, proposing=Proposing(scale=5.))
    for r in rows.itertuples():
        cos = (STORE.get(POOL[r.question_id]).double() @ STORE.get(r.question_id).double()).numpy()
        at = [POOL[r.question_id].index(i) for i in r.pointer]
        assert abs(r.similarity_score - cos[at].mean()) < 1e-5
        if r.gen_method == "retrieval":
            assert math.isnan(r.logprob_score) and (np.diff(cos[at]) >= -1e-6).all()
            continue
        logits, T = (
            (0 * cos, 1.0)
            if r.gen_method == "random"
            else (5 * cos, r.temperature if r.gen_method == "sample" else 1.0)
        )
        left = list(range(8))
        lp = 0.
        for i in at:
            lp += logits[i] / T - np.log(np.exp(logits[left] / T).sum())
            left.remove(i)
        assert abs(lp - r.logprob_score) < 1e-5
    np.testing.assert_allclose(
        rows.logprob_score[rows.gen_method == "random"], -math.log(math.perm(8, S)), atol=1e-9
    )

def test_proposals_do_not_depend_on_company():
    a = propose(POOL, STORE, QS)
    b = propose(POOL, STORE, QS[::-1], batch_size=5)
    for q in QS:
        pd.testing.assert_frame_equal(
            a[a.question_id == q].reset_index(drop=True), b[b.question_id == q].reset_index(drop=True)
        )
    assert not propose(POOL, STORE, QS, proposing=Proposing(seed=1)).pointer.equals(a.pointer)

def test_small_and_ragged_pools():
    pool = Pool({0: (1000, 1001, 1002), 1: tuple(range(1003, 1011))})
    rows = propose(pool, STORE, [0, 1])
    # all 3!/1! sequences, none twice
    n = rows.groupby("question_id").size()
    assert n[0] == 6 and n[1] == 15
    assert set(rows.pointer[rows.question_id == 0]) == set(itertools.permutations((1000, 1001, 1002), 2))
    alone = propose(pool, STORE, [0])
    pd.testing.assert_frame_equal(alone, rows[rows.question_id == 0].reset_index(drop=True))

def test_provenance_keeps_the_earlier_method():
    pool = Pool({0: (1000, 1001, 1002)})
    every = Proposing(counts=dict(beam=6, random=6, retrieval=3, temperature={1.0: 6}))
    rows = propose(pool, STORE, [0], proposing=every)
    assert rows.gen_method.tolist() == ["beam"]*6
    some = Proposing(counts=dict(random=6, retrieval=3, temperature={1.0: 6}))
    rows = propose(pool, STORE, [0], proposing=some)
    assert Counter(rows.gen_method) == dict(retrieval=3, sample=3)

def test_a_selector_proposes_what_it_decodes():
    torch.manual_seed(0)
    model = PointerSelector(STORE.dim("mixed"), d_hidden=16, dropout=0.5)
    torch.nn.init.normal_(next(model.parameters()))
    model.train()
    more = Proposing(counts=dict(beam=3, temperature={1.: 2, 1.3: 1}))
    rows = propose(POOL, STORE, QS, policy=model, proposing=more)
    # dropout was off
    assert (
        model.training
        and propose(POOL, STORE, QS, policy=model, proposing=Proposing(counts=dict(beam=3))).pointer.tolist()
        == rows[rows.gen_method == "beam"].pointer.tolist()
    )
    model.eval()
    enc = model.encode(
        STORE.get(QS), STORE.get([POOL[q] for q in QS]), torch.ones(len(QS), 8, dtype=torch.bool)
    )
    with torch.no_grad(): seqs, lp = model.beam(enc, 2, 3)
    got = rows[rows.gen_method == "beam"]
    assert got.pointer.tolist() == [POOL.ids_of(q, s) for q, ss in zip(QS, seqs.tolist()) for s in ss]
    np.testing.assert_allclose(got.logprob_score, lp.flatten().numpy(), atol=1e-4)
    one = rows[rows.temperature == 1.0]
    loc = torch.tensor([POOL.local(q, p) for q, p in zip(one.question_id, one.pointer)]).view(len(QS), 2, 2)
    with torch.no_grad():
        np.testing.assert_allclose(
            model.logp(enc, loc, torch.ones_like(loc, dtype=torch.bool)).flatten().numpy(),
            one.logprob_score,
            atol=1e-4,
        )

def test_a_selector_with_stop_proposes_sequences_of_the_asked_length():
    torch.manual_seed(0)
    model = PointerSelector(STORE.dim("mixed"), d_hidden=8, max_shots=4, stop=True).eval()
    torch.nn.init.normal_(model.stop.bias)
    rows = propose(POOL, STORE, QS[:3], S=3, policy=model)
    assert (rows.groupby("question_id").size() == 15).all() and (rows.pointer.map(len) == 3).all()
    enc = model.encode(
        STORE.get(QS[:3]), STORE.get([POOL[q] for q in QS[:3]]), torch.ones(3, 8, dtype=torch.bool)
    )
    one = rows[rows.temperature == 1.0]
    loc = torch.tensor([POOL.local(q, p) for q, p in zip(one.question_id, one.pointer)]).view(3, 2, 3)
    with torch.no_grad():
        np.testing.assert_allclose(
            model.logp(enc, loc, stop=False).flatten().numpy(), one.logprob_score, atol=1e-4
        )

def test_kappa_weighs_what_was_drawn():
    n = 1500
    store = EmbedStore(
        [*range(n), *range(5000, 5005)],
        *[torch.cat([torch.ones(n, 4), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))])] * 2
    )
    pool = Pool({q: tuple(range(5000, 5005)) for q in range(n)})
    proposing = Proposing(counts=dict(beam=2, temperature={1.3: 3}, random=2), scale=2.)
    rows = propose(pool, store, range(n), proposing=proposing)
    assert rows.kappa.isna().equals(rows.gen_method == "beam")
    drawn = rows[rows.temperature == 1.3]
    p = np.exp(drawn.logprob_score)
    w = (
        (
            p
            / np.exp(
                inclusion_logp(
                    torch.tensor(drawn.logprob_score.to_numpy()), torch.tensor(drawn.kappa.to_numpy())
                ).numpy()
            )
        )
        .groupby(drawn.question_id)
        .sum()
    )
    cos = (store.get(pool[0]).double() @ store.get(0).double()).numpy()
    every = all_logp(2 * cos, 2, 1.3)
    beams = rows[(rows.question_id == 0) & (rows.gen_method == "beam")].pointer
    # what was left to draw, without bias
    left = 1 - sum(math.exp(every[pool.local(0, b)]) for b in beams)
    assert abs(w.mean() - left) < 5 * w.std() / n**0.5
    whole = propose(pool, store, [0], proposing=Proposing(counts=dict(random=20)))
    assert (whole.kappa == -np.inf).all()

@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: propose(POOL, STORE, [0], S=8), "question_id 0: its pool has 8"),
        (lambda: propose(POOL, STORE, [0, 0]), "question_id 0 stands twice"),
        (lambda: propose(POOL, STORE, [77]), "77"),
        (lambda: propose(POOL, STORE, []), "0 queries"),
        (lambda: propose(POOL, STORE, [0], S=-1), "S -1: wanted a whole number >= 0"),
        (lambda: check_counts(dict(beams=1)), "beams"),
        (lambda: check_counts(dict(beam=-1)), "integers >= 0"),
        (lambda: check_counts(dict(beam=0)), "at least one"),
        (lambda: check_counts(dict(temperature={0.0: 1})), "> 0"),
    ],
)
def test_bad_requests(call, says):
    with pytest.raises((ValueError, KeyError), match=says): call()

# ---- ask and cache -----------------------------------------------------------------------------------------

PAIRS = propose(POOL, STORE, QS)[["question_id", "pointer"]]

def test_facts_are_whole_and_in_order():
    facts = ask(PAIRS, MockScorer(), ITEMS, window=7)
    assert facts.pointer.tolist() == PAIRS.pointer.tolist() and not facts.eval_failed.any()
    assert ((facts.vqa_acc_score > 0) == (facts.vqa_correct == 1)).all()
    assert (facts.vqa_eval_mode == "official").all()
    assert facts.scorer.unique().tolist() == [facts_fingerprint(MockScorer())]
    pd.testing.assert_frame_equal(ask(PAIRS[::-1], MockScorer(), ITEMS), facts[::-1].reset_index(drop=True))
    again = pd.concat([PAIRS, PAIRS])
    counting = Scripted()
    assert len(ask(again, counting, ITEMS)) == 2 * len(PAIRS) and len(counting.asked) == len(PAIRS)

def test_zero_shot_is_an_empty_pointer():
    facts = ask(pd.DataFrame(dict(question_id=QS, pointer=[()] * len(QS))), MockScorer(), ITEMS)
    assert facts.pointer.tolist() == [()] * len(QS) and facts.vqa_gt_prob.notna().all()

def test_a_failure_has_no_labels_and_is_not_cached():
    spoil = lambda s: (
        replace(s, text=None, logprobs=(), gt_prob=math.nan, error="OSError: no image")
        if s.question_id == 3
        else replace(s, gt_prob=math.nan) if s.question_id == 4 else s
    )
    cache = FactCache()
    facts = ask(PAIRS, Scripted(spoil), ITEMS, cache)
    bad = facts[facts.eval_failed]
    assert set(bad.question_id) == {3, 4}
    assert bad.filter(like="vqa_").isna().all(axis=None)
    assert set(bad.error) == {"OSError: no image", "vqa_gt_prob is nan"}
    assert len(cache) == (~facts.eval_failed).sum()
    mended = Scripted()
    full = ask(PAIRS, mended, ITEMS, cache)
    assert {q for q, _, _ in mended.asked} == {3, 4} and not full.eval_failed.any()

def test_probability_first_text_later():
    cache = FactCache()
    scorer = Scripted()
    a = ask(PAIRS, scorer, ITEMS, cache, generate=False)
    assert a.vqa_gt_prob.notna().all() and a.vqa_acc_score.isna().all() and not a.eval_failed.any()
    b = ask(PAIRS[:20], scorer, ITEMS, cache)
    assert b.vqa_acc_score.notna().all() and len(scorer.asked) == len(PAIRS) + 20 and len(cache) == len(PAIRS)
    c = ask(PAIRS, scorer, ITEMS, cache, generate=False)
    assert len(scorer.asked) == len(PAIRS) + 20 and c.vqa_acc_score.notna().sum() == 20

def test_facts_without_a_scorer():
    own = FactCache()
    facts = ask(PAIRS, Scripted(), ITEMS, own)
    table = as_cache(PAIRS.join(facts.drop(columns=["question_id", "pointer"])))
    again = pd.concat([PAIRS[::-1], PAIRS[:2]], ignore_index=True)
    pd.testing.assert_frame_equal(
        ask(again, None, ITEMS, table), pd.concat([facts[::-1], facts[:2]], ignore_index=True)
    )
    assert as_cache(table) is table
    with pytest.raises(KeyError, match=r"question_id 0, pointer \(1000,\): not among"):
        ask(pd.DataFrame(dict(question_id=[0], pointer=[(1000,)])), None, ITEMS, table)
    says = r"180 of 180 facts \(first: question_id 0, pointer .*\) are about other questions, answers or pictures"
    with pytest.raises(ValueError, match=says): ask(PAIRS, None, ITEMS.assign(question="?"), own)
    ask(PAIRS, Scripted(), ITEMS, table, Asking(style="chat"))
    with pytest.raises(ValueError, match="of 2 scorers"): ask(PAIRS, None, ITEMS, table)

def test_scorers_styles_and_weights_do_not_mix():
    cache = FactCache()
    kws = [dict(), dict(style="chat"), dict(answer_weight="count3"), dict(evaluator="lmms")]
    for kw in kws:
        s = Scripted()
        ask(PAIRS, s, ITEMS, cache, Asking(**kw))
        assert len(s.asked) == len(PAIRS)
    s = Scripted(seed=1)
    ask(PAIRS, s, ITEMS, cache)
    assert len(s.asked) == len(PAIRS) and len(cache) == 5 * len(PAIRS) and len(cache.scorers) == 5

def test_cache_on_disk(tmp_path):
    facts = ask(PAIRS, MockScorer(), ITEMS, FactCache(tmp_path / "c"), window=40)
    files = sorted((tmp_path / "c").iterdir())
    assert len(files) == math.ceil(len(PAIRS) / 40)
    quiet = Scripted()
    pd.testing.assert_frame_equal(ask(PAIRS, quiet, ITEMS, FactCache(tmp_path / "c")), facts)
    assert not quiet.asked
    one = FactCache(
        FactCache(tmp_path / "c").save(
            tmp_path / "one.parquet", drop=("vqa_gt_logprobs", "vqa_raw_generation")
        )
    )
    got = ask(PAIRS, quiet, ITEMS, one)
    assert one.readonly
    assert not quiet.asked
    assert got.vqa_gt_prob.equals(facts.vqa_gt_prob)
    assert got.vqa_gt_logprobs.isna().all()
    stamp = (tmp_path / "one.parquet").stat().st_mtime_ns
    ask(PAIRS, MockScorer(1), ITEMS, one)
    assert len(one) == 2 * len(PAIRS) and (tmp_path / "one.parquet").stat().st_mtime_ns == stamp
    with pytest.raises(FileNotFoundError, match="none.parquet"): FactCache(tmp_path/"none.parquet")
    with pytest.raises(ValueError, match="cannot be dropped"):
        one.save(tmp_path / "x.parquet", drop=("scorer",))
    files[0].write_bytes(files[0].read_bytes()[:99])
    with pytest.raises(ValueError, match=files[0].name): FactCache(tmp_path/"c")

def test_other_texts_under_the_same_ids_are_asked_again():
    cache = FactCache()
    ask(PAIRS, MockScorer(), ITEMS, cache)
    for c, v in dict(question="Who?", answer="hat", image_id=5).items():
        cache.warned = False
        other = ITEMS.assign(**{c: v})
        with pytest.warns(UserWarning, match="180 of 180 facts"): facts = ask(PAIRS, MockScorer(), other, cache)
        pd.testing.assert_frame_equal(facts, ask(PAIRS, MockScorer(), other))
        quiet = Scripted()
        pd.testing.assert_frame_equal(ask(PAIRS, quiet, other, cache), facts)      # the newest wins
        assert not quiet.asked and len(cache) == len(PAIRS)

def test_newest_fact_wins_and_parts_stay_few():
    cache = FactCache()
    n = 300
    r = np.random.default_rng(0)
    ptr = [tuple(x) for x in r.integers(0, 50, (n, 2)).tolist()]
    want = {}
    for i, p in enumerate(ptr):
        cache.add(pd.DataFrame(dict(question_id=[1], pointer=[p], vqa_acc_score=[i / n], scorer="s")))
        want[p] = i / n
    got = cache.lookup(pd.DataFrame(dict(question_id=1, pointer=list(want))), "s")
    assert got.vqa_acc_score.tolist() == list(want.values()) and len(cache.parts) < 12

@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 5), st.lists(st.integers(0, 5), max_size=3).map(tuple), st.sampled_from("ab")
        ),
        min_size=1,
        max_size=40,
    )
)
def test_keys_tell_scorer_query_and_order(rows):
    keys = pair_keys([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])
    assert len(set(keys.tolist())) == len(set(rows))
    assert pair_keys([rows[0][0]], [rows[0][1]], rows[0][2])[0] == keys[0]

def test_content_keys_see_every_text():
    q, p = [0, 1], [(1000, 1001), ()]
    base = content_keys(ITEMS, q, p)
    changed = ITEMS.copy()
    changed.at[1001, "answer"] = "hat"
    assert (content_keys(changed, q, p) != base).tolist() == [True, False]
    with pytest.raises(KeyError, match="question_id 5555"): item_hashes(ITEMS, [0, 5555])

def test_unknown_items_and_confused_scorers():
    with pytest.raises(KeyError, match="question_id 0"): ask(PAIRS, MockScorer(), ITEMS.drop(0))
    class Swaps(Scripted):
        def run(self, *a, **k): return super().run(*a, **k)[::-1]
    with pytest.raises(ValueError, match="in order"): ask(PAIRS, Swaps(), ITEMS)

# ---- pictures that are replaced ----------------------------------------------------------------------------

class Looks:
    "A scorer whose answers follow from the bytes of the pictures that it is shown; it counts what it is asked"
    fingerprint, tolerance = "looks", 0.
    def __init__(self, stop=math.inf): self.stop, self.asked = stop, []
    def run(self, prompts, targets, generate=True, progress=False):
        return [self.one(p, generate) for p in prompts]
    def one(self, p, generate):
        if len(self.asked) >= self.stop: raise KeyboardInterrupt
        self.asked.append((p.question_id, p.pointer))
        try: seen = [Path(image).read_bytes() for image in p.images]
        except OSError as e: return Scored(p.question_id, p.pointer, error=f"OSError: {e}")
        prob = float(rng("looks", seen).random())
        return Scored(p.question_id, p.pointer, "cat" if generate else None, (math.log(prob),), prob)

def album(folder, items=ITEMS):
    "Items whose pictures are files"
    folder.mkdir()
    for i in items.index: (folder/f"{i}.png").write_bytes(f"picture {i}".encode())
    return items.assign(image_path=[str(folder/f"{i}.png") for i in items.index])

def replace_pictures(items, *ids):
    for i in ids: Path(items.image_path[i]).write_bytes(f"another picture {i}".encode())

def put_back(items, *ids):
    for i in ids: Path(items.image_path[i]).write_bytes(f"picture {i}".encode())

def shows(pairs, *ids): return [bool({q, *p} & set(ids)) for q, p in zip(pairs.question_id, pairs.pointer)]

def test_content_is_of_the_bytes_of_pictures(tmp_path):
    items = album(tmp_path/"a")
    was = content_keys(items, PAIRS.question_id, PAIRS.pointer)
    def now(frame): return content_keys(frame, PAIRS.question_id, PAIRS.pointer)
    for i in (3, 1002):
        replace_pictures(items, i)
        assert (now(items) != was).tolist() == shows(PAIRS, i)
        put_back(items, i)
    assert (now(items) == was).all()
    assert (now(items.assign(image_id=7)) == was).all()                  # a name is no content
    shutil.copytree(tmp_path/"a", tmp_path/"b")
    assert (now(items.assign(image_path=items.image_path.str.replace("/a/", "/b/"))) == was).all()
    turned = items.copy()
    turned.loc[[0, 1], "image_path"] = items.loc[[1, 0], "image_path"].to_numpy()
    assert (now(turned) != was).tolist() == shows(PAIRS, 0, 1)

def test_items_without_a_picture_have_the_hashes_that_they_had():
    "Facts of worlds of texts stay valid, and the number of a picture counts where there is nothing else"
    def hashes(frame): return item_hashes(frame, frame.index[:3]).tolist()
    r = [ITEMS.loc[i] for i in range(3)]
    want = [stable_hash(x.question, int(x.image_id), x.answer, [str(a) for a in x.answers]) for x in r]
    assert hashes(ITEMS.assign(image_path=None)) == want
    assert hashes(ITEMS.drop(columns="image_path")) == want
    assert hashes(ITEMS.assign(image_path=None, image_id=ITEMS.image_id.astype("float64"))) == want
    unread = hashes(ITEMS)
    assert len({*unread, *want, *hashes(ITEMS.assign(image_id=9))}) == 9
    named = hashes(ITEMS.drop(columns="image_path").assign(image_id="VizWiz_val_00000042.jpg"))
    assert len({*named, *hashes(ITEMS.drop(columns=["image_path", "image_id"])), *want}) == 9

def test_contents_say_what_has_changed(tmp_path):
    items = album(tmp_path/"a")
    was = item_contents(items, [0, 1, 2, 1000])
    replace_pictures(items, 1, 1000)
    items.at[2, "answers"] = ["hat"]*10
    now = item_contents(items, [0, 1, 2, 1000])
    assert (was.picture != now.picture).tolist() == [False, True, False, True]
    assert (was.text != now.text).tolist() == [False, False, True, False]
    assert other_items(was, now) == (
        "the pictures of question_id 1, 1000 (2 of 4 items) and question or answers of question_id 2 (1 of 4 items)")
    assert item_contents(items.assign(image_path=None), [0]).picture.isna().all()
    Path(items.image_path[0]).unlink()
    assert item_contents(items, [0]).picture.tolist() == ["unreadable"]

def knowing(kind, folder, items):
    "Somewhere that facts are kept, with the facts of all pairs"
    facts = FactCache(folder/"facts" if kind in ("folder", "file") else None)
    got = ask(PAIRS, Looks(), items, facts)
    if kind == "folder": return FactCache(folder/"facts")
    if kind == "file": return FactCache(facts.save(folder/"facts.parquet"))
    return as_cache(got) if kind == "frame" else facts

@pytest.mark.parametrize("kind", ["memory", "folder", "file", "frame"])
def test_facts_about_replaced_pictures_are_asked_again(tmp_path, kind):
    items = album(tmp_path/"a")
    cache = knowing(kind, tmp_path, items)
    replace_pictures(items, 3, 1002)
    scorer = Looks()
    n = sum(shows(PAIRS, 3, 1002))
    with pytest.warns(UserWarning) as said: facts = ask(PAIRS, scorer, items, cache, window=40)
    assert [f"{n} of 180 facts" in str(w.message) for w in said] == [True]
    assert scorer.asked == [(q, p) for q, p, x in zip(PAIRS.question_id, PAIRS.pointer, shows(PAIRS, 3, 1002)) if x]
    pd.testing.assert_frame_equal(facts, ask(PAIRS, Looks(), items), check_dtype=False)
    again = Looks()
    pd.testing.assert_frame_equal(ask(PAIRS, again, items, cache), facts)
    assert not again.asked and len(cache) == len(PAIRS)

def test_replaced_pictures_and_nobody_to_ask(tmp_path):
    items = album(tmp_path/"a")
    cache = knowing("file", tmp_path, items)
    facts = ask(PAIRS, None, items, cache)
    replace_pictures(items, 1002)
    n = sum(shows(PAIRS, 1002))
    says = f"facts.parquet: {n} of 180 facts .* are about other questions, answers or pictures"
    with pytest.raises(ValueError, match=says): ask(PAIRS, None, items, cache)
    whole = [not x for x in shows(PAIRS, 1002)]
    pd.testing.assert_frame_equal(ask(PAIRS[whole], None, items, cache), facts[whole].reset_index(drop=True))
    imported = as_cache(facts.drop(columns="content"))                     # nobody knows what these are about
    assert ask(PAIRS, None, items, imported).vqa_gt_prob.tolist() == facts.vqa_gt_prob.tolist()
    assert about_items(facts, items).tolist() == whole
    assert about_items(facts.assign(content=0), items).all()
    assert about_items(facts, items.drop(1002)).tolist() == whole          # an item that is not there is none of these

def test_facts_of_runs_know_what_they_are_about(tmp_path):
    "What `generate` wrote, `known_facts`, `stored_facts` and `ask_around` pass on is compared, too"
    items = album(tmp_path/"a")
    data = made(tmp_path/"r", QS, items, POOL, Looks(), STORE, test=0)
    assert (data.rows.content == content_keys(items, data.rows.question_id, data.rows.pointer)).all()
    replace_pictures(items, 1002)
    known = known_facts([tmp_path/"r"], facts_fingerprint(Looks()))
    pairs = data.rows[["question_id", "pointer"]]
    n = sum(shows(pairs, 1002))
    assert 0 < n < len(pairs)
    scorer = Looks()
    with pytest.warns(UserWarning, match=f"{n} of {len(pairs)} facts"):
        facts = ask_around(pairs, scorer, items, known, FactCache())
    assert len(scorer.asked) == n
    pd.testing.assert_frame_equal(facts, ask(pairs, Looks(), items), check_dtype=False)
    with pytest.raises(ValueError, match=f"old groups: {n} of {len(pairs)} facts"):
        check_contents(data.rows, items, "old groups")

def test_what_cannot_be_read_is_a_failure_and_equal_to_nothing_readable(tmp_path):
    items = album(tmp_path/"a")
    file = Path(items.image_path[1002])
    file.unlink()
    lost = shows(PAIRS, 1002)
    cache = FactCache()
    facts = ask(PAIRS, Looks(), items, cache)
    assert facts.eval_failed.tolist() == lost and facts.error[lost].str.contains("1002.png").all()
    put_back(items, 1002)
    scorer = Looks()
    full = ask(PAIRS, scorer, items, cache)
    assert len(scorer.asked) == sum(lost) and not full.eval_failed.any()
    file.unlink()                                        # gone again: what was seen then is not what is there now
    with pytest.warns(UserWarning, match=f"{sum(lost)} of 180"): gone = ask(PAIRS, Looks(), items, cache)
    assert gone.eval_failed.tolist() == lost
    put_back(items, 1002)
    pd.testing.assert_frame_equal(ask(PAIRS, Looks(stop=0), items, cache), full)

def test_a_picture_replaced_while_it_is_asked_about(tmp_path):
    items = album(tmp_path/"a")
    often = int(PAIRS.pointer.explode().mode()[0])
    class Late(Looks):
        def run(self, prompts, *a, **k):
            out = super().run(prompts, *a, **k)
            if len(self.asked) == 80: replace_pictures(items, often)
            return out
    cache = FactCache()
    facts = ask(PAIRS, Late(), items, cache, window=40)
    window = np.arange(len(PAIRS))//40
    assert {0, 1, 2, 3} == set(window[shows(PAIRS, often)])
    assert facts.eval_failed.tolist() == ((window == 1) & shows(PAIRS, often)).tolist()
    assert set(facts.error[facts.eval_failed]) == {"a picture was replaced while it was asked about"}
    with pytest.warns(UserWarning, match="about other"): now = ask(PAIRS, Looks(), items, cache)
    pd.testing.assert_frame_equal(now, ask(PAIRS, Looks(), items), check_dtype=False)

SMALL = dict(shots=(1, 2), window=4, test=0)

def killed(path, items, stop=100, **kw):
    with pytest.raises(KeyboardInterrupt): made(path, QS, items, POOL, Looks(stop), STORE, **SMALL | kw)

@pytest.mark.parametrize("shard", [None, (0, 1)])
def test_a_killed_run_is_not_continued_with_other_pictures(tmp_path, shard):
    items = album(tmp_path/"a")
    go = dict(SMALL, shard=shard)
    whole = made(tmp_path/"whole", QS, items, POOL, Looks(), STORE, **go)
    killed(tmp_path/"r", items, shard=shard)
    shown = sorted(set(QS).union(*(POOL[q] for q in QS)))
    replace_pictures(items, 3, 7, 1002)
    asks_nobody = Looks(stop=0)
    with pytest.raises(OtherContents) as e: made(tmp_path/"r", QS, items, POOL, asks_nobody, STORE, **go)
    assert f"the pictures of question_id 3, 7, 1002 (3 of {len(shown)} items) are not those" in str(e.value)
    reworded = items.assign(question=items.question.where(items.index != 5, "Who?"))
    put_back(items, 3, 7, 1002)
    with pytest.raises(OtherContents, match=r"question or answers of question_id 5 \(1 of"):
        made(tmp_path/"r", QS, reworded, POOL, asks_nobody, STORE, **go)
    done = made(tmp_path/"r", QS, items, POOL, Looks(), STORE, **go)      # all as it was: the same rows
    pd.testing.assert_frame_equal(done.rows, whole.rows)
    replace_pictures(items, 3)
    with pytest.raises(OtherContents): made(tmp_path/"r", QS, items, POOL, asks_nobody, STORE, **go)

def test_a_picture_that_was_not_readable_may_be_mended(tmp_path):
    items = album(tmp_path/"a")
    whole = made(tmp_path/"whole", QS, items, POOL, Looks(), STORE, **SMALL)
    Path(items.image_path[1002]).unlink()
    broken = made(tmp_path/"r", QS, items, POOL, Looks(), STORE, **SMALL)
    assert broken.rows.eval_failed.tolist() == shows(broken.rows, 1002)
    put_back(items, 1002)
    scorer = Looks()
    mended = made(tmp_path/"r", QS, items, POOL, scorer, STORE, **SMALL)
    pd.testing.assert_frame_equal(mended.rows, whole.rows)
    assert len(scorer.asked) == broken.rows.eval_failed.sum()
    replace_pictures(items, 1002)                                          # the table has learned it
    with pytest.raises(OtherContents, match="question_id 1002 "):
        made(tmp_path/"r", QS, items, POOL, Looks(), STORE, **SMALL)
    Path(items.image_path[1002]).unlink()                                  # gone is no other: all its rows are there
    pd.testing.assert_frame_equal(made(tmp_path/"r", QS, items, POOL, Looks(0), STORE, **SMALL).rows, whole.rows)

def test_pictures_replaced_while_a_run_goes_on(tmp_path):
    items = album(tmp_path/"a")
    class Late(Looks):
        def run(self, prompts, *a, **k):
            out = super().run(prompts, *a, **k)
            if len(self.asked) == 2*4*23: replace_pictures(items, 9)      # two windows are asked about
            return out
    with pytest.raises(OtherContents, match="question_id 9 "):
        made(tmp_path/"r", QS, items, POOL, Late(), STORE, **SMALL)
    assert len(list((tmp_path/"r").glob("part-*.parquet"))) == 2

def test_a_kill_between_manifest_and_contents(tmp_path, monkeypatch):
    "Whatever was written last, the next start goes on, or says that nobody can know"
    items = album(tmp_path/"a")
    real = Contents.hold
    def dies(self, *a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(Contents, "hold", dies)
    with pytest.raises(KeyboardInterrupt): made(tmp_path/"r", QS, items, POOL, Looks(), STORE, **SMALL)
    assert sorted(f.name for f in (tmp_path/"r").glob("[!.]*")) == ["manifest.json"]
    monkeypatch.setattr(Contents, "hold", real)
    replace_pictures(items, 3)                                             # nothing was made of the old ones
    made(tmp_path/"r", QS, items, POOL, Looks(), STORE, **SMALL)
    (tmp_path/"r"/"contents.parquet").unlink()
    with pytest.raises(OtherContents, match="no contents.parquet beside"):
        made(tmp_path/"r", QS, items, POOL, Looks(), STORE, **SMALL)

def test_shards_of_other_pictures_are_never_put_together(tmp_path):
    items = album(tmp_path/"a")
    def go(path, i): return made(path, QS, items, POOL, Looks(), STORE, shard=(i, 2), **SMALL)
    first, second = (set().union(*(POOL[q] for q in shard_queries(QS, (i, 2)))) for i in range(2))
    shared = min(first & second)
    go(tmp_path/"one", 0)
    shutil.copytree(tmp_path/"one", tmp_path/"both")
    replace_pictures(items, shared)
    with pytest.raises(OtherContents, match=f"question_id {shared} "): go(tmp_path/"one", 1)     # the same folder
    go(tmp_path/"two", 1)                                                                     # another machine
    shutil.copytree(tmp_path/"two", tmp_path/"both", dirs_exist_ok=True)
    says = f"question_id {shared} .* in contents-001of002.parquet are not those of the shards before it"
    with pytest.raises(OtherContents, match=says): RLData.load(tmp_path/"both")
    put_back(items, shared)
    go(tmp_path/"one", 1)
    assert RLData.load(tmp_path/"one").queries == QS

# ---- self-test ---------------------------------------------------------------------------------------------

class Knows:
    "Probabilities that agree with what it says, or (sign=-1) that contradict it"
    fingerprint = "knows"
    def __init__(self, sign=1): self.sign = sign
    def run(self, prompts, targets, generate=True, progress=False):
        out = MockScorer().run(prompts, targets, True, False)
        likes = {s.question_id: s.text for s in out}
        if not generate:
            return [
                replace(
                    s,
                    logprobs=tuple(
                        -1.0 if (t == self.said[s.question_id]) == (self.sign > 0) else -5.0 for t in tg.texts
                    ),
                )
                for s, tg in zip(out, targets)
            ]
        self.said = likes
        return [
            replace(
                s,
                gt_prob=0.5
                + self.sign * (0.4 if s.text in t.texts[:1] else 0.0 if s.text in t.texts else -0.4),
            )
            for s, t in zip(out, targets)
        ]

# ---- what others asked -------------------------------------------------------------------------------------

def test_facts_are_read_wherever_they_lie(tmp_path):
    own = facts_fingerprint(MockScorer())
    run = made(tmp_path/"run", QS, ITEMS, POOL, MockScorer(fails=[3]), STORE, test=0)
    for i in range(2): made(tmp_path/"shards", QS, ITEMS, POOL, MockScorer(), STORE, test=0, shard=(i, 2))
    cache = FactCache(tmp_path/"facts")
    chat = Asking(style="chat")
    ask(PAIRS[:20], MockScorer(), ITEMS, cache, chat)
    ask(PAIRS[20:30], MockScorer(), ITEMS, cache, generate=False)       # these have no answer
    ask(PAIRS[30:35], MockScorer(), ITEMS, cache)
    cache.save(tmp_path/"all.parquet")
    assert len(stored_facts(tmp_path/"run")) == len(run) == len(stored_facts(tmp_path/"shards"))
    assert len(stored_facts(tmp_path/"facts")) == len(stored_facts(str(tmp_path/"all.parquet"))) == 35
    known = known_facts([tmp_path/"run"], own)
    assert len(known) == (~run.rows.eval_failed).sum() == 15*11
    assert known.scorers == [own]
    assert len(known_facts([tmp_path/"facts"], own)) == 5
    assert len(known_facts([tmp_path/"facts"], facts_fingerprint(MockScorer(), chat))) == 20
    assert len(known_facts([tmp_path/"run", str(tmp_path/"shards"), tmp_path/"all.parquet"], own)) == 15*12
    assert len(known_facts([], own)) == 0
    nowhere = tmp_path/"nowhere"
    with pytest.raises(FileNotFoundError, match="nowhere: no such facts"): known_facts([nowhere], own)

SOME_PAIRS = st.lists(st.integers(0, 39), unique=True, max_size=15)

@settings(max_examples=30, deadline=None)
@given(SOME_PAIRS, SOME_PAIRS, SOME_PAIRS)
def test_only_what_nobody_knows_is_asked(wanted, elsewhere, here):
    asking = Asking(style="chat")
    extra = FactCache()
    own = FactCache()
    ask(PAIRS.iloc[elsewhere], MockScorer(), ITEMS, extra, asking)
    ask(PAIRS.iloc[here], MockScorer(), ITEMS, own, asking)
    s = Scripted()
    pairs = PAIRS.iloc[wanted]
    facts = ask_around(pairs, s, ITEMS, extra, own, asking)
    pd.testing.assert_frame_equal(facts, ask(pairs, MockScorer(), ITEMS, asking=asking), check_dtype=False)
    assert {(q, p) for q, p, _ in s.asked} == {
        (PAIRS.question_id[i], PAIRS.pointer[i]) for i in set(wanted) - set(elsewhere) - set(here)
    }
    assert len(extra) == len(elsewhere)
    assert len(own) == len((set(wanted) - set(elsewhere)) | set(here))

def test_facts_of_other_texts_are_not_believed():
    extra = FactCache()
    ask(PAIRS[:5], MockScorer(), ITEMS, extra)
    other = ITEMS.assign(question="Who?")
    s = Scripted()
    with pytest.warns(UserWarning, match="5 of 5 facts"): facts = ask_around(PAIRS[:5], s, other, extra, FactCache())
    assert len(s.asked) == 5
    pd.testing.assert_frame_equal(facts, ask(PAIRS[:5], MockScorer(), other))

def test_facts_of_two_scorers_are_not_mixed(tmp_path):
    data = made(tmp_path/"run", QS[:3], ITEMS, POOL, MockScorer(), STORE, test=0)
    assert same_scorer(data, MockScorer()) == facts_fingerprint(MockScorer())
    for scorer, asking in (
        (MockScorer(1), Asking()),
        (MockScorer(), Asking(style="chat")),
        (MockScorer(), Asking(evaluator="lmms")),
        (MockScorer(), Asking(answer_weight="count3")),
    ):
        with pytest.raises(ValueError, match="run: its facts are of scorer .* name those that it was made"):
            same_scorer(data, scorer, asking)
    assert same_scorer(data, MockScorer()) == data.manifest["scorers"][0]
    nothing = RLData(data.rows.assign(scorer=None, eval_failed=True), data.pool)
    assert same_scorer(nothing, MockScorer(1)) == facts_fingerprint(MockScorer(1))

def test_self_test_tells_sense_from_nonsense():
    good, bad = (self_test(Knows(s), ITEMS, POOL, n=12) for s in (1, -1))
    assert good["greedy_wins"] == 1
    assert bad["greedy_wins"] == 0
    assert good["spearman"] > 0.8
    assert bad["spearman"] < -0.8
    assert good["asked"] == 12
    assert "What is" in good["prompt"]

def test_self_test_without_variation_has_no_number():
    same = Scripted(lambda s: replace(s, text="cat", gt_prob=0.5))
    got = self_test(same, ITEMS, POOL, n=5)
    assert got["spearman"] is None and got["greedy_wins"] is None and got["compared"] == 0

# ---- generate ----------------------------------------------------------------------------------------------

RUN = dict(shots=(1, 2), window=4, test=5, progress=False)

def grouped(**flat):
    "Settings by their flat names, as `generate` takes them"
    job = settings_of(Job, **flat)
    return dict(proposing=job.proposing, asking=job.asking, guarding=job.guarding)

def made(
    path, queries, items, pool, scorer, store, policy=None, cache=None, shard=None, progress=False, **flat
):
    "`generate` with settings by their flat names"
    kw = grouped(**flat) | dict(cache=cache, shard=shard, progress=progress)
    return generate(path, queries, items, pool, scorer, store, policy, **kw)

def test_generate_is_propose_then_ask(tmp_path):
    data = made(tmp_path / "r", QS, ITEMS, POOL, MockScorer(), STORE, **RUN)
    data.validate(ITEMS)
    assert data.shots == (1, 2)
    assert data.queries == QS
    assert data.manifest["complete"]
    assert data.manifest["settings"]["proposing"]["shots"] == [1, 2]
    assert data.manifest["self_test"]["asked"] == 5
    assert data.pool.ids == POOL.ids
    assert data.manifest["scorers"] == [facts_fingerprint(MockScorer())]
    for S in (1, 2):
        want = propose(POOL, STORE, QS, S)
        got = data.rows[data.rows.pointer.map(len) == S]
        assert got.pointer.tolist() == want.pointer.tolist()
    pd.testing.assert_frame_equal(
        made(tmp_path / "r", QS, ITEMS, POOL, Scripted(), STORE, **RUN).rows, data.rows
    )

def test_a_finished_run_asks_nothing(tmp_path):
    made(tmp_path / "r", QS, ITEMS, POOL, MockScorer(), STORE, **RUN)
    quiet = Scripted()
    made(tmp_path / "r", QS, ITEMS, POOL, quiet, STORE, **RUN)
    assert not quiet.asked

@pytest.mark.parametrize(
    "change, names",
    [
        (dict(seed=1), ["proposing.seed"]),
        (dict(shots=(2,)), ["proposing.shots"]),
        (dict(counts=dict(beam=2)), ["proposing.counts.beam", "proposing.counts.temperature.1.3"]),
        (dict(window=5), ["guarding.window"]),
        (dict(scale=3.0), ["policy", "proposing.scale"]),
        (dict(queries=QS[:6]), ["queries", "query_ids", "pool"]),
        (dict(scorer=MockScorer(1)), ["scorer"]),
        (dict(style="chat"), ["asking.style", "scorer"]),
        (dict(evaluator="lmms"), ["asking.evaluator", "scorer"]),
        (dict(two_stage=dict(top=3)), ["proposing.two_stage.top"]),
        (dict(policy=PointerSelector(12, d_hidden=8)), ["policy", "proposer"]),
    ],
)
def test_other_settings_are_refused_and_named(tmp_path, change, names):
    base = dict(queries=QS, items=ITEMS, pool=POOL, scorer=MockScorer(), store=STORE, **RUN)
    made(tmp_path / "r", **base)
    with pytest.raises(ValueError, match="belong to other settings") as e:
        made(tmp_path / "r", **base | change)
    assert all(f"{n}: there" in str(e.value) for n in names) and "kind: there" not in str(e.value)

def test_the_settings_of_a_run_lie_there_and_are_read_back(tmp_path):
    groups = grouped(shots=(1, 2), seed=3, style="chat", two_stage=dict(top=2), window=5, test=4, verify=1)
    path = tmp_path/"r"
    data = generate(path, QS, ITEMS, POOL, Tampered(), STORE, **groups, progress=False)
    there = json.loads((path/"manifest.json").read_text())["settings"]
    assert read_settings(Proposing, there["proposing"]) == with_kind(groups["proposing"], STORE)
    assert read_settings(Asking, there["asking"]) == groups["asking"]
    assert there["guarding"] == dict(window=5)
    again = groups | dict(proposing=read_settings(Proposing, there["proposing"]))
    asks_nobody = Tampered()
    same = generate(path, QS, ITEMS, POOL, asks_nobody, STORE, **again, progress=False)
    pd.testing.assert_frame_equal(same.rows, data.rows)
    assert not asks_nobody.asked

@pytest.mark.parametrize("more", [dict(test=0), dict(test=9), dict(max_failed=.5), dict(verify=3), dict(seconds=0)])
def test_what_no_row_depends_on_may_change_on_the_way(tmp_path, more):
    data = made(tmp_path/"r", QS, ITEMS, POOL, Tampered(), STORE, **RUN)
    asks_nobody = Tampered()
    again = made(tmp_path/"r", QS, ITEMS, POOL, asks_nobody, STORE, **RUN | more)
    pd.testing.assert_frame_equal(again.rows, data.rows)
    assert not asks_nobody.asked

def test_a_run_with_flat_settings_is_refused(tmp_path):
    made(tmp_path/"r", QS, ITEMS, POOL, MockScorer(), STORE, **RUN)
    file = tmp_path/"r"/"manifest.json"
    old = read_json(file)
    settings = old["settings"]
    settings |= settings.pop("proposing") | settings.pop("asking") | settings.pop("guarding")
    file.write_text(json.dumps(old))
    with pytest.raises(ValueError, match="belong to other settings .*proposing.seed: there None, here 0"):
        made(tmp_path/"r", QS, ITEMS, POOL, MockScorer(), STORE, **RUN)

def test_a_summary_says_what_is_there(tmp_path):
    data = made(tmp_path/"r", QS, ITEMS, POOL, MockScorer(fails=[2]), STORE, test=0)
    assert summary_text(data) == f"rows 180, queries 12, failed 15, fingerprint {data.fingerprint}"
    assert verified_text(data) == ""
    checked = made(tmp_path/"v", QS, ITEMS, POOL, Tampered(), STORE, test=0, verify=3)
    assert verified_text(checked) == "verified 3 of 3, log P within 0 (allowed 0.001), 0 other texts"

class Hourly(MockScorer):
    "Every call takes an hour of a clock that tests can read"
    def __init__(self, **kw):
        super().__init__(**kw)
        self.time = 0.

    def clock(self): return self.time

    def run(self, *args, **kw):
        self.time += 3600
        return super().run(*args, **kw)

def hourly(path, queries, limit):
    "Several runs of whole hours, until the limit"
    scorer = Hourly()
    kw = grouped(shots=(1, 2), window=2, test=0)
    runs = {
        name: Generation(path/name, own, ITEMS, POOL, scorer, STORE, **kw) for name, own in queries.items()
    }
    return generate_together(runs, TimeLimit(limit, scorer.clock), progress=False)

def test_no_window_is_begun_that_would_end_too_late(tmp_path):
    straight = hourly(tmp_path/"s", dict(one=QS), None)["one"]
    assert straight.manifest["complete"]
    for hours, windows in ((0, 0), (.5, 1), (1.5, 1), (2.5, 2), (3.5, 3)):
        some = hourly(tmp_path/f"{hours}", dict(one=QS), hours*3600)["one"]
        assert some.queries == QS[:2*windows]
        assert not some.manifest["complete"] and len(some.manifest["parts"]) == windows
        wanted = straight.rows[straight.rows.question_id.isin(some.queries)].reset_index(drop=True)
        pd.testing.assert_frame_equal(some.rows, wanted)
        later = RLData.load(tmp_path/f"{hours}"/"one", unfinished=True)
        pd.testing.assert_frame_equal(later.rows, some.rows)
        with pytest.raises(ValueError, match="not finished.*unfinished=True"):
            RLData.load(tmp_path/f"{hours}"/"one")
    rest = hourly(tmp_path/"2.5", dict(one=QS), None)["one"]
    pd.testing.assert_frame_equal(rest.rows, straight.rows)
    assert rest.manifest["complete"]

def test_whatever_stops_them_several_runs_are_equally_far(tmp_path):
    queries = dict(few=QS[:4], many=QS[4:])
    for hours in range(6):
        made = hourly(tmp_path/f"{hours}", queries, (hours + .5)*3600)
        done = {name: len(data.queries)/len(queries[name]) for name, data in made.items()}
        windows = sum(len(data.manifest["parts"]) for data in made.values())
        assert windows == max(1, hours)
        assert abs(done["few"] - done["many"]) <= 1/2

def test_what_a_kill_left_is_read_and_continued(tmp_path):
    class Stops(Scripted):
        def run(self, prompts, *a, **k):
            if len(self.asked) > 150: raise KeyboardInterrupt
            return super().run(prompts, *a, **k)
    with pytest.raises(KeyboardInterrupt): made(tmp_path/"r", QS, ITEMS, POOL, Stops(), STORE, **RUN)
    with pytest.raises(ValueError, match="it was ended while it worked"):
        RLData.load(tmp_path/"r", unfinished=True)
    asks_nobody = Tampered()
    some = made(tmp_path/"r", QS, ITEMS, POOL, asks_nobody, STORE, **RUN | dict(seconds=0))
    assert not asks_nobody.asked and 0 < len(some.queries) < len(QS)
    assert "not finished" in summary_text(some)
    whole = made(tmp_path/"r", QS, ITEMS, POOL, MockScorer(), STORE, **RUN)
    assert whole.queries == QS and "not finished" not in summary_text(whole)

def test_shards_whose_time_was_up_are_a_union_of_what_they_have(tmp_path):
    def shard(i, **more): return made(tmp_path/"u", QS, ITEMS, POOL, MockScorer(), STORE, shard=(i, 2), **RUN | more)
    first = shard(0)
    nothing = shard(1, seconds=0)
    assert not len(nothing)
    with pytest.raises(ValueError, match="not finished: 1/2"): RLData.load(tmp_path/"u")
    union = RLData.load(tmp_path/"u", unfinished=True)
    assert sorted(union.queries) == sorted(first.queries)
    assert not union.manifest["complete"]
    shard(1)
    assert RLData.load(tmp_path/"u", unfinished=True).manifest["complete"]

def test_unfinished_and_foreign_directories(tmp_path):
    class Stops(Scripted):
        def run(self, prompts, *a, **k):
            if len(self.asked) > 150: raise KeyboardInterrupt
            return super().run(prompts, *a, **k)
    with pytest.raises(KeyboardInterrupt): made(tmp_path/"r", QS, ITEMS, POOL, Stops(), STORE, **RUN)
    with pytest.raises(ValueError, match="not finished"): RLData.load(tmp_path/"r")
    done = made(tmp_path/"r", QS, ITEMS, POOL, MockScorer(), STORE, **RUN)
    with pytest.raises(ValueError, match="without a manifest"):
        (tmp_path / "r" / "manifest.json").unlink() or made(
            tmp_path / "r", QS, ITEMS, POOL, MockScorer(), STORE, **RUN
        )
    assert len(done) == 12*(8 + 15)

def test_failed_rows_are_asked_again_and_only_they(tmp_path):
    bad = lambda s: (
        replace(s, text=None, logprobs=(), gt_prob=math.nan, error="OSError: truncated")
        if 1007 in s.pointer
        else s
    )
    whole = made(tmp_path / "whole", QS, ITEMS, POOL, MockScorer(), STORE, **RUN)
    data = made(tmp_path / "r", QS, ITEMS, POOL, Scripted(bad), STORE, **RUN)
    n = data.manifest["counts"]["failed"]
    assert n == sum(1007 in p for p in whole.rows.pointer) > 0
    assert data.rows.vqa_acc_score[data.rows.eval_failed].isna().all()
    mended = Scripted()
    again = made(tmp_path / "r", QS, ITEMS, POOL, mended, STORE, **RUN)
    assert len(mended.asked) == n and again.manifest["counts"]["failed"] == 0
    pd.testing.assert_frame_equal(again.rows, whole.rows)

def test_cache_is_shared_between_runs(tmp_path):
    cache = FactCache(tmp_path / "c")
    s = Scripted()
    made(tmp_path / "a", QS[:6], ITEMS, POOL, s, STORE, cache=cache, **RUN | dict(test=0))
    n = len(s.asked)
    made(tmp_path / "b", QS, ITEMS, POOL, s, STORE, cache=cache, **RUN | dict(test=0))
    assert len(s.asked) == 2 * n == 12 * (8 + 15)

def test_flat_queries_leave_failures_out():
    rows = pd.DataFrame(
        dict(
            question_id=[1, 1, 2, 2, 3, 3],
            vqa_acc_score=[0, 0, 0, 1, 1, np.nan],
            eval_failed=[False] * 5 + [True],
        )
    )
    assert flat_queries(rows) == 2

KILLED = """
    import os, random, signal, sys
    sys.path[:0] = {paths!r}
    import torch; torch.set_num_threads(1)
    from test_generate import *
    class Told(Scripted):
        def run(self, *a, **k): sys.audit("scorer", "killed"); return super().run(*a, **k)
    def killed_at(n):
        "Die at the n-th time that this run opens a file to write, renames, removes or makes one, or asks the scorer"
        def hook(event, args):
            nonlocal n
            if event == "open" and args[1] == "r": return
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "scorer") and "killed" in str(args[0]):
                n -= 1
                if n == 0: os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
    kills = 0
    path = {path!r}
    for _ in range(100):
        child = os.fork()
        if not child:
            killed_at(random.Random(_).randint(1, 60))
            run = RUN | dict(window=1, test=4)
            made(path, QS, ITEMS, POOL, Told(), STORE, cache=FactCache(path + "-facts"), **run)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status): break
        kills += 1
    print(kills, os.WEXITSTATUS(status), flush=True)
    os._exit(0) # no farewell: libraries may wait for threads that a fork has lost
"""

@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_random_points(tmp_path):
    code = textwrap.dedent(KILLED).format(
        paths=[str(Path(__file__).parent), str(Path(__file__).parent.parent)], path=str(tmp_path / "killed")
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        env=dict(os.environ, OMP_NUM_THREADS="1", TQDM_DISABLE="1"),
    )
    assert out.returncode == 0, out.stderr[-2000:]
    kills, status = map(int, out.stdout.split())
    assert kills >= 5 and status == 0, out.stdout + out.stderr[-2000:]
    straight = made(
        tmp_path / "straight", QS, ITEMS, POOL, MockScorer(), STORE, **RUN | dict(window=1, test=4)
    )
    resumed = made(
        tmp_path / "killed", QS, ITEMS, POOL, MockScorer(), STORE, **RUN | dict(window=1, test=4)
    )
    pd.testing.assert_frame_equal(resumed.rows, straight.rows)
    assert resumed.fingerprint == straight.fingerprint and not list((tmp_path / "killed").rglob("*.tmp"))

# ---- shards ------------------------------------------------------------------------------------------------

PART = RUN | dict(test=0)

@given(st.lists(st.integers(0, 2**62), unique=True, max_size=60), st.integers(1, 9))
def test_shards_partition_the_queries(queries, n):
    parts = [shard_queries(queries, (i, n)) for i in range(n)]
    assert sorted(sum(parts, [])) == sorted(queries)
    for p in parts: assert p == [q for q in queries if q in set(p)] # order kept
    # nobody's company matters
    assert [shard_queries(queries[::-1], (i, n)) for i in range(n)] == [p[::-1] for p in parts]

def test_shards_are_even_and_the_same_everywhere():
    # 4 standard deviations of 1000
    sizes = [len(shard_queries(range(8000), (i, 8))) for i in range(8)]
    assert min(sizes) > 880 and max(sizes) < 1120
    assert shard_queries(range(20), (0, 3)) == [
        1,
        2,
        5,
        7,
        9,
        13,
        14,
        15,
        16,
    ], "another hash would tear running jobs apart"

@pytest.mark.parametrize("bad", [(2, 2), (-1, 2), (0, 0), 3, (1, 2, 3)])
def test_bad_shards(tmp_path, bad):
    with pytest.raises(ValueError, match="shard"):
        made(tmp_path / "r", QS, ITEMS, POOL, MockScorer(), STORE, shard=bad, **PART)
    assert not (tmp_path/"r").exists()

@settings(max_examples=5)
@given(st.integers(1, 14), st.integers(2, 5), st.data())
def test_any_division_is_the_undivided_run(tmp_path_factory, n, window, data):
    tmp = tmp_path_factory.mktemp("d")
    kw = PART | dict(window=window)
    qs = data.draw(st.permutations(QS))
    straight = made(tmp/"straight", qs, ITEMS, POOL, MockScorer(), STORE, **kw)
    for i in data.draw(st.permutations(range(n))):
        # some shards have no queries
        where = tmp / data.draw(st.sampled_from(["a", "b"]))
        own = made(where, qs, ITEMS, POOL, MockScorer(), STORE, shard=(i, n), **kw)
        assert own.queries == shard_queries(qs, (i, n)) and own.pool == POOL.only(qs)
    for d in ("a", "b"):
        if (tmp/d).exists(): shutil.copytree(tmp/d, tmp/"all", dirs_exist_ok=True)
    union = RLData.load(tmp / "all")
    pd.testing.assert_frame_equal(union.rows, straight.rows)
    assert union.fingerprint == straight.fingerprint
    assert union.manifest["counts"] == straight.manifest["counts"]
    assert union.manifest["settings"] == straight.manifest["settings"]
    assert list(union.pool.ids) == list(straight.pool.ids)
    assert sum(p["rows"] for p in union.manifest["parts"]) == len(union)
    assert union.manifest["shards"] == n
    pd.testing.assert_frame_equal(RLData.load(union.save(tmp/"one")).rows, straight.rows) # and one file again

def shards(path, n=3, **kw):
    for i in range(n): made(path, QS, ITEMS, POOL, MockScorer(), STORE, **PART | dict(shard=(i, n)) | kw)
    return path

def test_missing_unfinished_and_foreign_shards(tmp_path):
    d = shards(tmp_path / "d")
    m = d / "manifest-001of003.json"
    text = m.read_text()
    old = read_json(m)
    whole = RLData.load(d)
    def refused(*says):
        with pytest.raises(ValueError) as e: RLData.load(d)
        assert all(s in str(e.value) for s in says), str(e.value)
    m.unlink()
    refused("1 of 3 shards missing: 1/3")
    m.write_text(json.dumps(old | dict(complete=False)))
    refused("1 of 3 shards not finished: 1/3")
    m.write_text(json.dumps(old | dict(shard=[2, 3])))
    refused("manifest-001of003.json", "renamed", "[2, 3]")
    other = read_json(m) | dict(shard=[1, 3])
    other["settings"]["proposing"]["seed"] = 4
    m.write_text(json.dumps(other))
    refused("1/3 (proposing.seed: there 0, here 4)", "not parts of one generation")
    m.write_text(json.dumps(old | dict(parts=[])))
    refused("has no rows in any shard")
    m.write_text(text)
    pd.testing.assert_frame_equal(RLData.load(d).rows, whole.rows)
    shutil.copy(m, d / "manifest-000of002.json")
    refused("different divisions", "manifest-000of002.json")
    (d / "manifest-000of002.json").unlink()
    shutil.copy(m, d / "manifest.json")
    refused("manifest.json and 3 shards")
    (d / "manifest.json").unlink()
    with pytest.raises(ValueError, match="shards lie here"): whole.save(d)
    part = next(d.glob("part-002of003-*"))
    keep = part.read_bytes()
    part.unlink()
    with pytest.raises(FileNotFoundError, match=part.name): RLData.load(d)
    part.write_bytes(keep)
    assert len(RLData.load(d)) == len(whole)
    assert RLData.load(d, shard=(2, 3)).queries == shard_queries(QS, (2, 3))

def test_a_wrong_row_is_found_in_its_own_part(tmp_path):
    from leverplus.groups import read_part, write_part
    d = shards(tmp_path / "d")
    part = sorted(d.glob("part-001of003-*"))[-1]
    rows = read_part(part)
    rows.loc[3, "vqa_acc_score"] = 7.0
    write_part(part, rows)
    with pytest.raises(
        ValueError, match=f"{part.name}: question_id {rows.question_id[3]}: vqa_acc_score 7.0"
    ):
        RLData.load(d)

def test_divisions_and_settings_do_not_mix_in_a_directory(tmp_path):
    one = lambda path, **kw: made(path, QS, ITEMS, POOL, MockScorer(), STORE, **PART | kw)
    one(tmp_path/"d", shard=(0, 3))
    for kw, says in [
        (dict(), "shards of a generation lie here"),
        (dict(shard=(1, 4)), "divides this run otherwise"),
        (dict(shard=(1, 3), seed=1), "proposing.seed: there 0, here 1"),
        (dict(shard=(0, 3), seed=1), "proposing.seed: there 0"),
    ]:
        with pytest.raises(ValueError, match=says): one(tmp_path/"d", **kw)
    one(tmp_path/"u")
    with pytest.raises(ValueError, match="a generation without shards lies here"):
        one(tmp_path / "u", shard=(0, 3))
    assert sorted(p.name for p in tmp_path.glob("*/manifest*")) == ["manifest-000of003.json", "manifest.json"]

def child(code, path, **kw):
    "A process of its own that runs `code`"
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    head = (
        f"import sys; sys.path[:0] = {paths!r}\nimport torch; torch.set_num_threads(1)\nfrom test_generate"
        f" import *\npath = {str(path)!r}\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(code)],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(os.environ, OMP_NUM_THREADS="1", TQDM_DISABLE="1"),
        **kw
    )

def test_a_lock_is_held_by_the_living_only(tmp_path):
    "Another process holds shard 0; nobody else can have it, but shard 1 is free; kill -9, and it is free again"
    p = child("with run_lock(path, (0, 2)): print('held', flush=True); sys.stdin.read()", tmp_path / "d")
    assert p.stdout.readline() == "held\n"
    run = lambda i: made(tmp_path/"d", QS, ITEMS, POOL, MockScorer(), STORE, shard=(i, 2), **PART)
    with pytest.raises(Busy, match=f"process {p.pid} on .* is writing this shard"): run(0)
    run(1)
    p.kill()
    p.wait()
    p.stdout.close()
    p.stdin.close()
    run(0)
    assert RLData.load(tmp_path / "d").queries == QS
    with run_lock(tmp_path/"d"), pytest.raises(Busy, match="this run"):
        with run_lock(tmp_path/"d"): pass

@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_inside_a_shard(tmp_path):
    "One shard is killed again and again while the other is made beside it, in the same directory"
    code = (
        textwrap.dedent(KILLED)
        .replace("test=4)", "test=4, shard=(0, 2))")
        .replace("randint(1, 60)", "randint(1, 30)")
    )
    code = code.format(
        paths=[str(Path(__file__).parent), str(Path(__file__).parent.parent)], path=str(tmp_path / "killed")
    )
    p = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1", TQDM_DISABLE="1"),
    )
    kw = RUN | dict(window=1, test=4)
    made(tmp_path / "killed", QS, ITEMS, POOL, MockScorer(), STORE, shard=(1, 2), **kw)
    kills, status = map(int, p.communicate(timeout=300)[0].split())
    assert kills >= 3 and status == 0
    union = RLData.load(tmp_path / "killed")
    straight = made(tmp_path / "straight", QS, ITEMS, POOL, MockScorer(), STORE, **kw)
    pd.testing.assert_frame_equal(union.rows, straight.rows)
    assert not list((tmp_path / "killed").rglob("*.tmp"))

def test_shards_of_a_real_model_agree_to_rounding(tmp_path):
    from leverplus.embed import embed_items
    from leverplus.scorer import SharedScorer
    from leverplus.lvlm import load_lvlm
    from leverplus.pools import make_pool
    from leverplus.world import read_islands
    items = read_islands(splits=("train",))[:60]
    store = embed_items(items, progress=False)
    pool = make_pool(items, items, 6, seed=0)
    scorer = SharedScorer(load_lvlm(device="cpu"))
    kw = dict(window=4, test=0, progress=False, counts=dict(beam=2, random=2))
    qs = items.question_id.tolist()[:12]
    straight = made(tmp_path/"s", qs, items, pool, scorer, store, **kw)
    for i in range(2): made(tmp_path/"d", qs, items, pool, scorer, store, shard=(i, 2), verify=1, **kw)
    union = RLData.load(tmp_path / "d")
    soft = ["vqa_gt_prob", "vqa_gt_logprobs"]
    pd.testing.assert_frame_equal(union.rows.drop(columns=soft), straight.rows.drop(columns=soft))
    np.testing.assert_allclose(union.rows.vqa_gt_prob, straight.rows.vqa_gt_prob, atol=1e-4)
    v = union.manifest["verify"]
    assert v["asked"] == v["drawn"] == 2 and v["text"] == 0 and 0 <= v["logprob"] < scorer.tolerance == 1e-3

# ---- verify ------------------------------------------------------------------------------------------------

class Tampered(Scripted):
    "Spoils the prompts of query `bad`; its reference does not"
    def __init__(self, bad=None, logprob=0., text=None, tolerance=1e-3, failing=False):
        super().__init__()
        self.bad, self.logprob, self.says, self.tolerance, self.failing, self.checked = (
            bad,
            logprob,
            text,
            tolerance,
            failing,
            [],
        )
    def reference(self):
        outer = self
        class Reference:
            def run(self, prompts, targets, generate=True, progress=False):
                assert generate
                outer.checked += [p.question_id for p in prompts]
                out = outer.inner.run(prompts, targets)
                return (
                    [replace(s, text=None, logprobs=(), error="OSError: gone") for s in out]
                    if outer.failing
                    else out
                )
        return Reference()
    def run(self, *a, **k):
        spoil = lambda s: (
            replace(s, text=self.says or s.text, logprobs=tuple(l + self.logprob for l in s.logprobs))
            if s.question_id == self.bad
            else s
        )
        return [spoil(s) for s in super().run(*a, **k)]

def drawn(k):
    return sorted(Generation("x", QS, ITEMS, POOL, None, STORE, guarding=Guarding(verify=k)).drawn)

def test_verify_draws_by_seed_and_passes(tmp_path):
    s = Tampered()
    data = made(tmp_path / "r", QS, ITEMS, POOL, s, STORE, verify=5, **RUN)
    v = data.manifest["verify"]
    assert sorted(s.checked) == drawn(5)
    assert len(set(s.checked)) == 5
    assert [r["question_id"] for r in v.pop("rows")] == s.checked
    assert v == dict(drawn=5, asked=5, logprob=0., text=0, tolerance=1e-3)
    pd.testing.assert_frame_equal(
        data.rows, made(tmp_path / "plain", QS, ITEMS, POOL, MockScorer(), STORE, **RUN).rows
    )
    assert set(drawn(5)) < set(drawn(8)) and drawn(99) == QS # more is more of the same

@pytest.mark.parametrize(
    "how, says",
    [
        (dict(logprob=0.002), r"log P may differ by 0.001 and the text not at all"),
        (dict(text="nonsense"), "the scorer says 'nonsense' and log P"),
        (dict(logprob=math.nan), "log P nan"),
        (dict(text="nonsense", logprob=0.3, tolerance=0.25), "log P may differ by 0.25[.]"),
        (dict(failing=True), "OSError: gone"),
    ],
)
def test_verify_stops_before_the_part_is_written(tmp_path, how, says):
    bad = drawn(1)[0]
    at = QS.index(bad) // RUN["window"]
    run = lambda s: made(tmp_path / "r", QS, ITEMS, POOL, s, STORE, verify=1, **PART)
    with pytest.raises(NotVerified, match=f"question_id {bad}, pointer .*{says}") as e:
        run(Tampered(bad, **how))
    assert "Nothing of this window was written" in str(e.value)
    assert len(list((tmp_path / "r").glob("part-*"))) == at
    assert "verify" not in json.loads((tmp_path / "r" / "manifest.json").read_text())
    mended = run(Tampered())
    assert mended.manifest["verify"]["asked"] == 1
    pd.testing.assert_frame_equal(
        mended.rows, made(tmp_path / "plain", QS, ITEMS, POOL, MockScorer(), STORE, **PART).rows
    )

def test_half_precision_may_flip_a_text_but_not_move_far(tmp_path):
    v = made(
        tmp_path / "r",
        QS,
        ITEMS,
        POOL,
        Tampered(drawn(1)[0], logprob=0.2, text="flipped", tolerance=0.25),
        STORE,
        verify=1,
        **PART
    ).manifest["verify"]
    assert (v["asked"], v["text"], v["tolerance"]) == (1, 1, .25) and abs(v["logprob"] - .2) < 1e-9

def test_only_what_is_wrong_is_noticed(tmp_path):
    "A spoilt query that is not drawn passes: verification is a sample"
    made(
        tmp_path / "r",
        QS,
        ITEMS,
        POOL,
        Tampered(next(q for q in QS if q not in drawn(3)), logprob=1.0),
        STORE,
        verify=3,
        **PART
    )

def test_resumes_keep_what_was_verified(tmp_path):
    class Stops(Tampered):
        def run(self, prompts, *a, **k):
            if len(self.asked) > 150: raise KeyboardInterrupt
            return super().run(prompts, *a, **k)
    run = lambda s, k: made(tmp_path / "r", QS, ITEMS, POOL, s, STORE, verify=k, **PART)
    first = Stops()
    second = Tampered()
    third = Tampered()
    fourth = Tampered()
    with pytest.raises(KeyboardInterrupt): run(first, 8)
    held = [
        r["question_id"] for r in json.loads((tmp_path / "r" / "manifest.json").read_text())["verify"]["rows"]
    ]
    assert held == first.checked and 0 < len(held) < 8
    # each once
    run(second, 8)
    assert sorted(held + second.checked) == drawn(8)
    # rows on disk, verified where they lie
    more = run(third, 12)
    assert sorted(third.checked) == sorted(set(QS) - set(drawn(8)))
    assert not third.asked
    assert more.manifest["verify"]["asked"] == 12
    assert run(fourth, 0).manifest["verify"]["asked"] == 12 and not fourth.checked and not fourth.asked
    # facts on disk that the reference does not confirm
    with pytest.raises(NotVerified, match="part-0000. holds it|part-0000..parquet holds it"):
        made(tmp_path / "w", QS, ITEMS, POOL, Tampered(drawn(1)[0], logprob=1.0), STORE, **PART)
        made(tmp_path / "w", QS, ITEMS, POOL, Tampered(), STORE, verify=1, **PART)

def test_failed_rows_are_not_verified(tmp_path):
    bad = drawn(1)[0]
    spoil = lambda s: (
        replace(s, text=None, logprobs=(), gt_prob=math.nan, error="OSError: truncated")
        if s.question_id == bad
        else s
    )
    s = Tampered()
    s.spoil = spoil
    data = made(tmp_path / "r", QS, ITEMS, POOL, s, STORE, verify=1, **PART)
    assert not s.checked and "verify" not in data.manifest
    mended = Tampered()
    again = made(tmp_path / "r", QS, ITEMS, POOL, mended, STORE, verify=1, **PART)
    assert mended.checked == [bad] and again.manifest["verify"]["asked"] == 1

def test_verification_of_shards_adds_up(tmp_path):
    v = RLData.load(shards(tmp_path / "d", verify=2)).manifest["verify"]
    own = [shard_queries(QS, (i, 3)) for i in range(3)]
    assert v["asked"] == v["drawn"] == sum(min(2, len(q)) for q in own) == len(v["rows"])
    assert v["logprob"] == 0
