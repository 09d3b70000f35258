"A scorer that gives texts alone: the whole road works, and what needs a probability is refused by name"
import math, os
from dataclasses import replace
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
from leverplus.callback_onpolicy import Drawing, Feedback
from leverplus.core import read_json
from leverplus.dls import group_dls
from leverplus.earlier_infoscore import infoscore_beams
from leverplus.earlier_json import HOLDS
from leverplus.evaluate import pick_oracle, result_table, score_picks
from leverplus.groups import RLData
from leverplus.infer import OwnAnswer, confidence, predict
from leverplus.learner import selector_learner
from leverplus.loops import Loop, closed_loop, data_checks
from leverplus.lvlm import MockScorer, Scored
from leverplus.rewards import REWARDS, check_probable, reward, text_rewards
from leverplus.rldata_ask import (
    FactCache, ask, check_reward_scorer, facts_fingerprint, facts_frame, gives_probabilities, same_scorer,
    self_test,
)
from leverplus.rldata_check import health
from leverplus.rldata_generate import NotVerified, hold, verified_text
from leverplus.rldata_merge import by_gap, merge
from leverplus.rldata_mine import Search, lacking, mine, reask
from leverplus.settings import TWO_STAGE, Job, Mining, Picking, Rewarding
from leverplus.sweep import sweep
from leverplus.synth import quiet
from test_cli import go
from test_generate import ITEMS, POOL, QS, STORE, made
from test_loops import KW as LOOP, make_world

FEW = dict(counts=dict(beam=2, random=4), progress=False, window=4)

class TextOnly(MockScorer):
    "The texts of `MockScorer`, and nothing else"
    probabilities = False
    def __init__(self, seed=0, fails=(), reference=None):
        super().__init__(seed, fails)
        self.asked = []
        self.held_to = MockScorer(seed) if reference is None else reference

    def reference(self): return self.held_to
    def run(self, prompts, targets=None, generate=True, progress=False):
        assert generate, "a probability was asked for"
        self.asked += [(p.question_id, p.pointer) for p in prompts]
        return [replace(s, logprobs=(), gt_prob=math.nan) for s in super().run(prompts, targets, generate)]

def run(path, scorer=None, **kw):
    return made(path, QS, ITEMS, POOL, scorer or TextOnly(), STORE, **{**FEW, "test": 0, **kw})

@pytest.fixture(scope="module")
def texts(tmp_path_factory): return run(tmp_path_factory.mktemp("texts")/"run")

@pytest.fixture(scope="module")
def full(tmp_path_factory): return run(tmp_path_factory.mktemp("full")/"run", MockScorer())

PAIRS = pd.DataFrame(dict(question_id=[0, 0, 1], pointer=[(1000, 1001), (), (1002,)]))
TEXTS = ["vqa_pred_answer", "vqa_raw_generation", "vqa_correct", "vqa_acc_score", "vqa_rel_score", "vqa_eval_mode"]

# ---- facts ------------------------------------------------------------------------------------------------

def test_a_row_without_a_probability_is_a_good_row_of_such_a_scorer_alone():
    assert gives_probabilities(MockScorer()) and gives_probabilities(None) and not gives_probabilities(TextOnly())
    facts = ask(PAIRS, TextOnly(), ITEMS)
    assert not facts.eval_failed.any() and facts.error.isna().all()
    assert facts.vqa_gt_prob.isna().all() and facts.vqa_gt_logprobs.isna().all()
    pd.testing.assert_frame_equal(facts[TEXTS], ask(PAIRS, MockScorer(), ITEMS)[TEXTS])
    lost = [Scored(q, p, "cat") for q, p in zip(PAIRS.question_id, PAIRS.pointer)]
    assert set(facts_frame(PAIRS, lost, ITEMS).error) == {"vqa_gt_prob is nan"}

def test_failures_and_empty_texts_stay_failures():
    facts = ask(PAIRS, TextOnly(fails=[1]), ITEMS)
    assert facts.eval_failed.tolist() == [False, False, True]
    none = [Scored(q, p) for q, p in zip(PAIRS.question_id, PAIRS.pointer)]
    assert set(facts_frame(PAIRS, none, ITEMS, probabilities=False).error) == {"no text was generated"}

