"Health check: every metric against a plain loop, planted faults, several files, failures, missing facts, CSV"
import math, statistics
from dataclasses import replace
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, strategies as st
from leverplus.core import pad_rows
from leverplus.groups import METHODS, RLData
from leverplus.losses import advantage, live_groups
from leverplus.pools import Pool
from leverplus.rewards import reward
from leverplus.rldata_check import METRICS, Alarm, Health, health, judge, label_alarms, teaches, wilson

def made(groups, K=6, **columns):
    "RLData from {question_id: [(accuracy or None for a failure, gt_prob), ...]}; the first three of a query are beams"
    from itertools import permutations
    q = [i for i, g in groups.items() for _ in g]
    acc = np.array([np.nan if a is None else a for g in groups.values() for a, _ in g], dtype=float)
    k = np.array([j for g in groups.values() for j in range(len(g))], dtype=int)
    failed = np.isnan(acc)
    pairs = list(permutations(range(1000, 1000 + K), 2))
    text = np.where(failed, None, [f"answer {i} {a}" for i, a in zip(q, acc)])
    rows = pd.DataFrame(
        dict(
            question_id=q,
            pointer=[pairs[j] for j in k],
            gen_method=np.where(k < 3, "beam", "random"),
            beam_rank=np.where(k < 3, k, np.nan),
            vqa_acc_score=acc,
            vqa_correct=np.where(failed, np.nan, acc > 0),
            vqa_gt_prob=np.where(failed, np.nan, [p for g in groups.values() for _, p in g]),
            vqa_eval_mode=np.where(failed, None, "official"),
            vqa_pred_answer=text,
            vqa_raw_generation=text,
            eval_failed=failed,
            error=np.where(failed, "OSError: image truncated", None),
            scorer="s",
            **{
                c: np.where(failed, np.nan, 0.0)
                for c in ("vqa_rel_token_f1", "vqa_rel_edit_sim", "vqa_rel_score")
            }
        )
    )
    return RLData(
        rows.assign(vqa_gt_logprobs=[None if f else (-1.0,) for f in failed], **columns),
        Pool({i: range(1000, 1000 + K) for i in groups}),
    )

# ---- against a plain loop ----------------------------------------------------------------------------------

def random_data(seed):
    "Ragged groups, ragged pools, 0 to 3 shots, every method, failures, ties, no manners"
    g = np.random.default_rng(seed)
    rows, pools = [], {}
    for q in g.permutation(50)[:g.integers(1, 8)].tolist():
        pools[q] = tuple((100 + g.permutation(20)[: g.integers(4, 9)]).tolist())
        hard = g.uniform()
        for ptr in {
            tuple(g.permutation(pools[q])[: g.integers(0, 4)].tolist()) for _ in range(g.integers(1, 9))
        }:
            method = str(g.choice(METHODS))
            failed = bool(g.uniform() < 0.2)
            acc = float(g.choice([0, 0.3, 0.6, 1.0], p=[hard, *[(1 - hard) / 3] * 3]))
            text = None if failed else f"a{g.integers(4)}"
            rows.append(
                dict(
                    question_id=q,
                    pointer=ptr,
                    gen_method=method,
                    beam_rank=float(g.integers(3)) if method == "beam" else np.nan,
                    temperature=float(g.choice([1.0, 1.3])) if method == "sample" else np.nan,
                    logprob_score=(
                        -float(g.integers(1, 5)) if method not in ("retrieval", "mined") else np.nan
                    ),
                    vqa_acc_score=np.nan if failed else acc,
                    vqa_correct=np.nan if failed else float(acc > 0),
                    vqa_gt_prob=np.nan if failed else float(g.integers(6)) / 5,
                    vqa_pred_answer=text,
                    vqa_raw_generation=text,
                    vqa_eval_mode=None if failed else str(g.choice(["official", "fallback"])),
                    eval_failed=failed,
                    error="OSError" if failed else None,
                    scorer="s",
                )
            )
    return RLData(pd.DataFrame(rows).sample(frac=1, random_state=seed), Pool(pools))

