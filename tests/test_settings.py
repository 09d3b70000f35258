"Settings: groups that check themselves, are saved and read back, and agree with the pages that use them"
import inspect, json, pickle, re, subprocess, sys
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints
import numpy as np, pytest, torch
from hypothesis import given, settings as examples, strategies as st
from leverplus.settings import (
    COUNTS, TWO_STAGE, Asking, Count, Data, Guarding, Job, Mining, Model, Picking, Pools, Proposing,
    Rewarding, Teaching, change, check_counts, draft, flag, flat_names, group, json_object, plain_settings,
    read_settings, settings_of,
)

GROUPS = Data, Pools, Model, Asking, Proposing, Guarding, Mining, Job, Picking, Rewarding

# ---- a group of its own ------------------------------------------------------------------------------------

@group
class Lamp:
    "A lamp"
    watts:Count # how strong
    place:Annotated[str, flag(name="where")]="desk" # where it stands

@group
class Room:
    "A room"
    lamp:Lamp=Lamp(watts=5)
    doors:Count=1 # how many

def test_a_group_is_frozen_and_takes_keywords_only():
    lamp = Lamp(watts=5)
    with pytest.raises(FrozenInstanceError): lamp.watts = 6
    with pytest.raises(ValueError, match="5: Lamp takes its settings by name"): Lamp(5)
    assert lamp == Lamp(watts=5) != Lamp(watts=6)
    assert replace(lamp, watts=7).watts == 7
    with pytest.raises(ValueError, match="watts 0"): replace(lamp, watts=0)
    assert pickle.loads(pickle.dumps(Job())) == Job()

@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Lamp(), "watts is missing: it has no default"),
        (lambda: Lamp(watts=0), "watts 0: wanted a number >= 1"),
        (lambda: Lamp(watts=2.5), "watts 2.5: "),
        (lambda: Lamp(watts="many"), "watts 'many': "),
        (lambda: Lamp(watt=5, watts=5), "watt: no such setting; did you mean watts[?]"),
        (lambda: Lamp(zzz=5, watts=5), "zzz: no such setting of Lamp"),
        (lambda: Lamp(watts=0, place=3), "watts 0: .*; place 3: "),
        (lambda: read_settings(Room, dict(lamp=dict(watts=-1))), "lamp.watts -1: wanted a number >= 1"),
        (lambda: read_settings(Room, dict(lamp=dict(watts=1, wats=2))), "lamp.wats: no such.* did you mean watts"),
        (lambda: read_settings(Room, dict(door=2)), "door: no such setting; did you mean doors"),
        (lambda: settings_of(Room, place="shelf"), "place: no such setting"),
        (lambda: settings_of(Room, wher="shelf"), "wher: no such setting; did you mean where"),
    ],
)
def test_what_is_wrong_is_said_in_words(make, says):
    with pytest.raises(ValueError, match=says) as e: make()
    assert "\n" not in str(e.value) and "pydantic" not in str(e.value)

def test_a_flag_may_have_another_name_than_its_field():
    assert flat_names(Room) == dict(watts=("lamp", "watts"), where=("lamp", "place"), doors=("doors",))
    room = settings_of(Room, where="shelf", doors=2)
    assert room == Room(lamp=Lamp(watts=5, place="shelf"), doors=2)
    assert change(room, lamp=Lamp(watts=9), where="floor").lamp == Lamp(watts=9, place="floor")
    assert room.lamp.place == "shelf"

# ---- our groups --------------------------------------------------------------------------------------------

def leaves(cls, above=()):
    "(path, hint) of every setting that is no group"
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if name not in {f.name for f in fields(cls)}: continue
        if is_dataclass(hint): yield from leaves(hint, above + (name,))
        else: yield above + (name,), hint

def at(value, path):
    for name in path: value = getattr(value, name)
    return value

@pytest.mark.parametrize("cls", GROUPS)
def test_every_setting_has_a_flat_name_of_its_own(cls):
    paths = [path for path, _ in leaves(cls)]
    assert sorted(flat_names(cls).values()) == sorted(paths)

@pytest.mark.parametrize("cls", GROUPS)
def test_every_setting_says_what_it_is(cls):
    source = inspect.getsource(cls)
    for f in fields(cls):
        if is_dataclass(f.type): continue
        assert re.search(rf"^    {f.name}:.* # \S", source, re.M), f"{cls.__name__}.{f.name}"
    assert cls.__doc__

