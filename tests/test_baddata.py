"What people bring may be broken: it is refused in a sentence that names file, id and remedy"
import json, warnings
import numpy as np, pandas as pd, pytest, torch
from baddata import bad_data, doors, rows_of
from test_generate import ITEMS, POOL, STORE
from leverplus.bank import DemoBank
from leverplus.callback_onpolicy import draw_groups
from leverplus.core import repo_path
from leverplus.data import read_okvqa
from leverplus.dls import group_dls
from leverplus.embed import Clip, EmbedStore, embed_items, load_clip
from leverplus.evidence import kind_for
from leverplus.groups import RLData
from leverplus.infer import candidates, pick, pick_fixed, pick_model, predict
from leverplus.learner import load_selector, selector_learner
from leverplus.lvlm import MockScorer, load_lvlm
from leverplus.picker import Picker
from leverplus.pools import Pool, check_vectors, encoder_of, make_pool
from leverplus.rldata_ask import ask
from leverplus.rldata_propose import propose
from leverplus.scorer import NaiveScorer
from leverplus.selector import PointerSelector
from leverplus.settings import Picking, Proposing

ISLANDS = repo_path("data", "islands")

# ---- files, ids, texts, models -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    "What came of every case of `bad_data`: (name, error or None, what it must name)"
    out = []
    for name, call, names in bad_data(tmp_path_factory.mktemp("bad")):
        error = None
        try: call()
        except Exception as e: error = e
        out.append((name, error, names))
    return out

def test_there_are_many_cases_and_no_two_of_one_name(refusals):
    names = [name for name, _, _ in refusals]
    assert len(names) > 1000
    assert len(set(names)) == len(names)

def test_nothing_broken_is_taken(refusals):
    taken = [name for name, e, _ in refusals if e is None]
    assert not taken, taken

def test_every_refusal_is_one_of_words(refusals):
    "No error of a parser, and none that a programmer has to read"
    odd = (json.JSONDecodeError, UnicodeError, pd.errors.ParserError)
    wrong = [(name, repr(e)[:200]) for name, e, _ in refusals
             if not isinstance(e, (ValueError, FileNotFoundError)) or isinstance(e, odd)]
    assert not wrong, wrong

def test_every_refusal_names_file_or_id(refusals):
    lost = [(name, str(e)[:200]) for name, e, names in refusals if not all(text in str(e) for text in names)]
    assert not lost, lost

def test_the_good_files_are_taken(tmp_path):
    "Each door opens what it is given whole: the refusals above are about the fault"
    for i, door in enumerate(doors()):
        if door.name in ("read_samples", "read_task"): continue   # theirs have more than `{}` in them
        home = tmp_path/str(i)
        home.mkdir()
        door.make(home)
        door.open(home)

# ---- control tokens ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def odd_world():
    "Items of the islands, and a model whose tokenizer has a control token that looks like none"
    items = read_okvqa(ISLANDS, "train", images=ISLANDS/"images").iloc[:6]
    lvlm = load_lvlm()
    lvlm.tokenizer.add_special_tokens({"additional_special_tokens": ["<odd>"]})
    return items, NaiveScorer(lvlm)

@pytest.mark.parametrize("column", ["question", "answer", "answers"])
def test_a_control_token_of_the_tokenizer_fails_its_row_by_name(odd_world, column):
    items, scorer = odd_world
    query, shown, third = items.index[:3].tolist()
    odd = shown if column == "answer" else query
    said = dict(items[column])
    said[odd] = ["a <odd> b"]*10 if column == "answers" else "a <odd> b"
    bad = items.assign(**{column: pd.Series(said, dtype=object)})
    pairs = pd.DataFrame(dict(question_id=[query, third], pointer=[(shown,), ()]))
    facts = ask(pairs, scorer, bad)
    assert facts.eval_failed.tolist() == [True, False]
    assert str(odd) in facts.error[0] and "control token '<odd>'" in facts.error[0]

# ---- another encoder ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def two_clips():
    "Items, the vectors of a tiny CLIP, and those of one with other weights of the same width"
    items = read_okvqa(ISLANDS, "train", images=ISLANDS/"images").iloc[:40]
    clip = load_clip()
    net = load_clip().model
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in net.parameters(): weight.copy_(torch.randn_like(weight)*.1)
    other = Clip(net, clip.tokenizer, clip.image_processor, "other-clip")
    return items, embed_items(items, clip, progress=False), embed_items(items, other, progress=False), other

def trained_on(store):
    model = PointerSelector(store.dim("text"), d_hidden=8)
    model.info = dict(encoder=encoder_of(store), encoder_name="tiny-clip", kind="text")
    return model

@pytest.mark.parametrize("sampler", ["random", "text", "image"])
def test_another_clip_of_equal_width_is_refused_whatever_the_sampler(two_clips, sampler):
    items, store, other, clip = two_clips
    model = trained_on(store)
    pool = make_pool(items.iloc[:5], items.iloc[5:], 6, sampler, store)
    says = rf"CLIP {encoder_of(store)} \(tiny-clip\), these are of CLIP {encoder_of(other)} \(other-clip\)"
    for act in (
        lambda s: pick_model(model, pool, s, 2, "text"),
        lambda s: candidates(model, pool, s, 2, kind="text"),
        lambda s: pick(pool, Picking(picker="greedy", kind="text"), model, s),
        lambda s: propose(pool, s, list(pool), 2, model, Proposing(kind="text")),
        lambda s: draw_groups(model, pool, s, list(pool), 2, 4, kind="text"),
        lambda s: kind_for(model, s),
    ):
        act(store)
        with pytest.raises(ValueError, match=says): act(other)

