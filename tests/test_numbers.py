"One guard for every number that a person can give: finite, in its range, refused by name before anything begins"
import copy, inspect, math, pickle
from dataclasses import dataclass, replace
from typing import Literal, get_args
import numpy as np, pytest, torch
from fastcore.basics import patch
from fastcore.meta import delegates
from bad_numbers import bad_numbers, callables, direct, good_values, guarded_arguments, modules
from leverplus.callback_grpo import GRPO
from leverplus.groups import check_shard
from leverplus.identity import code_fingerprint
from leverplus.learner import Stage
from leverplus.recipes import check_recipe, recipe
from leverplus.rewards import reward, reward_facts
from leverplus.rldata_merge import by_gap
from leverplus.selector import PointerSelector
from leverplus.settings import (
    Count, Guard, LearningRate, Bound, Natural, Positive, Share, Teaching, Whole, check_numbers, guarded,
    has_numbers,
)
from leverplus.statistics import Bootstrap
from leverplus.training import recipe_of

# ---- who must be guarded -----------------------------------------------------------------------------------

# the pages before 04_settings, which imports none of them; seeds and sizes go to numpy and torch, which refuse NaN
BEFORE = {"core", "runs", "toy", "synth"}
# ids are looked up, and one that nobody knows is named; whatever an id may be is the business of `as_id`
IDS = {"question_id", "image_id", "query"}
# records that the code makes for itself out of numbers that it has checked or counted
RECORDS = {
    "cli.SweepPlan", "cost.TextSizes", "cost.TowerSizes", "cost.Cost", "decode.SequenceLength", "loops.Round",
    "loops.Rounds", "lvlm.Scored", "markup.Heading", "picker.Picked", "report.Findings",
    "rldata_propose.ProposalBlock", "rldata_scale.Embedded", "scorer.ScorerStats", "scorer.ReadyPrompt",
    "scorer.PackedBatch", "selector.Encoded", "served.ServedStats", "sweep.SweepData", "table.FullTable",
}
# inner steps: places, tokens and temperatures that a guarded function hands down
INSIDE = {
    "callback_core.StageCallback.log", "callback_core.Stats.mean", "decode.SequenceLength.count",
    "decode.Stepwise.start", "decode.Stepwise.point", "dls.GroupDataset.rows_of", "dls.GroupDataset.name",
    "losses.kl_exact", "losses.entropy_exact", "offpolicy.stored_logp", "rldata_ask.facts_frame",
    "rldata_propose.Proposals.add", "rldata_propose.block_of", "scorer.rope_positions", "scorer.Trie.reads",
    "scorer.tree_inputs", "scorer.pack_pieces", "scorer.even_parts", "scorer.cache_rows", "scorer.read_logits",
    "scorer.walk_tree", "selector.PointerLogits.start", "selector.PointerNet.point", "selector.PointerSelector.sample",
    "selector.PointerSelector.enumerate", "selector.with_end", "selector.tree_logps", "vision.grouped_sdpa",
    "loops.Loop.propose",
}
# what fastai is handed as it comes
FASTAI = {"learner.SelectorLearner.export"}

def plain_numbers():
    "Arguments for a number that no number type guards: names, each with its module, function and argument"
    for module, name, f in callables():
        own = f"{module}.{name}".removesuffix(".__init__")
        if module in BEFORE or own in RECORDS | INSIDE | FASTAI: continue
        for parameter in inspect.signature(inspect.unwrap(f)).parameters.values():
            if parameter.name not in IDS and is_plain(parameter): yield f"{own}.{parameter.name}"

def is_plain(parameter):
    "Is it a number by its annotation, or by its default where there is none?"
    hint = parameter.annotation
    if hint is parameter.empty: return type(parameter.default) in (int, float)
    return hint in (int, float) or not direct(hint) and bool({int, float} & set(get_args(hint)))

def test_every_number_of_a_public_function_is_guarded():
    assert list(plain_numbers()) == []

def test_the_exemptions_are_not_stale():
    there = {f"{module}.{name}".removesuffix(".__init__") for module, name, _ in callables()}
    assert RECORDS | INSIDE | FASTAI <= there

def test_a_guarded_annotation_is_decorated():
    without = []
    for module, name, f in callables():
        if module == "settings": continue # groups check themselves
        for parameter in inspect.signature(inspect.unwrap(f)).parameters.values():
            if not has_numbers(parameter.annotation): continue
            assert parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD), name
            if parameter.name not in getattr(f, "guards", {}): without.append(f"{module}.{name}.{parameter.name}")
    assert without == []

# ---- what is refused ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def cases():
    "Bad numbers by module"
    out = {}
    for name, argument, value, call in bad_numbers():
        out.setdefault(name.split(".")[0], []).append((name, argument, value, call))
    return out

def test_there_are_many_of_them(cases):
    assert sum(map(len, cases.values())) >= 5000
    assert len({(name, argument) for rows in cases.values() for name, argument, *_ in rows}) >= 600