def mean(x):
    x = [v for v in x if v == v]
    return statistics.fmean(x) if x else math.nan

def by_loop(data):
    "Metrics, one row and one query at a time"
    groups = {}
    for r in data.rows.itertuples(): groups.setdefault(r.question_id, []).append(r)
    good = {q: [r for r in g if not r.eval_failed] for q, g in groups.items()}
    judged = {q: g for q, g in good.items() if g}
    flat = [r for g in good.values() for r in g]
    rew = {q: [r.vqa_correct + r.vqa_acc_score for r in g] for q, g in judged.items()}
    live = [q for q, r in rew.items() if max(r) - min(r) > 1e-6]
    std = {q: statistics.stdev(r) if len(r) > 1 else 0.0 for q, r in rew.items()}
    pos = [sum(r.vqa_correct > 0 for r in g) for g in judged.values()]
    def picked_of(rows):
        beam = [r for r in rows if r.beam_rank == r.beam_rank]
        drawn = [r for r in rows if r.gen_method in ("sample", "policy") and r.temperature != 1.3]
        drawn = [r for r in drawn if r.logprob_score == r.logprob_score]
        if beam:
            best = min(r.beam_rank for r in beam)
            return [r for r in beam if r.beam_rank == best and not r.eval_failed]
        elif drawn:
            best = max(r.logprob_score for r in drawn)
            return [r for r in drawn if r.logprob_score == best and not r.eval_failed]
        return []
    def best_of(rows, shots): return max(r.vqa_acc_score for r in rows if len(r.pointer) == shots)
    def gap(q):
        of_shots = {}
        for r in picked_of(groups[q]): of_shots.setdefault(len(r.pointer), []).append(r.vqa_acc_score)
        return mean([best_of(good[q], shots) - mean(accs) for shots, accs in of_shots.items()])
    top = {q: max((r.vqa_acc_score for r in good[q]), default=math.nan) for q in groups}
    picks = {q: mean([r.vqa_acc_score for r in picked_of(g)]) for q, g in groups.items()}
    gaps = [x for x in map(gap, groups) if not math.isnan(x)]
    pairs = [(a, b) for i, a in enumerate(flat) for b in flat[:i]]
    def agree(same):
        some = [(a, b) for a, b in pairs if (a.question_id == b.question_id) == same]
        return mean([a.vqa_pred_answer == b.vqa_pred_answer for a, b in some])
    def blind(rows, shots=None):
        def wanted(n): return n > 0 if shots is None else n == shots
        return mean([r.vqa_acc_score for r in rows if wanted(len(r.pointer))])
    alone = {q: blind(g, 0) for q, g in good.items()}
    both = [q for q in good if alone[q] == alone[q] and blind(good[q]) == blind(good[q])]
    def worse(q): return mean([r.vqa_acc_score < alone[q] - 1e-6 for r in good[q] if r.pointer])
    def best_shown(q): return max(r.vqa_acc_score for r in good[q] if r.pointer)
    counts = sorted({len(r.pointer) for r in data.rows.itertuples()})
    every = [q for q in good if all(blind(good[q], S) == blind(good[q], S) for S in counts)]
    if len(counts) < 2 or not both: every = []
    def shown_rewards(q): return [r.vqa_correct + r.vqa_acc_score for r in good[q] if r.pointer]
    def nll(r): return sum(math.log(len(data.pool[r.question_id]) - t) for t in range(len(r.pointer)))
    def quart(x): return dict(zip(("min", "q1", "median", "q3", "max"), np.quantile(x, [0, .25, .5, .75, 1])))
    return dict(
        queries=len(groups),
        rows=len(data.rows),
        failed=len(data.rows) - len(flat),
        unofficial=sum(r.vqa_eval_mode != "official" for r in flat),
        groups=len(judged),
        live_groups=len(live),
        unique_rate=len({(r.question_id, r.pointer) for r in data.rows.itertuples()}) / len(data.rows),
        pool_min=min(len(data.pool[q]) for q in groups),
        pool_max=max(len(data.pool[q]) for q in groups),
        group_min=min(map(len, good.values())),
        group_median=statistics.median(map(len, good.values())),
        group_max=max(map(len, good.values())),
        positive_rate=sum(pos) / len(flat),
        **{f"positives_{k}": v for k, v in quart(pos).items()},
        **{f"reward_{k}": v for k, v in quart([x for r in rew.values() for x in r]).items()},
        pct_zero_positive_query=100 * mean([p == 0 for p in pos]),
        pct_flat_reward_query=100 * (1 - len(live) / len(judged)),
        adv_std=mean([std[q] / max(std[q], 0.1) if q in live else 0.0 for q in judged]),
        adv_std_live=mean([std[q] / max(std[q], 0.1) for q in live]),
        reward_std=mean(std.values()),
        reward_std_live=mean([std[q] for q in live]),
        oracle_in_data=mean(top.values()),
        model_pick=mean(picks.values()),
        mean_in_data=mean([mean([r.vqa_acc_score for r in g]) for g in judged.values()]),
        gap_mean=mean(gaps),
        pct_clear_gap=100 * mean([x > 0.2 for x in gaps]),
        same_answer_within=agree(True),
        same_answer_across=agree(False),
        answers=len({r.vqa_pred_answer for r in flat}),
        zero_shot=mean([alone[q] for q in both]),
        shown=mean([blind(good[q]) for q in both]),
        pct_spoilt=100 * mean([alone[q] - blind(good[q]) >= .2 - 1e-6 for q in both]),
        pct_spoilt_most=100 * mean([worse(q) > .5 for q in both]),
        pct_spoilt_all=100 * mean([worse(q) == 1 for q in both]),
        pct_nothing_helps=100 * mean([best_shown(q) <= alone[q] + 1e-6 for q in both]),
        live_shown=sum(max(x, default=0) - min(x, default=0) > 1e-6 for x in map(shown_rewards, good)),
        count_fixed=max((mean([blind(good[q], S) for q in every]) for S in counts), default=math.nan),
        count_free=mean([max(blind(good[q], S) for S in counts) for q in every]),
        uniform_nll=mean([mean(map(nll, g)) for g in groups.values()]),
        gt_prob_mean=mean([r.vqa_gt_prob for r in flat]),
        gt_prob_right=statistics.median([r.vqa_gt_prob for r in flat if r.vqa_correct] or [math.nan]),
        gt_prob_wrong=statistics.median([r.vqa_gt_prob for r in flat if not r.vqa_correct] or [math.nan]),
    )