NOT_THE_DEFAULT = dict(
    data="elsewhere", reader="vqav2", candidates="dev", images="pictures", check="decode", clip="a-clip",
    store="kept", K=9, sampler="text", pool_seed=3, lvlm="mock", dtype="bfloat16", device="cpu", attn="eager",
    batch_tokens=7, prefix_cache="query", vision_dir="seen", style="chat", evaluator="lmms", answer_weight="count3",
    two_stage=dict(top=1, low=0, random=3), shots=(1, 3), counts=check_counts(dict(beam=2, temperature={.5: 1})),
    kind="text", scale=2.5, seed=4, window=5, test=0, verify=2, max_failed=.5, tries=2, top=1, rounds=9, budget=10,
    split="dev", limit=6, picker="beam", width=2, temp=.5, by="vote", weight="confidence", threshold=.1,
    fixed=(3, 1), name="mine", other_pool=True, seconds=5.5, reward="gtprob", weights=dict(alpha=2.),
    price=.25, zero_shot=True, min_pixels=784, max_pixels=7840,
    columns=("question=q",),
    lvlm_url="http://127.0.0.1:8000/v1", lvlm_name="tiny", lvlm_at_once=4, lvlm_timeout=5.5, lvlm_patience=0.,
    lvlm_pictures="files", lvlm_way="prompt", lvlm_price=.5, lvlm_price_said=1.5,
)
SERVED = (
    "lvlm_name", "lvlm_at_once", "lvlm_timeout", "lvlm_patience", "lvlm_pictures", "lvlm_way", "lvlm_price",
    "lvlm_price_said",
)
OUR_ENGINE = "attn", "batch_tokens", "prefix_cache", "vision_dir" # none of these beside an address

URL = NOT_THE_DEFAULT["lvlm_url"]

def beside(flat):
    "What must be said together with a setting"
    return dict(lvlm_url=URL) if flat in SERVED else {}

@pytest.mark.parametrize("cls", GROUPS)
def test_a_flat_name_changes_its_setting_and_no_other(cls):
    for flat, path in flat_names(cls).items():
        before = settings_of(cls, **beside(flat))
        changed = change(before, **{flat: NOT_THE_DEFAULT[flat]})
        differ = [p for p, _ in leaves(cls) if at(changed, p) != at(before, p)]
        assert differ == [path], flat
        assert at(changed, path) == NOT_THE_DEFAULT[flat]
        assert change(changed, **{flat: at(cls(), path)}) == before

@pytest.mark.parametrize("without", [("lvlm_url", *SERVED), ("lvlm", *OUR_ENGINE)])
@pytest.mark.parametrize("cls", GROUPS)
def test_what_is_not_the_default_is_saved_and_read_back(cls, without):
    every = settings_of(cls, **{flat: NOT_THE_DEFAULT[flat] for flat in flat_names(cls) if flat not in without})
    assert read_settings(cls, json.loads(json.dumps(plain_settings(every)))) == every
    assert read_settings(cls, {}) == cls()

def test_prices_of_a_served_model():
    def prices(**said): return Model(lvlm_url=URL, **said).prices
    assert prices() == () and prices(lvlm_price=2) == (2, 2) and prices(lvlm_price_said=3) == (0, 3)
    assert prices(lvlm_price=2, lvlm_price_said=3) == (2, 3)

counts = st.fixed_dictionaries({}, optional=dict(
    beam=st.integers(0, 9), random=st.integers(0, 9), retrieval=st.integers(0, 9),
    temperature=st.dictionaries(st.floats(.01, 9), st.integers(0, 9), max_size=3),
)).filter(lambda c: any([*c.get("temperature", {}).values(), *(n for k, n in c.items() if k != "temperature")]))
two_stage = st.none() | st.fixed_dictionaries(dict(top=st.integers(0, 9), low=st.integers(0, 9))).filter(
    lambda c: any(c.values())
)

@examples(max_examples=100)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True), counts, two_stage, st.floats(1e-3, 99),
       st.integers(0, 2**40), st.floats(0, 1), st.integers(6, 64))
def test_any_job_is_saved_and_read_back(shots, counts, two_stage, scale, seed, share, K):
    job = settings_of(Job, shots=shots, counts=counts, two_stage=two_stage, scale=scale, seed=seed,
                      max_failed=share, K=K)
    again = read_settings(Job, json.loads(json.dumps(plain_settings(job))))
    assert again == job
    assert plain_settings(again) == plain_settings(job)
    assert change(job, seed=1, pool_seed=2) == change(change(job, pool_seed=2), seed=1)

