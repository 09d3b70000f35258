"Scoring: the scorers agree with each other and with the model called by hand; wrong positions or images would show"
import math
from dataclasses import replace
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from leverplus.lvlm import (
    MockScorer, NaiveScorer, Scored, Targets, answer_place, load_lvlm, official_inputs, pixel_limits,
    prompt_images, with_pixels,
)
from leverplus.scorer import SharedScorer, Trie, rope_positions
from leverplus.prompt import Demo, Prompt
from leverplus.tiny import save_lvlm, tiny_qwen

ANSWERS = ("yes", "yes it is", "dax", "dax blik", "red circle")

@pytest.fixture(scope="module")
def lvlm(tmp_path_factory):
    "A random model whose weights are large enough that any wrong position or image moves the numbers"
    lv = tiny_qwen(seed=1)
    with torch.no_grad():
        for p in lv.model.parameters():
            if p.ndim > 1: p.mul_(1.7)
    return load_lvlm(save_lvlm(lv, tmp_path_factory.mktemp("lvlm")))

@pytest.fixture(scope="module")
def images(tmp_path_factory):
    "Pictures of several sizes and shapes"
    d = tmp_path_factory.mktemp("images")
    g = np.random.default_rng(0)
    out = []
    for i, (w, h) in enumerate([(56, 56), (56, 56), (84, 56), (56, 140), (112, 84)]):
        out.append(str(d / f"{i}.png"))
        Image.fromarray(g.integers(256, size=(h, w, 3), dtype=np.uint8)).save(out[-1])
    return out

def prompt(images, q, pointer, style="interleaved", at=0):
    demo = lambda i: Demo(i, images[(i + at) % len(images)], "What shape is it?", ANSWERS[i % len(ANSWERS)])
    return Prompt(q, images[q % len(images)], "Name the colour.", tuple(demo(i) for i in pointer), style)

def assert_same(a, b, tol=1e-4):
    assert [s.error for s in a] == [s.error for s in b] == [None]*len(a)
    assert [s.text for s in a] == [s.text for s in b]
    for x, y in zip(a, b):
        np.testing.assert_allclose(x.logprobs, y.logprobs, atol=tol)
        assert x.gt_prob == pytest.approx(y.gt_prob, abs=1e-6, nan_ok=True)

MIXED = [
    ((), ()),
    ((1,), ("yes",)),
    ((2, 1), ("yes", "yes it is")),
    ((3, 4, 2), ANSWERS),
    ((4, 3, 2, 1), ("dax blik", "dax")),
    ((5, 10), ANSWERS[:3]),
]

@pytest.mark.parametrize("style", ["interleaved", "chat"])
def test_shared_equals_naive(lvlm, images, style):
    ps = [prompt(images, 20 + k, ptr, style) for k, (ptr, _) in enumerate(MIXED)]
    ts = [Targets(a, (1.,)*len(a)) for _, a in MIXED]
    naive = NaiveScorer(lvlm).run(ps, ts)
    assert_same(SharedScorer(lvlm).run(ps, ts), naive)
    assert_same(SharedScorer(lvlm, batch_tokens=1).run(ps, ts), naive)
    assert_same(NaiveScorer(lvlm, batch_size=1).run(ps, ts), naive)
    assert max(s.n_decode for s in SharedScorer(lvlm).run(ps, ts)) > 0 # some answers do leave the tree

def test_eager_equals_sdpa(lvlm, images):
    ps = [prompt(images, 20, (1, 2)), prompt(images, 21, (3,))]
    ts = [Targets(ANSWERS, (1.,)*5)]*2
    assert_same(SharedScorer(load_lvlm(lvlm.name, attn="eager")).run(ps, ts), NaiveScorer(lvlm).run(ps, ts))

def test_naive_is_the_model_called_by_hand(lvlm, images):
    "One prompt, one answer, no batch, no padding, no code of ours but the prompt"
    from qwen_vl_utils import process_vision_info
    from leverplus.prompt import messages
    p = prompt(images, 22, (1, 3))
    msg = messages(p)
    proc = lvlm.processor
    text = proc.apply_chat_template(msg, tokenize=False, add_generation_prompt=True)
    x = proc(text=[text + "dax blik<|im_end|>"], images=process_vision_info(msg)[0], return_tensors="pt")
    ids = x["input_ids"][0]
    n = len(lvlm.tokenizer("dax blik<|im_end|>")["input_ids"])
    with torch.no_grad(): lp = lvlm.model(**x).logits[0].double().log_softmax(-1)
    byhand = sum(float(lp[i - 1, ids[i]]) for i in range(len(ids) - n, len(ids)))
    scored = NaiveScorer(lvlm).run([p], [Targets(("dax blik",), (1.0,))])[0]
    assert scored.logprobs[0] == pytest.approx(byhand, abs=1e-4)