@given(st.integers(0, 10**6))
def test_metrics_are_those_of_a_plain_loop(seed):
    data = random_data(seed)
    if data.rows.eval_failed.all(): return
    h = health(data)
    m = h.frame.loc["data"]
    assert list(h.frame.columns) == list(METRICS)
    for k, v in by_loop(data).items(): np.testing.assert_allclose(float(m[k]), float(v), atol=1e-9, err_msg=k)
    good = data.rows[~data.rows.eval_failed]
    if good.vqa_gt_prob.nunique() > 1 and good.vqa_acc_score.nunique() > 1:
        assert m.spearman == pytest.approx(good.vqa_gt_prob.corr(good.vqa_acc_score, "spearman"))
        assert abs(m.spearman) <= 1
        assert 0 < m.spearman_reach <= 1
    for s in h.sources.itertuples():
        name, _, T = s.source.partition(" T=")
        of_method = data.rows[data.rows.gen_method == name]
        rows = of_method[of_method.temperature == float(T) if T else of_method.temperature.isna()]
        ok = rows[~rows.eval_failed]
        assert (s.rows, s.failed) == (len(rows), int(rows.eval_failed.sum()))
        assert (s.judged, s.positives) == (len(ok), int(ok.vqa_correct.sum()))
        assert s.judged == 0 or s.low <= s.rate <= s.high
    assert h.sources.rows.sum() == len(data.rows)
    assert h.queries.positives.sum() == good.vqa_correct.sum()