def test_facts_with_and_without_lie_in_one_cache_and_do_not_mix(tmp_path):
    cache = FactCache(tmp_path/"facts")
    first = ask(PAIRS, MockScorer(), ITEMS, cache)
    scorer = TextOnly()
    second = ask(PAIRS, scorer, ITEMS, cache)
    assert len(scorer.asked) == 3 and len(cache) == 6 and not cache.texts_alone
    again = FactCache(tmp_path/"facts")
    for asked, was in ((MockScorer(fails=QS), first), (TextOnly(fails=QS), second)):
        pd.testing.assert_frame_equal(ask(PAIRS, asked, ITEMS, again), was)   # nobody is asked
    # the fingerprint of the scorer is the same, the kind of its facts is not
    assert scorer.fingerprint == MockScorer().fingerprint
    assert set(first.scorer) != set(second.scorer) == {facts_fingerprint(scorer)}
    one = FactCache(again.save(tmp_path/"all.parquet", drop=("vqa_gt_logprobs",)))
    pd.testing.assert_frame_equal(ask(PAIRS, TextOnly(fails=QS), ITEMS, one), second)

def test_probabilities_are_refused_before_anybody_is_asked():
    scorer = TextOnly()
    with pytest.raises(ValueError, match=r"ask\(generate=False\) needs probabilities .* \(TextOnly\) gives none"):
        ask(PAIRS, scorer, ITEMS, generate=False)
    assert not scorer.asked
    cache = FactCache()
    facts = ask(PAIRS, scorer, ITEMS, cache)
    pd.testing.assert_frame_equal(ask(PAIRS, None, ITEMS, cache), facts)
    with pytest.raises(ValueError, match="facts in memory: probabilities are asked for, and these facts have none"):
        ask(PAIRS, None, ITEMS, cache, generate=False)

def test_questions_that_nobody_has_answered_get_a_text():
    secret = ITEMS.assign(answers=[[] if q == 0 else said for q, said in zip(ITEMS.index, ITEMS.answers)])
    facts = ask(PAIRS, TextOnly(), secret)
    assert not facts.eval_failed.any()
    assert facts.vqa_acc_score.isna().tolist() == [True, True, False]

# ---- runs -------------------------------------------------------------------------------------------------

def test_a_run_is_kept_read_and_continued(tmp_path, texts):
    again = RLData.load(texts.path).validate(ITEMS)
    assert len(again) == 6*len(QS) and again.rows.vqa_gt_prob.isna().all()
    assert again.summary()["mean gt_prob"] == "no probabilities"
    assert "gt_prob" not in again.group(QS[0]).frame() and "nan" not in repr(again)
    silent = TextOnly()
    assert run(texts.path, silent).fingerprint == texts.fingerprint and not silent.asked
    broken = run(tmp_path/"broken", TextOnly(fails=[QS[1]]), max_failed=1.)
    assert broken.rows.eval_failed.sum() == 6
    mended = TextOnly()
    assert not run(tmp_path/"broken", mended).rows.eval_failed.any() and len(mended.asked) == 6
    saved = RLData.load(texts.save(tmp_path/"copy"))
    pd.testing.assert_frame_equal(saved.rows, texts.rows)

def test_the_self_test_has_nothing_to_compare(tmp_path):
    said = self_test(TextOnly(), ITEMS, POOL, n=6)
    assert (said["greedy_wins"], said["spearman"], said["compared"], said["failed"]) == (None, None, 0, 0)
    data = run(tmp_path/"tested", test=4)
    assert data.manifest["self_test"]["greedy_wins"] is None

def test_two_stages_are_refused_before_anything_is_written(tmp_path):
    scorer = TextOnly()
    with pytest.raises(ValueError, match="two_stage .--second. needs probabilities .*leave it out"):
        run(tmp_path/"two", scorer, two_stage=TWO_STAGE)
    assert not scorer.asked and not (tmp_path/"two").exists()

def test_texts_alone_are_verified(tmp_path):
    data = run(tmp_path/"good", verify=3)
    noted = data.manifest["verify"]
    assert (noted["asked"], noted["logprob"], noted["text"]) == (3, None, 0)
    assert verified_text(data) == "verified 3 of 3, texts alone, 0 other texts"
    with pytest.raises(NotVerified, match="texts alone are compared, and they may not differ"):
        run(tmp_path/"bad", TextOnly(reference=MockScorer(seed=1)), verify=len(QS))
    assert not list((tmp_path/"bad").glob("part*"))

