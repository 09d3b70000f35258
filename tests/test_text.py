"Texts as a model sees them: one form, no commands; both scorers give the same facts or the same failures"
import re, unicodedata
from dataclasses import replace
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from leverplus.items import as_items
from leverplus.lvlm import (
    MockScorer, NaiveScorer, Targets, checked_targets, compare, load_lvlm, read_texts, weights_once,
)
from leverplus.prompt import STYLES, Demo, Prompt, check_prompt, prompter
from leverplus.rldata_ask import score_pairs
from leverplus.scorer import SharedScorer
from leverplus.text import are_sound, compose, control_token, sound_text, text_fault
from leverplus.tiny import save_lvlm, tiny_qwen
from leverplus.vqa import answer_targets, postprocess, vqa_accuracy

# ---- without a model

@given(st.text(max_size=20))
def test_compose_is_nfc_and_settled(text):
    out = compose(text)
    assert out == unicodedata.normalize("NFC", text) and compose(out) == out

@pytest.mark.parametrize("text", ["", "a <| b", "x < y | z > w", "<html>", "\0", "\u200b", "\U0001f600"])
def test_ordinary_texts_pass(text): assert text_fault(text) == "" and control_token(text) is None

@pytest.mark.parametrize(
    "text,says",
    [
        ("a<|im_start|>assistant", "'<|im_start|>'"),
        ("<|image_pad|>", "'<|image_pad|>'"),
        ("<|new_one_7|>", "'<|new_one_7|>'"),
        ("<tool_call>", "'<tool_call>'"),
        ("half \ud83d", "half a character"),
        (None, "is None, wanted a text"),
        (float("nan"), "is nan, wanted a text"),
        (7, "is 7, wanted a text"),
    ],
)
def test_texts_that_cannot_be_shown(text, says): assert says in text_fault(text, tokens=["<tool_call>"])

ODDITIES = st.sampled_from(["a<|b|>", "<|", "e\u0301", "\u0301", "\ud83d", "\ude00"])

@settings(max_examples=200)
@given(st.lists(st.text(st.characters(exclude_categories=()), max_size=6) | ODDITIES, max_size=4))
def test_many_texts_are_sound_if_each_is(texts):
    "Looking at all of them at once says what looking at each does"
    def stays(text): return not text_fault(text) and sound_text(text) == text
    assert are_sound(texts) == all(map(stays, texts))

def test_taking_a_text_in_says_what_it_is_called():
    assert sound_text("cafe\u0301", "question") == "caf\u00e9"
    with pytest.raises(ValueError, match="answer is None, wanted a text"): sound_text(None, "answer")
    with pytest.raises(ValueError, match="question holds half a character"): sound_text("\ud83d", "question")

ITEMS = pd.DataFrame(dict(
    question_id=[1, 2, 3],
    image_path=["1.png", "2.png", "3.png"],
    question=["what?", "which?", "who?"],
    answer=["dax", "wug", None],
))

@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("what,of", [("question", 2), ("answer", 2), ("question", 3)])
def test_the_guard_names_the_item_and_the_query(style, what, of):
    says = rf"question 3, pointer \(1, 2\): the {what} of question {of} holds .*vision_start"
    prompt = prompter(ITEMS, style)(3, (1, 2))
    spoilt = {what: "x <|vision_start|>"}
    demos = tuple(replace(d, **spoilt) if d.question_id == of else d for d in prompt.demos)
    prompt = replace(prompt, demos=demos, **(spoilt if of == 3 else {}))
    with pytest.raises(ValueError, match=says): check_prompt(prompt, "whatever was rendered")

@pytest.mark.parametrize("what,of", [("question", 2), ("answer", 2), ("question", 3)])
def test_a_table_with_commands_is_refused_where_it_comes_in(what, of):
    "As a reader refuses it, whoever takes the table, and whether or not the text would be shown"
    spoilt = ITEMS.assign(**{what: np.where(ITEMS.question_id == of, "x <|vision_start|>", ITEMS[what])})
    says = f"question_id {of}: {what} holds the control token '<|vision_start|>'"
    with pytest.raises(ValueError, match=re.escape(says)): prompter(spoilt)
    with pytest.raises(ValueError, match=re.escape(says)): as_items(spoilt)

def test_missing_texts_are_refused_where_they_would_be_shown():
    make = prompter(ITEMS)
    assert make(3, (1, 2)).pointer == (1, 2)
    with pytest.raises(ValueError, match="question 3: its answer is .*wanted a text"): make(1, (2, 3))
    with pytest.raises(ValueError, match="question 3: its answer is '', wanted a text"):
        prompter(ITEMS.assign(answer=["dax", "wug", " "]))(1, (2, 3))
    with pytest.raises(ValueError, match="question 1: its question is .*wanted a text"):
        prompter(ITEMS.assign(question=[None, "which?", "who?"]))(2, (1,))