@given(st.integers(0, 10**6))
def test_advantage_statistics_are_those_of_the_objective(seed):
    data = random_data(seed)
    rows = data.rows[~data.rows.eval_failed]
    if not len(rows): return
    r, mask = pad_rows(
        [torch.tensor(reward(g, "hard01_plus_gtprob")) for _, g in rows.groupby("question_id")], 0.0
    )
    a = advantage(r, mask, "zscore")
    n = mask.sum(-1)
    std = ((a**2).sum(-1) / (n - 1).clamp(min=1)).sqrt()
    live = live_groups(r, mask)
    m = health(data, "hard01_plus_gtprob").frame.loc["data"]
    assert m.adv_std == pytest.approx(std.mean().item())
    assert m.live_groups == live.sum()
    assert not live.any() or m.adv_std_live == pytest.approx(std[live].mean().item())

@given(st.integers(0, 10**6))
def test_order_of_rows_and_names_of_queries_change_nothing(seed):
    data = random_data(seed)
    if data.rows.eval_failed.all(): return
    other = RLData(
        data.rows.sample(frac=1, random_state=1).assign(question_id=lambda f: f.question_id + 500),
        Pool({q + 500: p for q, p in data.pool.ids.items()}),
    )
    pd.testing.assert_frame_equal(health(data).frame, health(other).frame)

@given(st.integers(0, 400), st.integers(1, 400))
def test_wilson_holds_the_share(k, n):
    k = min(k, n)
    low, high = wilson(k, n)
    assert 0 <= low <= k / n + 1e-12
    assert k / n - 1e-12 <= high <= 1
    assert high - low > 0
    # the interval is where the score test accepts
    z = 1.959963984540054
    def inside(p): return (k / n - p) ** 2 <= z * z * p * (1 - p) / n + 1e-9
    assert inside(low)
    assert inside(high)
    assert not (low > 1e-3 and inside(low - 1e-3))
    assert not (high < 1 - 1e-3 and inside(high + 1e-3))

# ---- verdicts ----------------------------------------------------------------------------------------------

def healthy(n=40, **kw):
    "Half of each group right, probabilities in order"
    return made({q: half_right(q) for q in range(n)}, **kw)

def half_right(q): return [(0., .1 + .001*q), (1., .9), (.6, .7), (0., .2), (0., .05), (1., .8)]

def test_a_healthy_file_is_to_be_trained_on():
    h = health(healthy())
    assert h.advice == {"data": "fit to train on"}
    assert h.verdict == []
    assert h.frame.adv_std["data"] == 1.0
    assert "data: fit to train on" in repr(h)
    assert "40 of 40 groups can teach" in h._repr_html_()
    assert "40 of 40 groups can teach" in h._repr_markdown_()

def sparse(live=4, n=640, rest=lambda q: 0.):
    "The first `live` queries have two positives of ten; all rows of the others have the accuracy rest(q)"
    def row(q, k):
        if q >= live: return rest(q), .1
        return (1., .8) if k < 2 else (0., .1)
    return made({q: [row(q, k) for k in range(10)] for q in range(n)})

def test_4_of_640():
    h = health(sparse())
    m = h.frame.loc["data"]
    assert m.adv_std == pytest.approx(0.00625, abs=1e-12)
    assert m.adv_std_live == 1
    assert (m.live_groups, m.groups) == (4, 640)
    assert teaches(m).startswith("4 of 640 groups can teach: mean advantage std 0.00625 over all groups")
    assert teaches(m) in repr(h)
    flat = next(a for a in h.verdict if a.cause == "flat groups")
    assert "do not start GRPO" in flat.remedy
    assert "4 of 640" in flat.seen
    assert h.advice == {"data": "pool or prompts"}
    assert [a.cause for a in h.verdict][:3] == ["pool or prompts", "proposals", "flat groups"]