def test_verified_shards_are_joined(tmp_path):
    for i in range(2): run(tmp_path/"run", shard=(i, 2), verify=2)
    noted = RLData.load(tmp_path/"run").manifest["verify"]
    assert noted["asked"] == 4 and noted["logprob"] is None

def test_a_scorer_with_probabilities_is_held_to_them_as_before():
    mine = Scored(7, (1,), "cat", (-1.,), .3)
    with pytest.raises(NotVerified, match="log P may differ by 0.001"):
        hold(mine, replace(mine, logprobs=(-2.,)), 1e-3, "")
    with pytest.raises(ValueError): hold(mine, replace(mine, logprobs=()), 1e-3, "")
    with pytest.raises(ValueError): hold(replace(mine, logprobs=()), mine, 1e-3, "")

# ---- rewards ----------------------------------------------------------------------------------------------

def test_every_reward_works_or_says_what_to_take(texts, full):
    known = {"hard_plus_soft", "hard_only", "soft_only", "hard_plus_soft_v2", "separated", "legacy"}
    assert set(text_rewards()) == known
    for mode in REWARDS:
        if mode in text_rewards():
            check_probable(texts.rows, mode)
            check_reward_scorer(TextOnly(), mode)
            np.testing.assert_array_equal(reward(texts.rows, mode), reward(full.rows, mode))
            continue
        with pytest.raises(ValueError, match=f"reward '{mode}' needs .*gives no probabilities.*hard_only"):
            check_probable(texts.rows, mode)
        with pytest.raises(ValueError, match=f"reward '{mode}' needs .*TextOnly.*hard_only"):
            check_reward_scorer(TextOnly(), mode)
        check_reward_scorer(MockScorer(), mode)
        if mode != "hybrid": check_probable(full.rows, mode)
    check_probable(texts.rows, "hybrid", alpha=0)
    with pytest.raises(ValueError, match="gives no probabilities"): reward(texts.rows, "gtprob")
    with pytest.raises(ValueError, match="'vqa_gt_prob' is missing for question_id"):
        reward(pd.concat([texts.rows, full.rows]), "gtprob")

def test_health_says_that_there_are_none(texts, full):
    for mode in ("hard_plus_soft", "hard_only"):
        h = health(dict(texts=texts), mode)
        said = repr(h) + h._repr_markdown_() + h._repr_html_()
        assert "no probabilities" in said and "nan" not in said.lower()
        assert not any("vqa_gt_prob" in alarm.remedy or "gtprob" in alarm.remedy for alarm in h.verdict)
    both = health(dict(texts=texts, full=full))
    soft = both.table().set_index("metric")
    assert soft.at["gt_prob_median", "texts"] == "no probabilities" != soft.at["gt_prob_median", "full"]
    assert any("no probabilities" in text.get_text() for ax in both.plot().flat for text in ax.texts)
    with pytest.raises(ValueError, match="reward 'gtprob' needs"): health(texts, "gtprob")

def test_data_checks_leave_out_what_is_not_known(texts, full):
    assert len(data_checks(health(texts))) == 3 and len(data_checks(health(full))) == 4

def test_records_have_probabilities_in_all_rows_or_in_none(texts, full):
    half = RLData(texts.rows[texts.rows.question_id < 6], POOL)
    rest = RLData(full.rows[full.rows.question_id >= 6], POOL)
    with pytest.raises(ValueError, match="in 1 of 2 sources only; .*facts='common'"): merge(half, rest)
    assert merge(half, rest, facts="common").validate().rows.vqa_gt_prob.isna().all()
    with pytest.raises(ValueError, match="though other rows have it"):
        RLData(pd.concat([half.rows, rest.rows], ignore_index=True), POOL).validate()
    assert len(by_gap(texts, .1, reward="hard_only").queries) > 0
    with pytest.raises(ValueError, match="reward 'gtprob' needs"): by_gap(texts, .1, reward="gtprob")

# ---- mining -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def lone(tmp_path_factory): return run(tmp_path_factory.mktemp("lone")/"run", counts=dict(random=1))