def test_batch_company_changes_nothing(lvlm, images):
    ps = [prompt(images, 20 + k, ptr) for k, (ptr, _) in enumerate(MIXED)]
    ts = [Targets(("dax",), (1.0,))] * len(ps)
    scorer = SharedScorer(lvlm)
    together = scorer.run(ps, ts)
    assert_same([scorer.run([p], [t])[0] for p, t in zip(ps, ts)], together)

def test_images_order_and_demonstrations_matter(lvlm, images):
    s = SharedScorer(lvlm)
    t = Targets(("dax", "yes"), (1.0, 1.0))
    p = prompt(images, 20, (1, 2))
    base = np.array(s.run([p], [t])[0].logprobs)
    d1, d2 = p.demos
    others = dict(
        image=replace(p, image=images[4]),
        demo_image=replace(p, demos=(replace(d1, image=images[3]), d2)),
        order=replace(p, demos=(d2, d1)),
        swapped_images=replace(p, demos=(replace(d1, image=d2.image), replace(d2, image=d1.image))),
        answer=replace(p, demos=(replace(d1, answer="wug"), d2)),
        fewer=replace(p, demos=(d2,)),
    )
    for name, o in others.items():
        assert np.abs(np.array(s.run([o], [t])[0].logprobs) - base).max() > 1e-2, name

def test_wrong_positions_would_show(lvlm, images, monkeypatch):
    "Plain counting in place of M-RoPE moves log-probabilities by far more than the tolerance of the tests"
    import leverplus.scorer as mod
    p = prompt(images, 22, (3, 4))
    t = Targets(("dax",), (1.0,))
    right = SharedScorer(lvlm).run([p], [t])[0].logprobs[0]
    def counted(ids, grids, image_id): return torch.arange(len(ids)).expand(3, -1), len(ids)
    monkeypatch.setattr(mod, "rope_positions", counted)
    assert abs(SharedScorer(lvlm).run([p], [t])[0].logprobs[0] - right) > 1e-2

texts_and_images = st.one_of(st.integers(1, 5), st.tuples(st.integers(1, 4), st.integers(1, 4)))

@settings(max_examples=30)
@given(st.lists(texts_and_images, min_size=1, max_size=6))
def test_positions_equal_the_models_own(parts):
    lv = _lv()
    ids = []
    grids = []
    for p in parts:
        if isinstance(p, int): ids += [5]*p
        else:
            grids.append((1, *p))
            ids += [6] + [lv.image_id] * (p[0] * p[1]) + [7]
    x = torch.tensor([ids])
    pos, nxt = rope_positions(ids, grids, lv.image_id)
    grid = torch.tensor([[1, 2*h, 2*w] for _, h, w in grids]) if grids else None
    theirs, delta = lv.model.model.get_rope_index(x, (x == lv.image_id).int(), image_grid_thw=grid)
    assert torch.equal(theirs[:, 0], pos) and nxt == len(ids) + int(delta)

_cache = {}
def _lv(): return _cache.setdefault("lv", tiny_qwen())

@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=6))
def test_trie_holds_every_answer_once(answers):
    t = Trie()
    paths = [t.add(a) for a in answers]
    for a, p in zip(answers, paths):
        assert [t.tokens[i] for i in p] == a and [t.depth[i] for i in p] == list(range(len(a)))
        if p: assert set(np.flatnonzero(t.sees()[p[-1]])) == set(p)
    assert len(t.tokens) == len({tuple(a[:k]) for a in answers for k in range(1, len(a) + 1)})

def test_probabilities_are_of_disjoint_events(lvlm, images):
    t = Targets(("yes", "yes it is", "dax", "dax blik"), (1.0,) * 4)
    s = SharedScorer(lvlm).run([prompt(images, 20, (1, 2))], [t])[0]
    total = sum(map(math.exp, s.logprobs))
    assert 0 <= total <= 1 + 1e-6 and s.gt_prob == pytest.approx(total)