def test_flat_groups_in_an_otherwise_good_file():
    h = health(sparse(rest=lambda q: float(q % 4 > 0)))
    assert h.advice == {"data": "flat groups"}
    assert h.frame.adv_std["data"] == pytest.approx(0.00625)

def test_a_perfect_soft_reward_is_not_blamed_for_rare_positives():
    d = sparse()
    near = np.random.default_rng(0).uniform(size=len(d)) * 0.1
    m = health(RLData(d.rows.assign(vqa_gt_prob=d.rows.vqa_gt_prob + near), d.pool)).frame.loc["data"]
    assert m.spearman < .1
    assert m.spearman == pytest.approx(m.spearman_reach)
    assert not [a for a in judge(m) if a.cause == "soft reward" and "not the probability" in a.remedy]

def test_many_queries_without_a_positive():
    some = [(1., .9)] * 3 + [(0., .1)] * 3
    none = [(0., .2)] * 6
    h = health(made({q: some if q % 10 < 4 else none for q in range(40)}), oracle=.3)
    assert h.advice == {"data": "proposals"}

def test_prompts_and_pools_are_told_apart():
    low = {q: [(1. if q < 4 and k < 2 else 0., .1*k) for k in range(6)] for q in range(40)}
    assert health(made(low)).advice == {"data": "pool or prompts"}
    assert health(made(low, vqa_pred_answer="dax")).advice == {"data": "prompts"}
    # one answer to everything is no fault where it is right
    assert health(healthy(vqa_pred_answer="yes")).advice == {"data": "fit to train on"}

def test_a_soft_reward_that_knows_nothing():
    rows = healthy(60)
    g = np.random.default_rng(0)
    tiny = g.uniform(size=len(rows)) * 1e-7
    turned = 1 - rows.rows.vqa_gt_prob
    for prob in (tiny, 0., turned):
        h = health(RLData(rows.rows.assign(vqa_gt_prob=prob), rows.pool))
        assert h.advice == {"data": "soft reward"}
    few = health(healthy(3))
    assert few.advice == {"data": "soft reward"}
    assert "Too few queries" in few.verdict[0].remedy

def test_nothing_left_to_win():
    # beam rank 0 is the best of every query
    h = health(made({q: [(1., .9)] + [(0., .1)] * 5 for q in range(40)}))
    assert h.advice == {"data": "headroom"}

def test_failures_are_counted_and_are_no_negatives():
    a = healthy()
    b = made({q: [*half_right(q), (None, 0.)] for q in range(40)})
    x = health(a).frame.loc["data"]
    y = health(b).frame.loc["data"]
    same = [k for k in METRICS if k not in ("rows", "failed", "error")]
    pd.testing.assert_series_equal(x[same], y[same])
    assert y.failed == 40
    assert y.error == "OSError: image truncated"
    (alarm,) = health(b).verdict
    assert alarm.cause == "failures"
    assert "40 of 280 rows failed, most often: OSError" in alarm.seen
    assert health(b, failed=0.2).verdict == []

def test_a_query_of_failures_is_no_group():
    m = health(made({q: [(1.0, 0.9), (0.0, 0.1)] if q else [(None, 0.0)] * 2 for q in range(5)})).frame.loc[
        "data"
    ]
    assert (m.queries, m.groups, m.live_groups, m.group_min) == (5, 4, 4, 0)
    assert m.pct_zero_positive_query == 0

def test_a_failed_first_pick_is_not_replaced():
    m = health(
        made({0: [(None, 0.0), (1.0, 0.9), (0.0, 0.1)], 1: [(0.0, 0.1), (1.0, 0.9), (0.0, 0.1)]})
    ).frame.loc["data"]
    assert m.model_pick == 0.0
    assert m.gap_mean == 1.0
    assert m.oracle_in_data == 1.0