def test_mining_climbs_by_accuracy_and_relevance(lone):
    scorer = TextOnly()
    assert (lacking(lone) != "").all()
    more, log = mine(lone, ITEMS, scorer, STORE, mining=Mining(tries=3, rounds=3, top=2), progress=False)
    assert len(scorer.asked) == log.texts.sum() == len(more) - len(lone) > 0 and log.asked.sum() == 0
    assert (lacking(more) != "").sum() < len(QS)
    assert more.rows.vqa_acc_score.notna().all()
    assert Search(lone, ITEMS, scorer, STORE).by == ("vqa_acc_score", "vqa_rel_score")

def test_mining_keeps_to_its_budget(lone):
    scorer = TextOnly()
    mine(lone, ITEMS, scorer, STORE, mining=Mining(tries=3, budget=7), progress=False)
    assert len(scorer.asked) == 7

def test_mining_does_not_mix(texts, full):
    scorer = TextOnly()
    with pytest.raises(ValueError, match="have probabilities of answers, those of .*TextOnly.* are texts alone"):
        mine(full, ITEMS, scorer, STORE, progress=False)
    with pytest.raises(ValueError, match="are texts alone, those of .*MockScorer.* have probabilities"):
        mine(texts, ITEMS, MockScorer(), STORE, progress=False)
    assert not scorer.asked

def test_old_sequences_are_asked_again(full, texts):
    again = reask(full, ITEMS, TextOnly(), progress=False)
    assert again.rows.vqa_gt_prob.isna().all()
    pd.testing.assert_frame_equal(again.rows[TEXTS], full.rows[TEXTS])
    with pytest.raises(ValueError, match="its facts are of scorer"): same_scorer(full, TextOnly())
    assert same_scorer(texts, TextOnly())

def test_a_run_does_not_go_on_with_another_kind_of_facts(tmp_path):
    run(tmp_path/"run")
    with pytest.raises(ValueError, match="scorer"): run(tmp_path/"run", MockScorer())

@pytest.mark.parametrize("dialect", sorted(HOLDS))
def test_earlier_files_hold_them(tmp_path, texts, dialect):
    file = tmp_path/"texts.json"
    texts.to_json(file, dialect, "question_id", ITEMS)
    back = RLData.from_json(file, None if dialect == "k64" else POOL, "question_id", dialect, ITEMS)
    assert back.rows.vqa_gt_prob.isna().all() and not back.rows.eval_failed.any()
    key = ["question_id", "pointer"]
    both = texts.rows.merge(back.rows, on=key, suffixes=("", "_back"))
    assert len(both) == len(texts) and (both.vqa_acc_score - both.vqa_acc_score_back).abs().max() < 1e-9

# ---- training and after -----------------------------------------------------------------------------------

def halves(data):
    at = data.rows.question_id < 8
    return RLData(data.rows[at], POOL), RLData(data.rows[~at], POOL)

def test_loaders_and_training(texts, full):
    dls = group_dls(*halves(texts), STORE, "hard_only", bs=4)
    learn = selector_learner(dls, seed=0)
    with quiet(learn): learn.fit_rce(1)
    with pytest.raises(ValueError, match="reward 'gtprob' needs"): group_dls(*halves(texts), STORE, "gtprob", bs=4)

def test_rounds_on_policy():
    scorer = TextOnly()
    with pytest.raises(ValueError, match="reward 'gtprob' needs probabilities .*TextOnly"):
        Feedback(scorer, ITEMS, rewarding=Rewarding(reward="gtprob"))
    feedback = Feedback(scorer, ITEMS, rewarding=Rewarding(reward="hard_only"))
    facts = ask(PAIRS, scorer, ITEMS)
    np.testing.assert_array_equal(feedback(PAIRS), facts.vqa_correct)
    with pytest.raises(ValueError, match="reward 'hard01_plus_gtprob' needs 'vqa_gt_prob', and no row has it"):
        Feedback(None, ITEMS, facts, Rewarding(reward="hard01_plus_gtprob"))
    assert len(Feedback(None, ITEMS, facts, Rewarding(reward="soft_only"))(PAIRS)) == 3

def test_a_fit_on_policy(texts):
    scorer = TextOnly()
    learn = selector_learner(group_dls(*halves(texts), STORE, "hard_only", bs=4), seed=0)
    feedback = Feedback(scorer, ITEMS, rewarding=Rewarding(reward="hard_only"))
    with quiet(learn): learn.fit_onpolicy(feedback, STORE, 1, 1e-2, "grpo", Drawing(G=4, bs=4), watch=None)
    assert len(scorer.asked) == feedback.new > 0