@pytest.mark.parametrize(
    "cls, bad, says",
    [
        (Data, dict(reader="gqa"), "choose one of 'okvqa', 'vqav2', 'soft_labels'"),
        (Data, dict(check="no"), "check 'no'"),
        (Pools, dict(K=0), "K 0"),
        (Pools, dict(pool_seed=-1), "seed -1: wanted a number >= 0"),
        (Model, dict(dtype="int8"), "choose one of 'float32', 'bfloat16', 'float16'"),
        (Model, dict(batch_tokens=0), "batch_tokens 0"),
        (Model, dict(lvlm_url="127.0.0.1:8000"), "lvlm_url '127.0.0.1:8000': wanted the address of a server"),
        (Model, dict(lvlm_url=URL, lvlm_at_once=0), "lvlm_at_once 0: wanted a number >= 1"),
        (Model, dict(lvlm_url=URL, lvlm_timeout=0), "lvlm_timeout 0: wanted a number > 0"),
        (Model, dict(lvlm_url=URL, lvlm_patience=-1), "lvlm_patience -1: wanted a number >= 0"),
        (Model, dict(lvlm_url=URL, lvlm_pictures="small"), "choose one of 'exact', 'files', 'paths'"),
        (Model, dict(lvlm_url=URL, lvlm_price=-1), "lvlm_price -1: wanted a number >= 0"),
        (Model, dict(lvlm_url=URL, lvlm_name=" "), "lvlm_name is empty"),
        (Model, dict(lvlm_url=URL, lvlm="mock"), "lvlm 'mock' beside lvlm_url .*: wanted the folder or the hub name"),
        (Model, dict(lvlm_name="tiny", lvlm_timeout=9), "lvlm_name 'tiny', lvlm_timeout 9.0 without lvlm_url"),
        *[(Model, {"lvlm_url": URL, n: NOT_THE_DEFAULT[n]}, f"{n} .* beside lvlm_url .*: about the engine of this")
          for n in OUR_ENGINE],
        (Proposing, dict(two_stage=dict(top=0)), "two stages"),
        (Asking, dict(evaluator="mine"), "evaluator 'mine'"),
        (Proposing, dict(shots=()), "wanted at least one number"),
        (Proposing, dict(shots=-1), "shots -1"),
        (Rewarding, dict(price=-.5), "price -0.5"),
        (Rewarding, dict(weights=dict(price=.1)), "say it by its own name"),
        (Proposing, dict(counts=dict(beam=0)), "at least one above 0"),
        (Proposing, dict(counts=dict(temperature={float("inf"): 1})), "wanted finite numbers > 0"),
        (Proposing, dict(counts=dict(temperature={0.: 1})), "wanted finite numbers > 0"),
        (Proposing, dict(scale=0), "scale 0: wanted a number > 0"),
        (Proposing, dict(scale=float("nan")), "scale nan"),
        (Guarding, dict(window=0), "window 0"),
        (Guarding, dict(max_failed=1.5), "max_failed 1.5: wanted a number <= 1"),
        (Mining, dict(rounds=0), "rounds 0"),
        (Mining, dict(budget=0), "budget 0"),
        (Job, dict(limit=0), "limit 0"),
        (Job, dict(K=4, shots=4), "wanted 0 <= shots < K"),
        (Picking, dict(picker="best"), "picker 'best'"),
        (Picking, dict(shots="go"), "shots"),
        (Picking, dict(temp=0.), "temp 0.0: wanted a number > 0"),
        (Rewarding, dict(reward="none"), "reward 'none'"),
    ],
)
def test_a_wrong_setting_is_refused_where_it_is_said(cls, bad, says):
    with pytest.raises(ValueError, match=says): settings_of(cls, **bad)

def test_json_is_an_object():
    assert json_object('{"beam": 5}') == dict(beam=5)
    with pytest.raises(ValueError, match="is not JSON"): json_object("{beam: 5}")
    with pytest.raises(ValueError, match="wanted an object"): json_object("[5]")

def test_defaults_cannot_be_changed_by_accident():
    mine = Proposing()
    assert mine.counts is not COUNTS and mine.counts is not Proposing().counts
    mine.counts["beam"] = 99
    assert Proposing().counts["beam"] == COUNTS["beam"] == 5
    assert Proposing(two_stage=TWO_STAGE).two_stage is not TWO_STAGE

# ---- choices agree with the pages that use them ------------------------------------------------------------

def choices(cls, name):
    "The words that a setting may be, without None"
    def words(hint):
        if get_origin(hint) is Annotated: return words(get_args(hint)[0])
        out = []
        for a in get_args(hint):
            if isinstance(a, str): out.append(a)
            elif get_args(a): out += words(a)
        return out
    return words(get_type_hints(cls, include_extras=True)[name])