def test_mixed_scorers_and_missing_facts_come_first():
    rows = healthy()
    mixed = RLData(rows.rows.assign(scorer=np.where(rows.rows.question_id < 5, "old", "new")), rows.pool)
    assert health(mixed).advice == {"data": "labels"}
    text = ["vqa_pred_answer", "vqa_raw_generation", "vqa_correct", "vqa_acc_score", "vqa_eval_mode"]
    part = rows.rows.copy()
    part.loc[part.index % 6 == 0, text] = np.nan
    h = health(RLData(part, rows.pool))   # as the first of two stages leaves them: nothing is wrong
    assert h.advice == {"data": "fit to train on"} and not h.verdict
    assert h.frame.untexted["data"] == 40 and h.frame.unrewarded["data"] == 0
    assert h.frame.failed["data"] == 0
    part.loc[part.index % 6 == 0, ["vqa_gt_prob", "vqa_gt_logprobs"]] = None   # now nothing is known of them
    h = health(RLData(part, rows.pool))
    assert h.advice == {"data": "labels"}
    assert h.frame.unrewarded["data"] == 40 and h.frame.untexted["data"] == 0
    assert h.frame.failed["data"] == 0
    assert "not fit to train on: labels" in repr(h)
    only = health(RLData(rows.rows.assign(**{c: np.nan for c in text}), rows.pool), "gtprob")
    assert only.advice == {"data": "labels"}
    assert only.verdict[0].seen == "no row has an accuracy"
    assert only.frame.live_groups["data"] == 40

def test_thresholds_are_arguments():
    m = health(healthy()).frame.loc["data"].to_dict()
    for kw, cause in (
        (dict(oracle=1.1), "pool or prompts"),
        (dict(headroom=1.1), "headroom"),
        (dict(live=1.1), "flat groups"),
        (dict(spearman=2.0), "soft reward"),
        (dict(zero_positive=-0.1), "proposals"),
        (dict(failed=-1.0), "failures"),
    ):
        assert [a.cause for a in judge(m, **kw)] == [cause], kw
        assert [a.cause for a in health(healthy(), **kw).verdict] == [cause]
    with pytest.raises(TypeError, match="oracel"): health(healthy(), oracel=.5)

def test_weights_reach_the_reward():
    d = healthy()
    assert health(d, weights=dict(hard_weight=5.0)).frame.reward_max["data"] == 6.0
    with pytest.raises(TypeError, match="sorf_weight"): health(d, weights=dict(sorf_weight=1.))

# ---- real faults, the tiny model ---------------------------------------------------------------------------

def test_planted_faults_on_the_embedded_world(tmp_path):
    from leverplus.rldata_generate import generate
    from leverplus.settings import Guarding, Proposing
    from leverplus.world import world
    w = world("islands")
    ids = w.ids("train")[:60]
    counts = dict(beam=3, temperature={1.0: 3}, random=4)
    kw = dict(proposing=Proposing(counts=counts), guarding=Guarding(test=0), progress=False)
    world = (ids, w.items, w.pools["train"])
    class Unfilled:
        fingerprint, tolerance = "unfilled", 1e-3
        def run(self, prompts, targets=None, generate=True, progress=False):
            def blank(p):
                demos = tuple(replace(d, question="{question}", answer="{answer}") for d in p.demos)
                return replace(p, question="{question}", demos=demos)
            return w.scorer.run([blank(p) for p in prompts], targets, generate)
    class Shuffled:
        "Each prompt gets the probabilities of another query's answers, as if read from the wrong tokens"
        fingerprint, tolerance = "shuffled", 1e-3
        def run(self, prompts, targets=None, generate=True, progress=False):
            said = w.scorer.run(prompts, targets, generate)
            n = len(targets)
            other = w.scorer.run(prompts, [targets[(i * 7 + 31) % n] for i in range(n)], False)
            def moved(s, o):
                logprobs = (o.logprobs + (-50.,) * len(s.logprobs))[:len(s.logprobs)]
                return replace(s, logprobs=logprobs, gt_prob=min(o.gt_prob, 1.))
            return [moved(s, o) for s, o in zip(said, other)]
    scorers = dict(good=w.scorer, unfilled=Unfilled(), shuffled=Shuffled())
    files = {name: generate(tmp_path/name, *world, s, w.store, **kw) for name, s in scorers.items()}
    assert health(files).advice == dict(good="fit to train on", unfilled="prompts", shuffled="soft reward")