@pytest.mark.parametrize("answers,says", [(["<|im_end|>"]*10, "control token"), ([" "]*10, "all 10 answers are blank")])
def test_answers_that_cannot_be_asked_for_name_their_question(answers, says):
    items = ITEMS.assign(answer="dax", answers=[["dax"]*10, answers, ["wug"]*10])
    pairs = pd.DataFrame(dict(question_id=[1, 2], pointer=[(2,), (1,)]))
    with pytest.raises(ValueError, match=f"question_id 2: .*{says}"): score_pairs(pairs, MockScorer(), items)

@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1)), max_size=8))
def test_weights_once(rows):
    events = [e for e, _ in rows]
    weights = [w for _, w in rows]
    out = weights_once(events, weights)
    assert len(out) == len(rows) and all(0 <= w <= 1 for w in out)
    for e in set(events):
        own = [w for event, w in zip(events, out) if event == e]
        assert own[0] == pytest.approx(min(1, sum(w for event, w in rows if event == e))) and not any(own[1:])

# ---- with a model

@pytest.fixture(scope="module")
def lvlm(tmp_path_factory):
    lv = tiny_qwen(seed=3)
    with torch.no_grad():
        for p in lv.model.parameters():
            if p.ndim > 1: p.mul_(1.7)
    return load_lvlm(save_lvlm(lv, tmp_path_factory.mktemp("lvlm")))

@pytest.fixture(scope="module")
def scorers(lvlm): return NaiveScorer(lvlm), SharedScorer(lvlm), SharedScorer(lvlm, prefix_cache="global")

@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    "A prompt of two demonstrations"
    d = tmp_path_factory.mktemp("images")
    for i in range(3): Image.new("RGB", (56, 56), (80*i, 40, 200 - 60*i)).save(d/f"{i}.png")
    a, b, c = (str(d/f"{i}.png") for i in range(3))
    demos = (Demo(1, a, "What shape is it?", "dax"), Demo(2, b, "Which hue?", "wug"))
    return Prompt(3, c, "Name the colour.", demos)

GOAL = Targets(("dax", "mot"), (1., .3))

def altered(prompt, where, text):
    "The prompt with `text` as the query's question, or as a demonstration's question or answer"
    if where == "query": return replace(prompt, question=text)
    return replace(prompt, demos=(prompt.demos[0], replace(prompt.demos[1], **{where: text})))

ODD = {
    "nothing": "",
    "lines": "a\nb\r\nc\td",
    "the frame": "Question: what? Short answer: no",
    "blanks": "  two  ",
    "right to left": "\u200f\u05d0\u05d1",
    "emoji": "\U0001f469\u200d\U0001f680",
    "NUL": "a\0b",
    "long": "dax "*300,
    "no width": "a\u200bb\ufeff",
    "no-break": "a\u00a0b",
    "full width": "\uff21\uff1f",
    "decomposed": "cafe\u0301",
    "almost a command": "<|im_end |> <im_end> |im_end|",
}

@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("where", ["query", "question", "answer"])
@pytest.mark.parametrize("name", ODD)
def test_odd_texts_are_facts_and_the_same_from_both(scorers, plain, style, where, name):
    prompt = replace(altered(plain, where, ODD[name]), style=style)
    first, *others = (scorer.run([prompt], [GOAL]) for scorer in scorers)
    assert first[0].error is None and 0 <= first[0].gt_prob <= 1
    for other in others:
        same = compare(first, other)
        assert same["failed"] == same["text"] == 0 and same["logprob"] < 1e-3

WOMAN, ROCKET = "\U0001f469", "\u200d\U0001f680" # an emoji, and what joins it and makes another

ANSWERS = { # what ten people wrote -> distinct right answers
    "beginnings of one another": (["red"]*4 + ["red car"]*3 + ["r"]*3, ["red", "r", "red car"]),
    "equal but for marks": (["red."]*5 + ["the Red!"]*5, ["red"]),
    "nothing behind the rules": (["the"]*4 + ["a"]*3 + ["?"]*3, ["?"]),
    "some are blank": (["", " ", "red"] + ["blue"]*7, ["blue", "red"]),
    "joined emoji": ([WOMAN + ROCKET]*5 + [WOMAN]*5, [WOMAN, WOMAN + ROCKET]),
    "Turkish capital": (["\u0130zmir"]*5 + ["izmir"]*5, ["izmir", "i\u0307zmir"]),
    "wide digits": (["\uff11\uff12"]*5 + ["12"]*5, ["12", "\uff11\uff12"]),
    "ligature": (["\ufb01sh"]*5 + ["fish"]*5, ["fish", "\ufb01sh"]),
    "Kelvin and Angstrom": (["5 \u212a"]*5 + ["5 k"]*5, ["5 k"]),
    "Hangul in letters": (["\u1112\u1161\u11ab"]*5 + ["\ud55c"]*5, ["\ud55c"]),
    "marks in another order": (["a\u0323\u0307"]*5 + ["a\u0307\u0323"]*5, ["\u1ea1\u0307"]),
    "a mark that joins the dash": (["c/\u0338b"]*5 + ["x"]*5, ["c \u0338b", "x"]),
    "templates": (["{{ x }}"]*4 + ["{x}"]*3 + ["<b>x</b>"]*3, ["x", "b x b"]),
    "two lines": (["a\nb"]*5 + ["a b"]*5, ["a b"]),
    "long": (["dax "*120]*10, ["dax "*119 + "dax"]),
}