@pytest.mark.parametrize("picking, what", [
    (dict(picker="samples", by="confidence"), "choosing by confidence"),
    (dict(picker="samples", by="vqa_gt_prob"), "choosing by vqa_gt_prob"),
    (dict(picker="samples", by="vote", weight="confidence"), "choosing by confidence"),
    (dict(picker="random", shots=(0, 1)), r"choosing among shots \(0, 1\) by confidence"),
])
def test_predictions_that_need_a_probability_are_refused(tmp_path, texts, picking, what):
    scorer = TextOnly()
    model = selector_learner(group_dls(*halves(texts), STORE, "hard_only", bs=4), seed=0).model
    with pytest.raises(ValueError, match=f"{what} needs probabilities .*choose by vote or logp"):
        predict(tmp_path/"no", POOL, ITEMS, scorer, STORE, Picking(**picking), model=model, progress=False)
    assert not scorer.asked and not (tmp_path/"no").exists()

def test_predictions(tmp_path, texts):
    model = selector_learner(group_dls(*halves(texts), STORE, "hard_only", bs=4), seed=0).model
    def go(name, judge=None, **picking):
        how = dict(model=model, judge=judge, progress=False)
        return predict(tmp_path/name, POOL, ITEMS, TextOnly(), STORE, Picking(**picking), **how)

    for by in ("vote", "logp"): assert go(by, picker="samples", by=by).metrics["n"] == len(QS)
    def fewest_letters(c):
        assert "confidence" not in c
        return -c.vqa_pred_answer.str.len()

    assert go("judged", fewest_letters, picker="samples").metrics["n"] == len(QS)
    frame = go("plain", picker="random").frame("predictions.parquet")
    assert frame.vqa_gt_prob.isna().all() and frame.vqa_acc_score.notna().all()
    with pytest.raises(ValueError, match="confidence needs probabilities"): OwnAnswer(TextOnly())
    with pytest.raises(ValueError, match="confidence needs probabilities"): confidence(PAIRS, TextOnly(), ITEMS)

def test_comparisons_are_of_accuracy(texts):
    facts = texts.rows[["question_id", "pointer", "vqa_acc_score", "vqa_gt_prob", "vqa_pred_answer", "eval_failed"]]
    oracle = pick_oracle(facts, 2)
    first = facts.drop_duplicates("question_id")
    picks = oracle.drop(columns="exact").assign(selector="random", pointer=first.pointer.tolist())
    scored = score_picks(pd.concat([oracle, picks]), facts)
    table = result_table(scored, changed_from=None)
    assert table.acc.notna().all()
    with pytest.raises(ValueError, match="oracle by vqa_gt_prob: .*gives no probabilities"):
        pick_oracle(facts, 2, by="vqa_gt_prob")
    with pytest.raises(ValueError, match="a table of vqa_gt_prob: .*gives no probabilities"):
        result_table(scored, changed_from=None, metric="vqa_gt_prob")

def test_a_closed_loop(tmp_path):
    c = closed_loop(make_world(TextOnly()), tmp_path/"loop", **LOOP)
    assert "nan" not in "".join(c.lines) and not any("rank correlation" in name for name in c.frame.what)
    assert any(line.startswith("GRPO:") for line in c.lines)

def test_loops_and_searches_are_refused_before_anything_is_written(tmp_path, texts):
    scorer = TextOnly()
    world = SimpleNamespace(items=ITEMS, store=STORE, scorer=scorer, pools=dict(train=POOL, dev=POOL))
    wanted = {"reward 'gtprob'": dict(reward="gtprob"), "two_stage .--second.": dict(two_stage=TWO_STAGE)}
    for what, changes in wanted.items():
        with pytest.raises(ValueError, match=f"{what} needs probabilities"):
            Loop(world, tmp_path/"loop", n=4, dev=4, **changes)
    with pytest.raises(ValueError, match="a search by InfoScore needs probabilities"):
        infoscore_beams(QS, ITEMS, POOL, scorer, progress=False)
    train, dev = halves(texts)
    for grid in (dict(reward=["hard_only", "gtprob"]), dict(reward=["hybrid"])):
        with pytest.raises(ValueError, match="reward '(gtprob|hybrid)' needs"):
            sweep(tmp_path/"sweep", grid, dict(train=train, dev=dev), world)
    assert not scorer.asked and not list(tmp_path.iterdir())