# ---- what comes out ----------------------------------------------------------------------------------------

def test_files_side_by_side_are_as_alone():
    a = healthy()
    b = sparse(2, 20)
    both = health({"a": a, "b|<b>": b})
    assert list(both.frame.index) == ["a", "b|<b>"]
    for name, d in (("a", a), ("b|<b>", b)):
        alone = health({name: d})
        pd.testing.assert_series_equal(both.frame.loc[name], alone.frame.loc[name], check_dtype=False)
        for k in ("sources", "queries", "spread"):
            x = getattr(both, k)
            pd.testing.assert_frame_equal(x[x.file == name].reset_index(drop=True), getattr(alone, k))
        assert [x for x in both.verdict if x.file == name] == alone.verdict
    assert "b|&lt;b&gt;" in both._repr_html_()
    assert "<b>b|<b>" not in both._repr_html_()
    assert "b\\|&lt;b&gt;" in both._repr_markdown_()

def test_a_file_from_disk_has_its_name(tmp_path):
    healthy(5).save(tmp_path / "mine")
    assert list(health(RLData.load(tmp_path / "mine")).frame.index) == ["mine"]

def test_csv_round_trip(tmp_path):
    h = health(dict(a=healthy(), b=sparse(2, 20)))
    folder = h.to_csv(tmp_path / "deep" / "health")
    assert sorted(p.name for p in folder.glob("[!.]*")) == [
        "health.csv",
        "queries.csv",
        "sources.csv",
        "spread.csv",
        "verdict.csv",
    ]
    def read(n, **kw): return pd.read_csv(folder/f"{n}.csv", **kw)
    pd.testing.assert_frame_equal(
        read("health", index_col="file").drop(columns="error"),
        h.frame.drop(columns="error"),
        check_index_type=False,
        check_column_type=False,
    )
    for k in ("sources", "queries", "spread"):
        pd.testing.assert_frame_equal(read(k), getattr(h, k), check_dtype=False)
    assert [Alarm(*r) for r in read("verdict").itertuples(index=False)] == h.verdict
    # a verdict can be had from the file
    assert judge(read("health", index_col="file").loc["b"], "b") == [a for a in h.verdict if a.file == "b"]
    health(healthy()).to_csv(folder)
    assert len(read("verdict")) == 0
    assert len(read("health")) == 1

def test_histograms_hold_every_row():
    h = health(made({q: [(None, 0.0), (0.0, 0.0), (1.0, 1.0), (0.6, 0.5)] for q in range(5)}))
    s = h.spread
    for fact in ("reward", "vqa_gt_prob"):
        f = s[s.fact == fact]
        assert (f.right.sum(), f.wrong.sum(), f.unjudged.sum()) == (10, 5, 0)
    alike = health(made({q: [(0., .5), (0., .5)] for q in range(5)})).spread
    assert alike[alike.fact == "reward"].wrong.sum() == 10

def test_plot():
    assert health(dict(a=healthy(), b=sparse(2, 20))).plot().shape == (2, 3)
    d = healthy()
    assert health(RLData(d.rows.assign(vqa_gt_prob=np.nan), d.pool)).plot().shape == (1, 3)

def test_without_a_soft_reward_it_says_so():
    d = healthy()
    h = health(RLData(d.rows.assign(vqa_gt_prob=np.nan, vqa_gt_logprobs=None), d.pool))
    assert h.advice == {"data": "fit to train on"}
    assert "(no probabilities: rewards of texts alone)" in repr(h)