def test_training_goes_on_with_the_same_encoder_only(two_clips):
    items, store, other, _ = two_clips
    pool = make_pool(items.iloc[:6], items.iloc[6:], 6)
    data = RLData.from_frame(rows_of(pool), pool)
    first, last = data.queries[:4], data.queries[4:]
    def part(queries): return RLData(data.rows[data.rows.question_id.isin(queries)], pool.only(queries))
    def dls(store): return group_dls(part(first), part(last), store, kind="text")
    learn = selector_learner(dls(store), d_hidden=8)
    assert learn.model.info["encoder"] == encoder_of(store)
    with pytest.raises(ValueError, match="these are of CLIP"): selector_learner(dls(other), learn.model)
    with pytest.raises(ValueError, match="these are of CLIP"): pick_model(learn.model, pool, other, 2)

def test_a_picker_refuses_a_bank_of_another_encoder(two_clips):
    items, store, other, clip = two_clips
    says = r"CLIP .* \(other-clip\)"
    with pytest.raises(ValueError, match=says): Picker(trained_on(store), clip)
    with pytest.raises(ValueError, match=says): Picker(trained_on(store)).check_bank(DemoBank(items, other))

def test_a_checkpoint_that_does_not_know_its_encoder_says_so_once(two_clips, tmp_path):
    _, store, _, _ = two_clips
    PointerSelector(store.dim("text"), d_hidden=8).save_pretrained(tmp_path/"early", info=dict(kind="text"))
    model = load_selector(tmp_path/"early")
    with pytest.warns(UserWarning, match="does not say which encoder"): check_vectors(model, store)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_vectors(model, store)
        check_vectors(PointerSelector(4), store)   # a new one has not met any

# ---- groups that a selector cannot choose ------------------------------------------------------------------

def groups(queries, S, n=20):
    "Some sequences of S of 8 demonstrations"
    pool = Pool({q: list(range(12, n)) for q in queries}, dict(sampler="by hand", K=8))
    wide = Pool({q: pool[q][:S + 1] for q in queries}, pool.recipe)
    rows = rows_of(wide)
    rows["pointer"] = [tuple(np.roll(pool[q], i)[:S].tolist()) for q in queries for i in range(2)]
    return RLData.from_frame(rows.assign(vqa_gt_prob=[.1, .9]*len(queries)), pool)

NUMBERS = EmbedStore(list(range(20)), text=torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))

@pytest.mark.parametrize("shots, model, says", [
    (5, dict(), "question_id 3 shows 5 demonstrations, the selector at most 4 .max_shots.: make it with max_s"),
    (1, dict(stop=True, min_shots=2), "question_id 3 shows 1 demonstration, the selector at least 2 .min_shots"),
    (2, dict(d_in=6), "hold vectors of 4 numbers .kind 'text'., the selector reads 6"),
    (2, dict(d_in=18, n_evidence=14), "the selector reads 18, 14 of them what a bank of answers says"),
])
def test_groups_that_are_not_for_a_selector_are_refused_before_a_fit(shots, model, says):
    dls = group_dls(groups([3, 4], shots), groups([5], shots), NUMBERS, bs=2)
    policy = PointerSelector(**dict(d_in=4, d_hidden=8) | model)
    with pytest.raises(ValueError, match=says): selector_learner(dls, policy)

def test_a_development_split_is_looked_at_too():
    dls = group_dls(groups([3, 4], 2), groups([5], 5), NUMBERS, bs=2)
    with pytest.raises(ValueError, match="question_id 5 shows 5 demonstrations"): selector_learner(dls)
    selector_learner(dls, d_hidden=8, max_shots=5)

def test_more_shots_than_a_selector_picks():
    pool = groups([3, 4], 2).pool
    model = PointerSelector(4, d_hidden=8)
    enc = model.encode(torch.zeros(1, 4), torch.zeros(1, 8, 4), torch.ones(1, 8, dtype=torch.bool))
    for act in (
        lambda S: pick_model(model, pool, NUMBERS, S),
        lambda S: candidates(model, pool, NUMBERS, S),
        lambda S: candidates(model, pool, NUMBERS, S, search="samples"),
        lambda S: propose(pool, NUMBERS, [3], S, model),
        lambda S: draw_groups(model, pool, NUMBERS, [3], S, 4),
        lambda S: model.step_logp(enc, torch.zeros(1, 1, S - 1, dtype=torch.long)),
    ):
        act(4)
        with pytest.raises(ValueError, match="max_shots"): act(5)

def test_a_prediction_with_too_many_shots_leaves_nothing_behind(tmp_path):
    model = PointerSelector(STORE.dim(), d_hidden=8)
    with pytest.raises(ValueError, match="5 shots: this selector was made for 0..4"):
        picking = Picking(picker="greedy", shots=(5,))
        predict(tmp_path/"run", POOL, ITEMS, MockScorer(), STORE, picking, model=model)
    assert not (tmp_path/"run").exists()

def test_ids_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match="fixed 99: no such question_id among the items"):
        picking = Picking(picker="fixed", fixed=(99,), shots=(1,))
        predict(tmp_path/"run", POOL, ITEMS, MockScorer(), None, picking)
    assert not (tmp_path/"run").exists()
    with pytest.raises(ValueError, match="fixed: question_id 99 is not"): pick_fixed(POOL, (99, 1001), ITEMS)
    with pytest.raises(ValueError, match="'fixed' compares pictures: pass items="):
        pick(POOL, Picking(picker="fixed", fixed=(1001,), shots=(1,)))