# ---- doors ------------------------------------------------------------------------------------------------

ROAD = (
    "embed --split train dev --quiet",
    "generate --n 12 --test 4 --verify 2 --quiet --out runs/train",
    "generate --n 12 --split dev --test 0 --quiet --out runs/dev",
    "check runs/train runs/dev --csv runs/health",
    "check runs/train --reward hard_only",
    "mine runs/train --out runs/mined --rounds 1 --tries 2 --quiet",
    "merge runs/train runs/mined --out runs/all --min-gap .1 --reward hard_only",
    "train runs/all --dev runs/dev --objective rce --reward hard_only --out runs/rce --epochs 2 --bs 4",
    "train runs/all --dev runs/dev --objective listwise --out runs/listwise --epochs 1 --bs 4",
    "infer --selector runs/rce --n 12 --quiet --out runs/answers",
    "infer --selector runs/rce --n 12 --how beam --by vote --quiet --out runs/voted",
    "eval --selector runs/rce --n 12 --shots 1 2 --draws 2 --fixed 2 --facts runs/dev --quiet --out runs/eval",
    "report runs/eval --cases 4 --groups runs/all",
    (
        "sweep runs/all --dev runs/dev --grid reward=hard_only,soft_only --base objective=rce rce.n_epoch=1 bs=4"
        " --seeds 0 --quiet --out runs/sweep"
    ),
)

@pytest.fixture(scope="module")
def road(tmp_path_factory):
    "All doors on twelve questions, with a scorer of texts alone: (folder, {line: what was said})"
    folder = tmp_path_factory.mktemp("road")
    was = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "scorer", lambda self: TextOnly())
        os.chdir(folder)
        try: yield folder, {line: go(line) for line in ROAD}
        finally: os.chdir(was)

def test_the_road_through_the_doors(road):
    folder, said = road
    for name in ("train", "dev", "mined", "all"):
        data = RLData.load(folder/"runs"/name)
        assert len(data) and data.rows.vqa_gt_prob.isna().all() and data.rows.vqa_acc_score.notna().any()
    assert "verified 2 of 2, texts alone, 0 other texts" in said[ROAD[1]]
    assert "no probabilities" in said[ROAD[3]] and "nan" not in said[ROAD[3]].lower()
    assert pd.read_csv(folder/"runs/eval/results.csv").acc.notna().all()
    page = (folder/"runs/eval/report.html").read_text()
    assert ">nan<" not in page.lower()
    assert pd.read_csv(folder/"runs/sweep/cells.csv").status.tolist() == ["done"]*2
    assert read_json(folder/"runs/train/manifest.json")["self_test"]["spearman"] is None

@pytest.mark.parametrize("line, says", [
    (
        "train runs/all --dev runs/dev --objective rce --reward gtprob --out runs/no",
        "reward 'gtprob' needs 'vqa_gt_prob'",
    ),
    (
        'train runs/all --dev runs/dev --recipe ours --set {"data":{"reward":"gtprob"}} --out runs/no',
        "recipe ours: reward 'gtprob' needs",
    ),
    ("check runs/all --reward hard01_plus_gtprob", "reward 'hard01_plus_gtprob' needs 'vqa_gt_prob'"),
    ("merge runs/all --min-gap .1 --reward gtprob --out runs/no", "reward 'gtprob' needs 'vqa_gt_prob'"),
    (
        "sweep runs/all --dev runs/dev --grid reward=gtprob --base objective=rce --seeds 0 --out runs/no",
        "reward 'gtprob' needs 'vqa_gt_prob'",
    ),
    ('generate --n 12 --second {"top":2} --out runs/no', "two_stage (--second) needs probabilities"),
    ("infer --selector runs/rce --n 12 --how beam --by confidence --out runs/no", "choosing by confidence needs"),
    ("infer --selector runs/rce --n 12 --how beam --by vqa_gt_prob --out runs/no", "choosing by vqa_gt_prob needs"),
    ("infer --selector runs/rce --n 12 --shots 0 1 2 --out runs/no", "choosing among shots (0, 1, 2) by confidence"),
])
def test_a_door_says_what_to_take_instead(road, line, says):
    folder, _ = road
    said = go(line.split(), 2)
    assert says in said
    assert not (folder/"runs/no").exists()
