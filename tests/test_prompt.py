"Prompts: messages, guard, bad input"
import pandas as pd, pytest
from hypothesis import given, strategies as st
from leverplus.prompt import IMAGE_MARK, STYLES, Demo, Prompt, check_prompt, make_prompt, messages, prompter

items = pd.DataFrame(
    dict(
        question_id=range(1, 8),
        image_path=[f"{i}.png" for i in range(1, 8)],
        question=[f"question {i}?" for i in range(1, 8)],
        answer=[f"answer {i}" for i in range(1, 8)],
    )
)
pointers = st.lists(st.integers(2, 7), unique=True, max_size=4)

def flat(prompt): return [c for m in messages(prompt) for c in m["content"]]
def render(prompt): return "".join(IMAGE_MARK if c["type"] == "image" else c["text"] for c in flat(prompt))

@given(pointers, st.sampled_from(STYLES))
def test_everything_is_shown_once_and_in_order(pointer, style):
    p = make_prompt(items, 1, pointer, style)
    text = check_prompt(p, render(p))
    assert p.pointer == tuple(pointer) and [c["image"] for c in flat(p) if c["type"] == "image"] == list(
        p.images
    )
    at = [text.index(f"question {i}?") for i in (*pointer, 1)]
    assert (
        at == sorted(at) and "answer 1" not in text and all(text.count(f"answer {i}") == 1 for i in pointer)
    )

@pytest.mark.parametrize(
    "style,roles", [("interleaved", ["user"]), ("chat", ["user", "assistant", "user", "assistant", "user"])]
)
def test_turns(style, roles):
    assert [m["role"] for m in messages(make_prompt(items, 1, (2, 3), style))] == roles

@given(pointers.filter(len), st.sampled_from(STYLES), st.integers(0, 3), st.data())
def test_the_guard_sees_what_is_missing(pointer, style, kind, data):
    p = make_prompt(items, 1, pointer, style)
    i = data.draw(st.sampled_from(pointer))
    gone = {0: f"question {i}?", 1: f"answer {i}", 2: "question 1?", 3: IMAGE_MARK}[kind]
    with pytest.raises(ValueError, match="question 1"):
        check_prompt(p, render(p).replace(gone, "{placeholder}", 1))

@pytest.mark.parametrize(
    "pointer,error,says",
    [((2, 99), KeyError, "id 99"), ((2, 2), ValueError, "repeats"), ((1,), ValueError, "query itself")],
)
def test_bad_pointers(pointer, error, says):
    with pytest.raises(error, match=says): make_prompt(items, 1, pointer)

def test_unknown_style():
    with pytest.raises(ValueError, match="wanted one of"): prompter(items, "poem")
    with pytest.raises(ValueError, match="question 5"): messages(Prompt(5, "a.png", "q", (), "poem"))

def test_prompts_are_values():
    assert make_prompt(items, 1, (2,)) == Prompt(
        1, "1.png", "question 1?", (Demo(2, "2.png", "question 2?", "answer 2"),)
    )