def test_failures_have_names_and_harm_nobody(lvlm, images, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    good = prompt(images, 20, (1, 2))
    t = Targets(("dax",), (1.0,))
    for scorer in (NaiveScorer(lvlm), SharedScorer(lvlm)):
        out = scorer.run([good, replace(good, image=str(bad)), replace(good, image="gone.png"), good], [t]*4)
        assert [s.error is None for s in out] == [True, False, False, True]
        assert out[0].logprobs == pytest.approx(out[3].logprobs, abs=1e-5)
        assert out[1].text is None and not out[1].logprobs and math.isnan(out[1].gt_prob)
    assert "bad.png" in out[1].error and "gone.png" in out[2].error

def test_injected_failure_fails_one_prompt_only(lvlm, images, monkeypatch):
    s = SharedScorer(lvlm)
    ps = [prompt(images, 20 + k, (1, 2)) for k in range(3)]
    real = s._score
    def score(rows, generate):
        if any(r.prompt.question_id == 21 for r in rows): raise RuntimeError("out of memory")
        return real(rows, generate)
    monkeypatch.setattr(s, "_score", score)
    assert [r.error for r in s.run(ps)] == [None, "RuntimeError: out of memory", None]

def test_fingerprint_tells_models_apart(lvlm):
    again = load_lvlm(lvlm.name)
    eager = load_lvlm(lvlm.name, attn="eager")
    assert lvlm.fingerprint == again.fingerprint != eager.fingerprint
    shorter = NaiveScorer(lvlm, max_new_tokens=5)
    assert NaiveScorer(lvlm).fingerprint == SharedScorer(lvlm).fingerprint != shorter.fingerprint
    assert tiny_qwen(seed=2).fingerprint != tiny_qwen(seed=3).fingerprint == tiny_qwen(seed=3).fingerprint

@pytest.mark.parametrize(
    "name,value",
    [
        ("image_mean", [0.4, 0.5, 0.5]),
        ("image_std", [0.2, 0.3, 0.3]),
        ("size", dict(shortest_edge=3136, longest_edge=99 * 28 * 28)),
        ("do_normalize", False),
    ],
)
def test_fingerprint_sees_the_image_processor(name, value):
    lv = tiny_qwen(seed=2)
    was = lv.fingerprint
    setattr(lv.image_processor, name, value)
    assert lv.fingerprint != was

def test_fingerprint_ignores_settings_that_change_no_number():
    lv = tiny_qwen(seed=2)
    was = lv.fingerprint
    lv.image_processor.some_new_option = 3
    assert lv.fingerprint == was

def test_other_models_are_refused(tmp_path):
    (tmp_path/"config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="clip model"): load_lvlm(tmp_path)

@pytest.mark.parametrize(
    "texts,weights,says",
    [
        (("a", "a"), (1, 1), "twice"),
        (("a",), (), "1 texts but 0"),
        ((" a",), (1,), "stripped"),
        (("",), (1,), "empty"),
        (("<|im_end|>",), (1,), "control"),
        (("a",), (-1,), "wanted a number"),
        (("a",), (math.nan,), "wanted a number"),
    ],
)
def test_bad_targets(texts, weights, says):
    with pytest.raises(ValueError, match=says): Targets(texts, weights)

def test_as_many_targets_as_prompts(images):
    with pytest.raises(ValueError, match="1 prompts but 2 targets"):
        MockScorer().run([prompt(images, 1, ())], [Targets()] * 2)

def test_mock_scorer_speaks_the_protocol(images):
    ps = [prompt(images, 6, (1, 2)), prompt(images, 7, (1, 2))]
    a, b = MockScorer(0, fails=[7]).run(ps, [Targets(("x", "y"), (1.0, 0.5))] * 2)
    assert isinstance(a, Scored) and 0 <= a.gt_prob <= 1 and a.pointer == (1, 2)
    assert b.error and b.text is None

def test_imports_without_fastai():
    import subprocess, sys
    code = (
        "import sys, leverplus.lvlm, leverplus.selector; bad = [m for m in sys.modules if m.split('.')[0] in"
        " ('fastai', 'fastcore', 'transformers')]; sys.exit(str(bad) if bad else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

# --- items without pictures, and other chat templates

def blind(p, query=True, demos=True):
    "A prompt without the pictures of its query, of its demonstrations, or of both"
    shown = tuple(replace(d, image=None) for d in p.demos) if demos else p.demos
    return replace(p, image=None if query else p.image, demos=shown)

PREFIXES = [{}, dict(prefix_cache="query"), dict(prefix_cache="global", prefix_depth=2)]

@pytest.mark.parametrize("style", ["interleaved", "chat"])
def test_prompts_without_pictures(lvlm, images, style):
    "Alone, in batches beside prompts with pictures, and with pictures for some items only"
    ps = [prompt(images, 20 + k, ptr, style) for k, (ptr, _) in enumerate(MIXED)]
    one_sided = [blind(p, demos=False) for p in ps] + [blind(p, query=False) for p in ps]
    ps = [blind(p) for p in ps] + ps[:3] + one_sided
    ts = [Targets(ANSWERS, (1.,)*5)]*len(ps)
    naive = NaiveScorer(lvlm).run(ps, ts)
    assert_same(NaiveScorer(lvlm, batch_size=1).run(ps, ts), naive)
    for settings_ in [*PREFIXES, dict(window=5), dict(batch_tokens=1)]:
        scorer = SharedScorer(lvlm, **settings_)
        assert_same(scorer.run(ps, ts), naive)
        assert_same(scorer.run(ps, ts), naive)
    pictured = NaiveScorer(lvlm).run([prompt(images, 20, (1, 2), style)], ts[:1])[0]
    without = NaiveScorer(lvlm).run([blind(prompt(images, 20, (1, 2), style))], ts[:1])[0]
    assert np.abs(np.subtract(pictured.logprobs, without.logprobs)).max() > 1e-2

@pytest.mark.parametrize("style", ["interleaved", "chat"])
def test_text_prompts_share_their_beginnings(lvlm, images, style):
    ps = [blind(prompt(images, 20 + q, (a, b), style)) for q in range(3) for a in (1, 2) for b in (3, 4, 5)]
    off = SharedScorer(lvlm)
    shared = SharedScorer(lvlm, prefix_cache="query")
    ts = [Targets(("dax",), (1.,))]*len(ps)
    assert_same(shared.run(ps, ts), off.run(ps, ts))
    assert off.stats.ran == off.stats.tokens == shared.stats.tokens
    assert shared.stats.ran < .6*shared.stats.tokens and shared.stats.reused == len(ps)

def test_an_absent_picture_is_not_a_missing_one(lvlm, images):
    p = prompt(images, 20, (1,))
    gone = replace(blind(p), image="gone.png")
    for scorer in (NaiveScorer(lvlm), SharedScorer(lvlm)):
        out = scorer.run([blind(p), gone])
        assert out[0].error is None and "gone.png" in out[1].error

LINES = (
    "{% for m in messages %}"
    "{{ m['content'] if m['role'] == 'user' else ' ' + m['content'] + '\n' }}"
    "{% endfor %}"
)
TEMPLATES = dict(
    lines=LINES,
    # the blank stands at the end of the prompt; messages in parts
    trailing="{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
    "{% if m['role'] != 'user' %}\n{% elif add_generation_prompt or not loop.last %} {% endif %}{% endfor %}",
    # no generation prompt, and another end
    tags="{% for m in messages %}<|object_ref_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|box_end|>{% endfor %}",
)

def with_template(lvlm, template, eos="<|endoftext|>"):
    lv = load_lvlm(lvlm.name)
    lv.tokenizer.chat_template = template
    lv.tokenizer.eos_token = eos
    return lv

def assert_answers_are_behind(lv, ps):
    "Both scorers agree, and an answer's number is that of the rendered text, its answer and its end"
    ts = [Targets(("dax blik", "yes"), (1., .5))]*len(ps)
    naive = NaiveScorer(lv).run(ps, ts)
    for settings_ in PREFIXES: assert_same(SharedScorer(lv, **settings_).run(ps, ts), naive)
    whole = lv.render(ps[0]) + lv.blank + "dax blik" + lv.end_token
    ids = lv.tokenizer(whole, add_special_tokens=False)["input_ids"]
    n = len(lv.tokenizer(lv.blank + "dax blik", add_special_tokens=False)["input_ids"]) + 1
    with torch.no_grad(): lp = lv.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    byhand = sum(float(lp[i - 1, ids[i]]) for i in range(len(ids) - n, len(ids)))
    assert naive[0].logprobs[0] == pytest.approx(byhand, abs=1e-4)

@pytest.mark.parametrize("style", ["interleaved", "chat"])
@pytest.mark.parametrize(
    "name,opening,blank,end",
    [("lines", "", " ", "<|endoftext|>"), ("trailing", "", " ", "<|endoftext|>"),
     ("tags", "<|object_ref_start|>assistant\n", "", "<|box_end|>")],
)
def test_other_chat_templates(lvlm, images, style, name, opening, blank, end):
    lv = with_template(lvlm, TEMPLATES[name])
    place = answer_place(lv.tokenizer)
    assert (place.opening, place.blank, lv.end_token) == (opening, blank, end)
    ps = [blind(prompt(images, 20 + k, ptr, style)) for k, (ptr, _) in enumerate(MIXED[:4])]
    assert not lv.render(ps[0]).endswith(" ")
    assert_answers_are_behind(lv, ps)

def test_the_template_of_the_second_world(lvlm, images, blind_okvqa):
    "A question line and an answer line, without a generation prompt"
    lv = with_template(lvlm, (blind_okvqa/"chat_template.jinja").read_text())
    ps = [blind(prompt(images, 20 + k, ptr, "chat")) for k, (ptr, _) in enumerate(MIXED[:4])]
    assert lv.render(ps[1]) == (
        "<|im_start|>Question: What shape is it? Short answer:yes it is<|im_end|>\n"
        "<|im_start|>Question: Name the colour. Short answer:"
    )
    assert answer_place(lv.tokenizer)[:2] == ("", "") and lv.end_token == "<|im_end|>"
    assert_answers_are_behind(lv, ps)

@pytest.mark.parametrize(
    "template,eos,says",
    [
        (LINES, None, "no end of text"),
        (LINES + "{% if add_generation_prompt %}Think:{% endif %}", "</s>", "same text before the answer"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "</s>", "of a message"),
    ],
)
def test_templates_that_are_refused_when_a_model_is_loaded(lvlm, template, eos, says, tmp_path):
    lv = with_template(lvlm, template, eos)
    save_lvlm(lv, tmp_path)
    with pytest.raises(ValueError, match=says): load_lvlm(tmp_path)

def test_a_template_of_texts_shows_no_picture(lvlm, images):
    lv = with_template(lvlm, LINES)
    for scorer in (NaiveScorer(lv), SharedScorer(lv)):
        with_picture, without = scorer.run([prompt(images, 20, (1,)), blind(prompt(images, 20, (1,)))])
        assert "takes texts only" in with_picture.error and without.error is None

def test_what_is_remembered_of_texts_is_bounded(lvlm, images, monkeypatch):
    import leverplus.scorer as mod
    monkeypatch.setattr(mod, "KEPT", 10)
    ps = [blind(prompt(images, 20 + k, (1, 2))) for k in range(4)]
    ts = [Targets(tuple(f"{word} {k}" for word in ("dax", "blik", "vex")), (1.,)*3) for k in range(4)]
    scorer = SharedScorer(lvlm)
    out = []
    for p, t in zip(ps, ts):
        out += scorer.run([p], [t])
        assert len(scorer._ids) <= 10 and 0 < len(scorer._answers) <= 10
    monkeypatch.undo()
    assert_same(out, SharedScorer(lvlm).run(ps, ts))

# ---- the image budget --------------------------------------------------------------------------------------

def visual_tokens(lv, path):
    one = Prompt(7, path, "Name the colour.", (), "interleaved")
    inputs = official_inputs(lv, [lv.render(one)], [prompt_images(lv, one)])
    assert (inputs["input_ids"] == lv.image_id).sum() == inputs["image_grid_thw"].prod()//4
    return int(inputs["image_grid_thw"].prod())//4

@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    "A picture of 12 x 16 visual tokens"
    path = tmp_path_factory.mktemp("photo")/"photo.png"
    pixels = np.random.default_rng(1).integers(256, size=(12*28, 16*28, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)

@pytest.mark.parametrize("budget, tokens", [
    (dict(max_pixels=10**6), 192), (dict(max_pixels=48*784), 48), (dict(min_pixels=784, max_pixels=784), 1),
    (dict(min_pixels=10*784, max_pixels=12*784), 12), (dict(min_pixels=300*784, max_pixels=500*784), 300),
])
def test_a_picture_has_as_many_tokens_as_its_budget_allows(lvlm, photo, budget, tokens):
    "Both scorers, loaded with the budget or given it later"
    loaded = load_lvlm(lvlm.name, **budget)
    later = with_pixels(lvlm, **budget)
    assert loaded.fingerprint == later.fingerprint != lvlm.fingerprint
    assert later.model is lvlm.model
    assert pixel_limits(lvlm.image_processor) == pixel_limits(load_lvlm(lvlm.name).image_processor) # left alone
    seen = visual_tokens(later, photo)
    assert seen == visual_tokens(loaded, photo)
    assert .8*tokens <= seen <= 1.25*tokens and seen <= budget["max_pixels"]/784
    ps = [Prompt(7, photo, "Name the colour.", (Demo(8, photo, "What is it?", "dax"),), "interleaved")]
    ts = [Targets(("yes", "dax"), (1., 1.))]
    reference = NaiveScorer(loaded).run(ps, ts)
    assert_same(SharedScorer(lvlm).around(later).run(ps, ts), reference)
    assert_same(SharedScorer(later, prefix_cache="global").run(ps, ts), reference)

def test_a_scorer_around_another_model_keeps_its_settings(lvlm, tmp_path):
    small = with_pixels(lvlm, max_pixels=56*56)
    one = SharedScorer(lvlm, 77, 3, vision_dir=tmp_path, prefix_cache="query", window=5)
    other = one.around(small)
    assert other.lvlm is small and other.fingerprint != one.fingerprint
    for name in ("batch_tokens", "max_new_tokens", "window", "prefix_cache", "equal_lengths"):
        assert getattr(other, name) == getattr(one, name)
    assert other.prefixes is not one.prefixes and other.vision is not one.vision
    naive = NaiveScorer(lvlm, 3, 4).around(small)
    assert (naive.batch_size, naive.max_new_tokens) == (3, 4) and naive.lvlm is small

@pytest.mark.parametrize("budget", [
    dict(min_pixels=783), dict(max_pixels=783), dict(min_pixels=2000, max_pixels=1999), dict(max_pixels=16385*784),
    dict(min_pixels=1), dict(min_pixels=10**6),
])
def test_a_budget_that_cannot_be_kept_is_refused(lvlm, budget):
    with pytest.raises(ValueError, match="min_pixels .*, max_pixels .*: wanted 784 "): with_pixels(lvlm, **budget)
    with pytest.raises(ValueError, match="wanted 784 "): load_lvlm(lvlm.name, **budget)

def test_a_budget_below_one_pixel_is_refused(lvlm):
    says = "min_pixels -1: wanted a whole number >= 1"
    with pytest.raises(ValueError, match=says): with_pixels(lvlm, min_pixels=-1)
    with pytest.raises(ValueError, match=says): load_lvlm(lvlm.name, min_pixels=-1)

def test_no_budget_is_that_of_the_checkpoint(lvlm):
    assert with_pixels(lvlm) is lvlm
    least, most = pixel_limits(lvlm.image_processor)
    assert with_pixels(lvlm, least, most).fingerprint == lvlm.fingerprint

def test_the_budget_of_a_job_is_in_its_facts_and_in_what_a_run_says(tmp_path):
    from leverplus.checkpoints import passport
    from leverplus.settings import Job, Model, change, settings_of
    import leverplus.rldata_scale # teaches jobs to run
    job = settings_of(Job, limit=2, test=0, counts=dict(random=2), store=str(tmp_path/"store"))
    usual = job.run(tmp_path/"usual", progress=False)
    small = change(job, min_pixels=784, max_pixels=784).run(tmp_path/"small", progress=False)
    assert usual.rows.pointer.tolist() == small.rows.pointer.tolist()
    assert not set(usual.rows.scorer) & set(small.rows.scorer)
    assert (usual.rows.vqa_gt_prob - small.rows.vqa_gt_prob).abs().max() > 1e-4
    assert (small.manifest["lvlm"]["min_pixels"], small.manifest["lvlm"]["max_pixels"]) == (784, 784)
    assert usual.manifest["lvlm"]["max_pixels"] == 50176
    says = passport(dict(info=dict(lvlm=small.manifest["lvlm"])))
    assert (says["min_pixels"], says["max_pixels"]) == (784, 784)
    assert passport({})["max_pixels"] is None
    with pytest.raises(ValueError, match="belong to other settings"):
        change(job, min_pixels=784, max_pixels=784).run(tmp_path/"usual", progress=False)
    with pytest.raises(ValueError, match="min_pixels 9, max_pixels 8: wanted min <= max"):
        Model(min_pixels=9, max_pixels=8)
