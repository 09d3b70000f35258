"Rewards: values by hand, ranges, failures, and errors that name column and query"
import numpy as np, pandas as pd, pytest
from hypothesis import given, strategies as st
from leverplus.rewards import REWARDS, plot_rewards, reward, reward_facts

def rows(acc=(1, .6, 0, np.nan), gt=(.8, .3, .1, np.nan)):
    acc = np.array(acc, float)
    return pd.DataFrame(dict(question_id=[7, 7, 7, 8], vqa_acc_score=acc, vqa_correct=np.where(np.isnan(acc), np.nan, acc > 0), vqa_gt_prob=gt, eval_failed=[False]*3 + [True]))

@pytest.mark.parametrize("mode, weights, want", [
    ("hard_plus_soft", {}, [2, 1.6, 0]), ("hard_plus_soft", dict(hard_weight=2, soft_weight=.5), [2.5, 2.3, 0]), ("hard_only", {}, [1, 1, 0]), ("hard_only", dict(hard_weight=3.), [3, 3, 0]),
    ("soft_only", {}, [1, .6, 0]), ("gtprob", {}, [.8, .3, .1]), ("gtprob", dict(soft_weight=.5), [.4, .15, .05])])
def test_values_by_hand(mode, weights, want):
    r = reward(rows(), mode, **weights)
    np.testing.assert_allclose(r[:3], want); assert np.isnan(r[3]) and r.dtype == np.float64

def test_hard_plus_soft_is_the_default(): np.testing.assert_allclose(reward(rows())[:3], [2, 1.6, 0])

@given(st.lists(st.tuples(st.sampled_from([0, .3, .6, .9, 1.]), st.floats(0, 1)), min_size=1, max_size=20))
def test_ranges_and_order(facts):
    acc, gt = np.array(facts).T; f = pd.DataFrame(dict(question_id=0, vqa_acc_score=acc, vqa_correct=(acc > 0)*1., vqa_gt_prob=gt, eval_failed=False))
    for m in REWARDS: r = reward(f, m); assert np.isfinite(r).all() and r.min() >= 0 and r.max() <= (2 if m == "hard_plus_soft" else 1)
    best = np.argsort(acc, kind="stable"); assert (np.diff(reward(f)[best]) >= 0).all()

def test_failed_rows_are_never_a_number_even_with_facts():
    assert np.isnan(reward(rows(acc=(1, .6, 0, 0), gt=(.8, .3, .1, 0)))[3])

@pytest.mark.parametrize("mode", REWARDS)
def test_missing_facts_are_errors(mode):
    for c in reward_facts(mode)[0]:
        with pytest.raises(ValueError, match=f"needs column '{c}'"): reward(rows().drop(columns=c), mode)
        with pytest.raises(ValueError, match=f"'{c}' is missing for question_id 7"): reward(rows().assign(**{c: [1, np.nan, 1, np.nan]}), mode)

def test_unknown_mode_and_weight():
    with pytest.raises(ValueError, match="hard_plus_soft"): reward(rows(), "nothing")
    with pytest.raises(TypeError, match="soft_weight"): reward(rows(), "hard_only", soft_weight=1)

def test_frame_is_left_alone():
    a = rows(); b = a.copy(); reward(a); pd.testing.assert_frame_equal(a, b)

def test_plot(): assert len(plot_rewards().lines) == 3