def test_files_that_cannot_be_judged():
    d = healthy(5)
    with pytest.raises(ValueError, match="'mine' has no rows"): health({"mine": RLData(d.rows[:0], d.pool)})
    with pytest.raises(ValueError, match="all 4 rows of 'mine' failed .first: question_id 3: OSError"):
        health({"mine": made({3: [(None, 0.0)] * 2, 4: [(None, 0.0)] * 2})})
    with pytest.raises(ValueError, match="no row has it: the model that was asked gives no prob"):
        health(RLData(d.rows.assign(vqa_gt_prob=np.nan), d.pool), "gtprob")
    with pytest.raises(ValueError, match="info_score"): health(d, "hybrid")
    with pytest.raises(ValueError, match="wanted one of"): health(d, "gtprop")
    with pytest.raises(TypeError, match="wanted RLData"): health(d.rows)
    with pytest.raises(ValueError, match="no files"): health({})

def test_data_are_left_alone():
    d = healthy(5)
    before = d.rows.copy()
    health(d, "hard01_plus_gtprob")
    pd.testing.assert_frame_equal(d.rows, before)

# --- parts of a reward that cancel ---------------------------------------------------------------------------
def test_parts_that_cancel_are_an_alarm_of_their_own():
    "Accuracy 1 beside probability .2, and 0 beside .7: weighted 1 to 2 they come to one number"
    data = made({q: [(1., .2), (0., .7)] for q in range(20)} | {q: [(1., .9), (0., .1)] for q in range(20, 100)})
    opposed = health(data, "hard01_plus_gtprob", dict(hard_weight=1., soft_weight=2.))
    m = opposed.frame.loc["data"]
    assert m.pct_cancelled_query == m.pct_flat_reward_query == pytest.approx(20.)
    alarm, = [a for a in opposed.verdict if a.cause == "cancelling parts"]
    assert alarm.seen.startswith("in 20.0 % of groups")
    usual = health(data, "hard01_plus_gtprob").frame.loc["data"]
    assert usual.pct_cancelled_query == 0 == usual.pct_flat_reward_query
    one = health(data, "gtprob").frame.loc["data"]
    assert one.pct_cancelled_query == 0
    assert not [a for a in health(data, "hard01_plus_gtprob", dict(hard_weight=1., soft_weight=2.),
                                  cancelled=.2).verdict if a.cause == "cancelling parts"]

def test_headroom_is_that_of_as_many_shots():
    "With one shot nothing helps and with two everything does: nobody who is asked for one or for two has any headroom"
    rows = []
    for q in range(20):
        for shots, acc in ((1, 0.), (2, 1.)):
            for rank in range(3):
                pointer = tuple(1000 + (rank + i) % 6 for i in range(shots))
                rows.append(dict(question_id=q, pointer=pointer, beam_rank=float(rank), gen_method="beam",
                                 vqa_acc_score=acc, vqa_correct=acc, vqa_pred_answer=f"{q}", vqa_gt_prob=acc,
                                 vqa_eval_mode="official", eval_failed=False, scorer="s"))
    data = RLData(pd.DataFrame(rows), Pool({q: range(1000, 1006) for q in range(20)}))
    h = health(data)
    m = h.frame.loc["data"]
    assert (m.oracle_in_data, m.model_pick, m.gap_mean) == (1., .5, 0.)
    assert "headroom" in [alarm.cause for alarm in h.verdict]

def test_a_share_that_is_met_is_no_alarm():
    "29 of 100 failed is 29 %, however .29 * 100 is rounded"
    assert .29 * 100 < 29
    metrics = dict(scorers=1, unrewarded=0, positive_rate=.5, failed=29, rows=100, error="")
    assert list(label_alarms(metrics, failed=.29)) == []
    assert [alarm[0] for alarm in label_alarms(metrics, failed=.28)] == ["failures"]