@pytest.mark.parametrize("module", [name for name, _ in modules()])
def test_bad_numbers_are_refused_by_name_before_the_body_runs(cases, module):
    for name, argument, value, call in cases.get(module, ()):
        with pytest.raises(ValueError) as e: call()
        assert f": {argument} " in str(e.value) and ": wanted " in str(e.value), (name, argument, value)
        assert len(str(e.value)) < 500 and "\n" not in str(e.value)

def test_good_numbers_and_defaults_pass():
    for name, f, argument, hint in guarded_arguments():
        default = inspect.signature(f).parameters[argument].default
        for value in (*good_values(hint), *([] if default is inspect.Parameter.empty else [default])):
            passed = f.guards[argument](value)
            assert passed == value, (name, argument, value)

@pytest.mark.parametrize("call, says", [
    (lambda: GRPO(beta=2, clip_low=-1), "GRPO: clip_low -1: wanted a number >= 0"),
    (lambda: GRPO(min_std=math.nan), "GRPO: min_std nan: wanted a number >= 0"),
    (lambda: PointerSelector(4, temp=math.nan), "PointerSelector: temp nan: wanted a number > 0"),
    (lambda: PointerSelector(4, dropout=2), "PointerSelector: dropout 2: wanted a number >= 0 and <= 1"),
    (lambda: by_gap(None, lo=math.nan), "by_gap: lo nan: wanted a number >= 0"),
    (lambda: Bootstrap(level=2), "Bootstrap: level 2: wanted a number between 0 and 1"),
    (lambda: replace(Bootstrap(), n=2.5), "Bootstrap: n 2.5: wanted a whole number >= 0"),
    (lambda: Stage(max_norm=math.inf), "Stage: max_norm inf: wanted a number > 0 or None"),
    (lambda: reward(None, price=math.nan), "reward: price nan: wanted a number >= 0"),
    (lambda: reward_facts("hybrid", alpha=2), "reward 'hybrid': alpha 2: wanted a number >= 0 and <= 1"),
    (lambda: Teaching(objective="rce", lr=1e30), "lr 1e[+]30: wanted a number <= 1000"),
])
def test_the_sentence_names_who_what_and_the_range(call, says):
    with pytest.raises(ValueError, match=f"^{says}"): call()

# ---- doors -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, says", [
    (dict(listwise=dict(lr=-.1)), "recipe ours, stage 3 .listwise.: lr -0.1: wanted"),
    (dict(listwise=dict(lr=1e30)), "lr 1e[+]30: wanted"),
    (dict(listwise=dict(n_epoch=-1)), "n_epoch -1: wanted a whole number >= 0"),
    (dict(listwise=dict(n_epoch="3")), "n_epoch '3': wanted"),
    (dict(listwise=dict(max_norm=-1)), "max_norm -1: wanted"),
    (dict(listwise=dict(limits=[.1, -1.])), "limits -1.0: wanted"),
    (dict(warmup=dict(K=2.5)), "stage 1 .warmup.: K 2.5: wanted"),
    (dict(listwise=dict(cbs=[["KLToRef", dict(beta=-1)]])), "callback KLToRef: beta -1: wanted"),
    (dict(listwise=dict(cbs=[["GRPO", dict(min_live=2)]])), "callback GRPO: min_live 2: wanted"),
    (dict(data=dict(filters=[["by_gap", dict(lo=-1)]])), "filter by_gap: lo -1: wanted"),
    (dict(data=dict(bs=0)), "recipe ours, data: bs 0: wanted"),
    (dict(data=dict(reward="hybrid", weights=dict(alpha=2))), "reward 'hybrid': alpha 2: wanted"),
    (dict(model=dict(dropout=2)), "recipe ours, model: dropout 2: wanted"),
])
def test_a_recipe_is_refused_as_a_whole_before_its_first_stage(changes, says):
    with pytest.raises(ValueError, match=says): recipe("ours", **changes)
    with pytest.raises(ValueError, match=says): recipe_of(Teaching(set=changes))
    assert check_recipe(recipe("ours"))

@pytest.mark.parametrize("shard", [(1.5, 3), (math.nan, 3), ("1", "3"), (True, 3), (0, math.inf)])
def test_a_shard_is_two_whole_numbers(shard):
    with pytest.raises(ValueError, match="shard .*: wanted a whole number"): check_shard(shard)

def test_settings_of_grpo_are_looked_at_before_the_stage_before_it():
    with pytest.raises(ValueError, match="stage 2 .grpo.: clip_low -1"): recipe("corrected", grpo=dict(clip_low=-1))
    with pytest.raises(ValueError, match="stage 2 .grpo.: min_live 2"): recipe("corrected", grpo=dict(min_live=2))