@pytest.mark.parametrize("name", ANSWERS)
def test_true_answers_are_the_same_for_both_scorers_and_for_the_evaluator(scorers, plain, name):
    "Each right answer is asked for once, weighs what its accuracy is, and has the same probability from both"
    told, wanted = ANSWERS[name]
    texts = dict(question=["what?", "{{ q }} {x} {% if %}?"], answer=["dax", "wug"], answers=[["dax"]*10, told])
    paths = [plain.demos[0].image, plain.image]
    items = pd.DataFrame(dict(question_id=[1, 3], image_path=paths) | texts)
    answers = as_items(items).answers[3]
    texts, weights = answer_targets(answers)
    assert sorted(texts) == sorted(wanted)
    assert [vqa_accuracy(postprocess(t), answers) for t in texts] == pytest.approx(weights)
    pairs = pd.DataFrame(dict(question_id=[3], pointer=[(1,)]))
    first, *others = (score_pairs(pairs, scorer, items) for scorer in scorers)
    for other in others:
        same = compare(first, other)
        assert same["failed"] == 0 and same["logprob"] < 1e-3
        assert other[0].gt_prob == pytest.approx(first[0].gt_prob, rel=1e-3)

def test_composed_and_decomposed_questions_are_one_prompt(scorers, plain):
    for scorer in scorers:
        a, b = scorer.run([altered(plain, "query", t) for t in ("caf\u00e9?", "cafe\u0301?")], [GOAL]*2)
        assert a.gt_prob == pytest.approx(b.gt_prob, rel=1e-4)

@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("where,of", [("query", 3), ("question", 2), ("answer", 2)])
def test_commands_fail_their_prompt_by_name_in_every_scorer(lvlm, scorers, plain, style, where, of):
    prompts = [replace(plain, style=style)]
    for token in lvlm.control_tokens:
        prompts.append(replace(altered(plain, where, f"x {token} y"), style=style))
    outs = [scorer.run(prompts, [GOAL]*len(prompts)) for scorer in scorers]
    assert len(prompts) == 15 and len({tuple(said.error for said in out) for out in outs}) == 1
    assert outs[0][0].error is None
    for token, said in zip(lvlm.control_tokens, outs[0][1:]):
        assert f"of question {of} holds the control token {token!r}" in said.error and said.text is None

def test_commands_in_true_answers_fail_by_name(lvlm, plain):
    with pytest.raises(ValueError, match="control token"): Targets(("<|im_end|>",), (1.,))
    lvlm.tokenizer.add_tokens(["<tool_call>", "blue whale"])
    try:
        assert lvlm.control_tokens[-1] == "<tool_call>"      # a word that was added is no command
        shown = altered(plain, "query", "Is <tool_call> a blue whale?")
        for scorer in (NaiveScorer(lvlm), SharedScorer(lvlm)):
            said = scorer.run([plain, shown], [Targets(("x<tool_call>",), (1.,)), GOAL])
            assert "question 3: the true answer 'x<tool_call>' holds the control token" in said[0].error
            assert "the question of question 3 holds the control token '<tool_call>'" in said[1].error
    finally: lvlm.tokenizer = load_lvlm(lvlm.name).tokenizer
    assert len(lvlm.control_tokens) == 14

def test_answers_of_any_tokenizer(lvlm, plain):
    "What has the same tokens is one event, whatever the tokenizer drops or maps; what has none is refused"
    letters = {"a": [1], "A": [1], "\u200ba": [1], "b": [2], "\u200b": []}
    target = Targets(("b", "a", "\u200ba", "A"), (.1, .5, .2, .9))
    assert checked_targets(lvlm, plain, target, letters.get).weights == (.1, 1., 0., 0.)
    with pytest.raises(ValueError, match="question 3: the true answer .* has no tokens"):
        checked_targets(lvlm, plain, Targets(("a", "\u200b"), (1., 1.)), letters.get)

@pytest.mark.parametrize("weights", [(1.1,), (float("inf"),), (float("nan"),)])
def test_weights_are_shares(weights):
    with pytest.raises(ValueError, match="wanted a number in 0..1"): Targets(("a",), weights)

@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=8))
def test_tokens_tell_composed_texts_apart(lvlm, text):
    "Composing is all that this tokenizer does to a text: what `compose` tells apart has other tokens"
    if text_fault(text, lvlm.control_tokens): return
    ids = lvlm.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert lvlm.tokenizer.decode(ids) == compose(text)
    assert ids == lvlm.tokenizer(compose(text), add_special_tokens=False)["input_ids"]

def test_an_answer_ends_where_a_command_begins(lvlm):
    red, blue = (lvlm.tokenizer(word)["input_ids"] for word in ("red", "blue"))
    for token in lvlm.control_tokens:
        id = lvlm.tokenizer.convert_tokens_to_ids(token)
        assert read_texts(lvlm, [[*red, id, *blue], [id, *red], red]) == ["red", "", "red"]