def test_choices_are_those_of_the_pages():
    from leverplus.data import VERIFY
    from leverplus.embed import KINDS
    from leverplus.infer import PICKERS
    from leverplus.pools import SAMPLERS
    from leverplus.prompt import STYLES
    from leverplus.rewards import REWARDS
    from leverplus.rldata_scale import READERS
    from leverplus.scorer import PREFIX_CACHES
    from leverplus.vqa import MODES
    assert choices(Data, "reader") == list(READERS)
    assert choices(Data, "check") == list(VERIFY)
    assert choices(Pools, "sampler") == list(SAMPLERS)
    assert choices(Model, "prefix_cache") == list(PREFIX_CACHES)
    assert choices(Asking, "style") == list(STYLES)
    assert choices(Asking, "evaluator") == list(MODES)
    assert choices(Proposing, "kind") == choices(Picking, "kind") == list(KINDS)
    assert set(choices(Rewarding, "reward")) == set(REWARDS)
    assert set(choices(Picking, "picker")) == set(PICKERS)

def test_every_weight_of_answers_is_known_to_the_page():
    from leverplus.vqa import answer_targets
    ten = ["a"]*8 + ["b"]*2
    known = {weight: answer_targets(ten, weight) for weight in choices(Asking, "answer_weight")}
    assert known["official"] != known["count3"]
    with pytest.raises(ValueError): answer_targets(["a"]*10, "another")

def test_number_formats_are_those_of_torch():
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in choices(Model, "dtype"))

def test_settings_import_nothing_heavy():
    heavy = "{'torch', 'numpy', 'pandas', 'fastai'}"
    code = f"import sys, leverplus.settings; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

# ---- what a person reads -----------------------------------------------------------------------------------

def test_a_group_shows_what_is_not_its_default():
    assert repr(Job()) == "Job()"
    small = settings_of(Job, K=8, limit=6)
    assert repr(small) == "Job(limit=6, pools=Pools(K=8))"
    assert eval(repr(small), dict(Job=Job, Pools=Pools)) == small

@pytest.mark.parametrize("make, says", [
    (lambda: Job(K=3), "K: no such setting; it lives in pools: Job(pools=Pools(K=...))"),
    (lambda: Pools(pool_seed=3), "pool_seed: no such setting; it is called seed in its group"),
    (lambda: Pools(k=3), "k: no such setting of Pools"),
    (lambda: Pools(sampler_="x"), "did you mean sampler?"),
    (lambda: settings_of(Job, limt=3), "limt: no such setting; did you mean limit?"),
    (lambda: Pools(K=True), "K True: wanted a number"),
    (lambda: Job(pools=5), "pools 5: wanted settings by name"),
    (lambda: Rewarding(weights=dict(a=float("nan"))), "weights nan: wanted finite numbers"),
    (lambda: Rewarding(weights=dict(a=object())), "wanted numbers, texts, lists and dicts"),
    (lambda: Data(folder=""), "would be the working directory"),
    (lambda: Proposing(counts=None), "proposal counts None"),
    (lambda: Proposing(counts=dict(temperature=5)), "proposal counts {'temperature': 5}"),
    (lambda: Picking(shots=()), "shots (): wanted one number, several"),
    (lambda: Picking(shots=(1, "stop")), "several, or 'stop' alone"),
    (lambda: Teaching(objective="rce", recipe="ours"), "objective rce beside recipe ours"),
    (lambda: Teaching(bs=4), "bs beside recipe ours"),
    (lambda: Teaching(objective="rce", set=dict(n_epoch=3)), "epochs in `set`: say it by its own name"),
])
def test_what_is_wrong_is_said_with_what_to_do(make, says):
    with pytest.raises(ValueError) as e: make()
    assert says in str(e.value), e.value

def test_settings_are_copies_of_what_was_given():
    given = dict(listwise=dict(n_epoch=1))
    teaching = Teaching(set=given)
    given["listwise"]["n_epoch"] = 99
    assert teaching.set == dict(listwise=dict(n_epoch=1))
    assert Rewarding(weights=dict(a=np.float32(2))).weights == dict(a=2.)
    assert json.dumps(plain_settings(Proposing(counts=dict(beam=np.int64(2)))))
    assert Data(folder=Path("a")/"b").folder == str(Path("a")/"b")

def test_a_draft_is_checked_value_by_value_only():
    missing = object()
    half = draft(Job, dict(pools=dict(K=2), proposing=dict(shots=5)), missing)
    assert (half.pools.K, half.proposing.shots) == (2, (5,)) # no job: 5 of 2
    with pytest.raises(ValueError, match="pools.K 0: wanted"): draft(Job, dict(pools=dict(K=0)), missing)
    with pytest.raises(ValueError, match="pools.J: no such setting"): draft(Job, dict(pools=dict(J=0)), missing)