@pytest.mark.parametrize("teaching, says", [
    (dict(objective="rce", set=dict(temp=0)), "objective rce .rce.: temp 0: wanted a number > 0"),
    (dict(objective="rce", set=dict(max_norm=-1)), "max_norm -1: wanted"),
    (dict(objective="grpo", set=dict(min_live=2)), "objective grpo .grpo.: min_live 2: wanted"),
    (dict(objective="sft", new=dict(dropout=2)), "model: dropout 2: wanted"),
])
def test_an_objective_is_refused_before_data_are_opened(teaching, says):
    with pytest.raises(ValueError, match=says): recipe_of(Teaching(**teaching))

# ---- how the guard behaves ---------------------------------------------------------------------------------

@guarded
def told(n:Natural, share:Share=.5, *, limit:Bound=math.inf, how:Count|Literal["all"]|None=None):
    "Say what came"
    return n, share, limit, how

class Holder: pass

@patch
@guarded
def held(self:Holder, n:Count=1): return n

@delegates(told)
@guarded
def more(rate:LearningRate=.1, **kwargs): return rate, told(1, **kwargs)

@guarded
@dataclass(frozen=True)
class Record:
    n:Count=1

def test_good_numbers_go_on_as_they_are_and_whole_ones_as_int():
    n, share, limit, how = told(np.int64(3), np.float32(.25), limit=math.inf, how="all")
    assert type(n) is int and type(share) is np.float32 and (n, share, limit, how) == (3, .25, math.inf, "all")
    assert type(told(5.)[0]) is int and type(told(1, 1)[1]) is int

NONE = [True, "3", None, math.nan, -1, 2.5, 2**63, 10**5000, [1], [10**5000], np.array([1])]

@pytest.mark.parametrize("value", NONE, ids=range(len(NONE)))
def test_what_is_no_such_number_is_refused_wherever_it_stands(value):
    with pytest.raises(ValueError, match="^told: n "): told(value)
    with pytest.raises(ValueError, match="^told: n "): told(n=value)

def test_words_beside_numbers_are_those_that_are_named():
    with pytest.raises(ValueError, match="how 'some': wanted a whole number >= 1, 'all' or None"): told(1, how="some")
    for odd in (np.array([1, 2]), torch.ones(2), ["all"], True, 0):
        with pytest.raises(ValueError, match="^told: how .*: wanted a whole number >= 1, 'all'"): told(1, how=odd)

def test_a_tensor_passes_only_where_the_annotation_has_it():
    one = torch.tensor(1.)
    assert Guard("temp", Positive|torch.Tensor)(one) is one
    with pytest.raises(ValueError, match="temp tensor"): Guard("temp", Positive)(one)

def test_parts_are_looked_at():
    shares = Guard("shares", tuple[Share, ...])
    assert shares((.5, 1)) == (.5, 1) and shares([0., .5]) == [0., .5]
    with pytest.raises(ValueError, match="shares nan: wanted a number >= 0 and <= 1"): shares((.5, math.nan))
    with pytest.raises(ValueError, match="shares 3: wanted several numbers >= 0 and <= 1"): shares(3)
    with pytest.raises(ValueError, match="temps -1: wanted"): Guard("temps", dict[Positive, Natural])({.5: -1})

def test_a_guarded_function_is_still_itself():
    assert pickle.loads(pickle.dumps(told)) is told and copy.deepcopy(told) is told
    assert told.__doc__ == "Say what came" and inspect.getsource(told).startswith("@guarded\ndef told(n:Natural")
    assert str(inspect.signature(told)).startswith("(n: 'Natural', share: 'Share' = 0.5, *, limit: 'Bound' = inf")
    assert pickle.loads(pickle.dumps(Record(2))) == Record(2)

def test_a_guard_does_not_change_what_code_is():
    def plain(n:Natural): return n + 1
    assert code_fingerprint(guarded(plain)) == code_fingerprint(plain)

def test_patch_delegates_and_dataclasses_are_guarded():
    assert Holder().held(2) == 2 and more(share=.1) == (.1, (1, .1, math.inf, None))
    assert list(inspect.signature(more).parameters) == ["rate", "share", "limit", "how"]
    with pytest.raises(ValueError, match="^held: n 0|^Holder.held: n 0"): Holder().held(0)
    with pytest.raises(ValueError, match="^told: share 7"): more(share=7)
    with pytest.raises(ValueError, match="^Record: n 0"): Record(0)
    with pytest.raises(ValueError, match="^Record: n -1"): replace(Record(), n=-1)

def test_there_must_be_something_to_guard():
    def nothing(x:int): return x
    with pytest.raises(TypeError, match="nothing to guard"): guarded(nothing)

def test_check_numbers_looks_at_what_a_class_inherits():
    check_numbers("stage 1", dict(clip_low=.1, whatever=-1), GRPO)
    with pytest.raises(ValueError, match="^stage 1: min_live 2: wanted"):
        check_numbers("stage 1", dict(min_live=2), GRPO)

def test_infinity_belongs_only_where_it_is_named():
    assert Guard("hi", Bound)(math.inf) == math.inf
    for hint in (Positive, Share, Whole, LearningRate):
        for value in (math.inf, -math.inf, math.nan, 10**400):
            with pytest.raises(ValueError, match="^x "): Guard("x", hint)(value)
