"""The fast scorer gives the reference's numbers: whatever is shared, kept, evicted, split or padded.

Models are random, with weights so large that a wrong position, mask or image moves log-probabilities by whole units.
"""
import math
from dataclasses import replace
import numpy as np, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from leverplus.lvlm import LVLM, NaiveScorer, Targets, compare, load_lvlm
from leverplus.scorer import SharedScorer
from leverplus.prompt import Demo, Prompt
from leverplus.tiny import CHAT_TEMPLATE, save_lvlm, tiny_qwen, tiny_tokenizer

ANSWERS = ("yes", "yes it is", "yes it", "dax", "dax blik", "red circle", "a")
SIZES = [(56, 56), (56, 56), (84, 56), (56, 140), (112, 84), (200, 60), (30, 90)]

def louder(lv, by=1.7):
    with torch.no_grad():
        for p in lv.model.parameters():
            if p.ndim > 1: p.mul_(by)
    return lv

@pytest.fixture(scope="module")
def images(tmp_path_factory):
    d = tmp_path_factory.mktemp("images")
    g = np.random.default_rng(0)
    out = []
    for i, (w, h) in enumerate(SIZES):
        out.append(str(d / f"{i}.png"))
        Image.fromarray(g.integers(256, size=(h, w, 3), dtype=np.uint8)).save(out[-1])
    return out

@pytest.fixture(scope="module", params=[1, 2], ids=["model1", "model2"])
def lvlm(request, tmp_path_factory):
    return load_lvlm(save_lvlm(louder(tiny_qwen(seed=request.param)), tmp_path_factory.mktemp("lvlm")))

def demo(images, i, at=0):
    return Demo(
        i,
        images[(i + at) % len(images)],
        ("What shape is it?", "Which hue do you see?")[i % 2],
        ANSWERS[i % len(ANSWERS)],
    )
def prompt(images, q, pointer, style="interleaved", at=0):
    return Prompt(
        q, images[q % len(images)], "Name the colour.", tuple(demo(images, i, at) for i in pointer), style
    )
def goals(*texts): return Targets(tuple(texts), (1.,)*len(texts))

class Oracle:
    "The reference, asked once per prompt and answer"
    def __init__(self, lvlm): self.naive, self.known = NaiveScorer(lvlm), {}
    def run(self, prompts, targets):
        todo = [(p, t) for p, t in zip(prompts, targets) if (p, t) not in self.known]
        if todo: self.known.update(zip(todo, self.naive.run(*map(list, zip(*todo)))))
        return [self.known[p, t] for p, t in zip(prompts, targets)]

@pytest.fixture(scope="module")
def oracle(lvlm): return Oracle(lvlm)

def assert_same(got, want, tol=1e-4):
    c = compare(got, want)
    assert not c["failed"], [s.error for s in got if s.error]
    assert c["text"] == 0 and c["logprob"] < tol, c
    for s in got: assert sum(map(math.exp, s.logprobs)) <= 1 + 1e-5
    for a, b in zip(got, want): assert a.gt_prob == pytest.approx(b.gt_prob, abs=1e-5, nan_ok=True)

@pytest.fixture(scope="module")
def world(images):
    "24 prompts of 0..4 demonstrations over a pool of six, with 0..7 answers"
    g = np.random.default_rng(1)
    out = []
    for k in range(24):
        style = ("interleaved", "chat")[k % 2]
        pointer = tuple(int(i) for i in g.choice(6, k % 5, replace=False))
        out.append((prompt(images, 20 + k % 7, pointer, style), goals(*g.permutation(ANSWERS)[:k % 8])))
    return [p for p, _ in out], [t for _, t in out]

WAYS = {
    "as it comes": {},
    "one by one": dict(batch_tokens=1),
    "small windows": dict(window=3),
    "equal lengths": dict(equal_lengths=True),
    "loop over windows": dict(group_windows=False),
    "no room for features": dict(cache_bytes=1),
    "query": dict(prefix_cache="query"),
    "query, small windows": dict(prefix_cache="query", window=5),
    "query, one by one": dict(prefix_cache="query", batch_tokens=1),
    "global 0": dict(prefix_cache="global", prefix_depth=0),
    "global 1": dict(prefix_cache="global"),
    "global 4": dict(prefix_cache="global", prefix_depth=4, window=7),
    "global, equal lengths": dict(prefix_cache="global", prefix_depth=2, equal_lengths=True),
    "global, hardly room": dict(prefix_cache="global", prefix_depth=4, prefix_bytes=300_000, window=4),
    "global, no room": dict(prefix_cache="global", prefix_bytes=0),
}

@pytest.mark.parametrize("way", WAYS)
def test_equal_to_the_reference(lvlm, oracle, world, way):
    "Twice: with empty caches and with whatever the first round left"
    s = SharedScorer(lvlm, **WAYS[way])
    for _ in range(2): assert_same(s.run(*world), oracle.run(*world))
    assert s.stats.failed == s.stats.retries == 0 and s.stats.prompts == 48
    if s.prefix_cache == "off": assert s.stats.ran == s.stats.tokens and not s.stats.prefixes
    elif way != "global, no room": assert s.stats.ran < s.stats.tokens and s.stats.reused
    keeps = s.prefix_cache == "global" and s.prefixes.max_bytes > 0
    assert (len(s.prefixes) > 0) == keeps and s.prefixes.nbytes <= s.prefixes.max_bytes

@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_prompts_in_any_settings(lvlm, oracle, images, data):
    draw, run = data.draw, []
    for _ in range(draw(st.integers(1, 6))):
        pointer = draw(st.lists(st.integers(0, 4), max_size=4, unique=True))
        style = draw(st.sampled_from(["interleaved", "chat"]))
        run.append(
            (
                prompt(images, draw(st.integers(20, 23)), tuple(pointer), style),
                goals(*draw(st.lists(st.sampled_from(ANSWERS), max_size=4, unique=True))),
            )
        )
    s = SharedScorer(
        lvlm,
        batch_tokens=draw(st.sampled_from([1, 150, 400, 8192])),
        window=draw(st.sampled_from([1, 2, 2048])),
        equal_lengths=draw(st.booleans()),
        prefix_cache=draw(st.sampled_from(["off", "query", "global"])),
        prefix_depth=draw(st.integers(0, 4)),
        prefix_bytes=draw(st.sampled_from([0, 200_000, 1 << 28])),
    )
    for _ in range(draw(st.integers(1, 2))):
        assert_same(s.run(*map(list, zip(*run))), oracle.run(*map(list, zip(*run))))

@pytest.mark.parametrize("kw", [{}, dict(prefix_cache="global", prefix_depth=2)], ids=["off", "global"])
def test_eager_equals_the_reference(lvlm, oracle, world, kw):
    s = SharedScorer(load_lvlm(lvlm.name, attn="eager"), **kw)
    for _ in range(2): assert_same(s.run(*world), oracle.run(*world))

def test_order_of_prompts_and_company_change_nothing(lvlm, oracle, world):
    s = SharedScorer(lvlm, prefix_cache="global")
    perm = np.random.default_rng(2).permutation(len(world[0]))
    mixed = s.run(*([x[i] for i in perm] for x in world))
    want = oracle.run(*world)
    assert_same(mixed, [want[i] for i in perm])
    assert_same([s.run([p], [t])[0] for p, t in zip(*world)], want)

def test_settings_change_no_fingerprint(lvlm):
    shared = {SharedScorer(lvlm, **kw).fingerprint for kw in WAYS.values()}
    assert shared == {NaiveScorer(lvlm).fingerprint}

def test_same_prompt_many_times_and_same_images(lvlm, oracle, images):
    p = replace(prompt(images, 20, (1, 2)), image=images[1])
    p = replace(p, demos=tuple(replace(d, image=images[1]) for d in p.demos))
    many = [p]*5, [goals("dax")]*5
    for kw in ({}, dict(prefix_cache="query")): assert_same(SharedScorer(lvlm, **kw).run(*many), oracle.run(*many))

def test_only_text_or_only_probabilities(lvlm, oracle, world):
    s = SharedScorer(lvlm, prefix_cache="global")
    want = oracle.run(*world)
    assert [a.text for a in s.run(world[0])] == [b.text for b in want]
    out = s.run(*world, generate=False)
    assert all(a.text is None and np.allclose(a.logprobs, b.logprobs, atol=1e-4) for a, b in zip(out, want))

# ---- stored beginnings -------------------------------------------------------------------------------------

def test_wrong_beginnings_would_show(lvlm, images):
    "Stored values that stand one place off move the numbers by far more than the tolerance"
    s = SharedScorer(lvlm, prefix_cache="global")
    p = prompt(images, 20, (3, 4))
    t = [goals("dax", "yes")]
    right = np.array(s.run([p], t)[0].logprobs)
    for kv in [k for k in s.prefixes if isinstance(k, tuple)]:
        s.prefixes[kv][:, 1] = s.prefixes[kv][:, 1].roll(1, 2)
    assert np.abs(np.array(s.run([p], t)[0].logprobs) - right).max() > 1e-2

@pytest.mark.parametrize("change", ["image", "question", "answer", "style", "order", "opening"])
def test_other_beginnings_are_not_taken_for_these(lvlm, oracle, images, change):
    p = prompt(images, 20, (3, 4))
    d1, d2 = p.demos
    q = dict(
        image=replace(p, demos=(replace(d1, image=images[5]), d2)),
        question=replace(p, demos=(replace(d1, question="What is it?"), d2)),
        answer=replace(p, demos=(replace(d1, answer="wug"), d2)),
        style=replace(p, style="chat"),
        order=replace(p, demos=(d2, d1)),
        opening=replace(p, demos=()),
    )[change]
    s = SharedScorer(lvlm, prefix_cache="global", prefix_depth=4)
    t = [goals("dax", "yes")]
    s.run([p], t)
    assert len(s.prefixes)
    assert_same(s.run([q], t), oracle.run([q], t))

def test_warm_store_runs_fewer_tokens(lvlm, world):
    s = SharedScorer(lvlm, prefix_cache="global", prefix_depth=4)
    s.run(*world)
    cold = s.stats.ran
    s.run(*world)
    assert s.stats.ran - cold < cold/2 and s.stats.tokens == 2*plain(lvlm, world).stats.tokens

def plain(lvlm, world):
    s = SharedScorer(lvlm)
    s.run(*world)
    return s

def test_query_mode_forgets(lvlm, world):
    s = SharedScorer(lvlm, prefix_cache="query")
    s.run(*world)
    first = s.stats.ran
    s.run(*world)
    assert s.stats.ran == 2*first and len(s.prefixes) == 0 and not s.prefixes.held

def test_features_from_disk(lvlm, oracle, world, tmp_path):
    SharedScorer(lvlm, vision_dir=tmp_path).run(*world)
    s = SharedScorer(lvlm, vision_dir=tmp_path)
    assert_same(s.run(*world), oracle.run(*world))
    assert s.vision.counts["encoded"] == 0 and s.vision.counts["disk"] > 0

# ---- memory ------------------------------------------------------------------------------------------------

def short_of_memory(s, monkeypatch, tokens):
    "Passes over more than `tokens` padded tokens run out of memory"
    real, tried = s._forward, []
    def forward(items):
        sizes = [s._size(*i) for i in items]
        n = (max(a for a, _ in sizes) + max(b for _, b in sizes)) * len(items)
        tried.append(n)
        if n > tokens: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(items)
    monkeypatch.setattr(s, "_forward", forward)
    return tried

@pytest.mark.parametrize(
    "kw",
    [{}, dict(prefix_cache="query"), dict(prefix_cache="global", prefix_depth=2)],
    ids=["off", "query", "global"],
)
def test_out_of_memory_splits_and_loses_nothing(lvlm, oracle, world, monkeypatch, kw):
    s = SharedScorer(lvlm, **kw)
    tried = short_of_memory(s, monkeypatch, 600)
    assert_same(s.run(*world), oracle.run(*world))
    assert s.stats.retries and s.budget <= 600 and max(tried) > 600
    # the smaller budget is kept
    n = len(tried)
    s.run(*world)
    assert max(tried[n:]) <= 600

def test_budget_grows_again_after_clean_batches(lvlm, world, monkeypatch):
    s = SharedScorer(lvlm, batch_tokens=1000)
    s.budget = 400
    s._clean = 19
    s.run(world[0][:1])
    assert s.budget == 501
    for _ in range(20):
        s._clean = 19
        s.run(world[0][:1])
    assert s.budget == 1000

def test_prompt_that_never_fits_is_a_failed_row(lvlm, oracle, images, monkeypatch):
    ps = [prompt(images, 20, ()), prompt(images, 21, (0, 1, 2, 3)), prompt(images, 22, ())]
    ts = [goals("dax")] * 3
    s = SharedScorer(lvlm)
    short_of_memory(s, monkeypatch, 80)
    out = s.run(ps, ts)
    assert [r.error is None for r in out] == [True, False, True]
    assert "OutOfMemoryError" in out[1].error and out[1].question_id == 21 and not out[1].logprobs
    assert_same([out[0], out[2]], oracle.run([ps[0], ps[2]], ts[:2]))
    assert s.stats.failed == 1

def test_a_single_prompt_gives_up_stored_beginnings_before_it_fails(lvlm, oracle, images, monkeypatch):
    s = SharedScorer(lvlm, prefix_cache="global")
    p = prompt(images, 20, (1, 2))
    t = goals("dax")
    s.run([p], [t])
    real = s._score
    def score(rows, generate):
        if len(s.prefixes): raise torch.OutOfMemoryError("CUDA out of memory")
        return real(rows, generate)
    monkeypatch.setattr(s, "_score", score)
    assert_same(s.run([p], [t]), oracle.run([p], [t]))
    assert s.stats.retries

def test_failing_beginning_costs_only_its_prompts(lvlm, oracle, images, monkeypatch):
    s = SharedScorer(lvlm, prefix_cache="global")
    real = SharedScorer._forward
    def forward(items):
        if any(3 in r.prompt.pointer for r, _ in items): raise RuntimeError("broken demonstration")
        return real(s, items)
    monkeypatch.setattr(s, "_forward", forward)
    ps = [prompt(images, 20 + k, ptr) for k, ptr in enumerate([(1, 2), (3, 2), (1, 4), (2, 3)])]
    ts = [goals("dax")] * 4
    out = s.run(ps, ts)
    assert [r.error is None for r in out] == [True, False, True, False]
    assert "broken demonstration" in out[1].error
    assert_same([out[0], out[2]], oracle.run([ps[0], ps[2]], ts[:2]))

def test_interrupt_goes_through_and_the_scorer_lives_on(lvlm, oracle, world, monkeypatch):
    s = SharedScorer(lvlm, prefix_cache="global", window=6)
    real, n = s._score, []
    def score(rows, generate):
        n.append(1)
        if len(n) == 3: raise KeyboardInterrupt
        return real(rows, generate)
    monkeypatch.setattr(s, "_score", score)
    with pytest.raises(KeyboardInterrupt): s.run(*world)
    assert_same(s.run(*world), oracle.run(*world))

# ---- half precision, other models, refusals ----------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_within_its_rounding(tmp_path, images, dtype):
    "Not by equality: rounding depends on the shape of a batch"
    folder = save_lvlm(tiny_qwen(seed=1), tmp_path)
    lv = load_lvlm(folder, dtype=dtype)
    assert lv.tolerance == 0.5 and lv.model.dtype == dtype
    ps = [prompt(images, 20 + k, tuple(range(k % 4))) for k in range(8)]
    ts = [goals("dax", "yes", "yes it is")] * 8
    naive = NaiveScorer(lv).run(ps, ts)
    for kw in ({}, dict(prefix_cache="global", prefix_depth=2)):
        c = compare(SharedScorer(lv, **kw).run(ps, ts), naive)
        assert not c["failed"] and c["logprob"] < lv.tolerance
    # not silently single
    assert {p.dtype for p in lv.model.parameters()} == {dtype}
    assert lv.fingerprint != load_lvlm(folder).fingerprint

def text_part(kind, tok):
    i = tok.convert_tokens_to_ids
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]) | (
        dict(mrope_interleaved=True) if kind == "qwen3_vl" else {}
    )
    return dict(
        vocab_size=len(tok),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        head_dim=32,
        initializer_range=0.09,
        bos_token_id=i("<|endoftext|>"),
        eos_token_id=i("<|im_end|>"),
        pad_token_id=i("<|endoftext|>"),
        rope_parameters=rope,
        tie_word_embeddings=False,
    )

def relative(kind, folder):
    "A random tiny Qwen2-VL or Qwen3-VL, saved with the processor of its family"
    import transformers as T
    tok = tiny_tokenizer()
    i = tok.convert_tokens_to_ids
    torch.manual_seed(0)
    ids = dict(
        image_token_id=i("<|image_pad|>"),
        video_token_id=i("<|video_pad|>"),
        vision_start_token_id=i("<|vision_start|>"),
        vision_end_token_id=i("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    if kind == "qwen2_vl":
        vision = dict(depth=2, embed_dim=64, hidden_size=128, num_heads=4, mlp_ratio=2, initializer_range=.09)
        cfg = T.Qwen2VLConfig(text_config=text_part(kind, tok), vision_config=vision, **ids)
        Model = T.Qwen2VLForConditionalGeneration
        Proc = T.Qwen2VLProcessor
        Video = T.Qwen2VLVideoProcessor
        patch = 14
    else:
        vision = dict(
            depth=3,
            hidden_size=64,
            intermediate_size=128,
            num_heads=4,
            out_hidden_size=128,
            deepstack_visual_indexes=[0, 1],
            num_position_embeddings=64,
            initializer_range=0.09,
        )
        cfg = T.Qwen3VLConfig(text_config=text_part(kind, tok), vision_config=vision, **ids)
        Model = T.Qwen3VLForConditionalGeneration
        Proc = T.Qwen3VLProcessor
        Video = T.Qwen3VLVideoProcessor
        patch = 16
    ip = T.Qwen2VLImageProcessor(
        size=dict(shortest_edge=64 * 64, longest_edge=64 * 64 * 16), patch_size=patch, merge_size=2
    )
    model = Model._from_config(cfg, attn_implementation="sdpa").float()
    lv = louder(LVLM(model, tok, ip, kind))
    model.save_pretrained(folder)
    Proc(
        image_processor=ip, tokenizer=tok, video_processor=Video(), chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)
    tok.save_pretrained(folder)
    return load_lvlm(folder)

@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_relatives_speak_the_same_protocol(kind, tmp_path, images, world):
    lv = relative(kind, tmp_path)
    want = NaiveScorer(lv).run(*world)
    assert lv.model.config.model_type == kind
    for kw in (
        {},
        dict(prefix_cache="global", prefix_depth=2),
        dict(equal_lengths=True, group_windows=False),
    ):
        s = SharedScorer(lv, **kw)
        for _ in range(2): assert_same(s.run(*world), want)
    p = world[0][2]
    a, b = s.run([p, replace(p, image=images[4])], [goals("dax")] * 2)
    assert abs(a.logprobs[0] - b.logprobs[0]) > 1e-2

@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_relatives_read_texts_alone(kind, tmp_path, world):
    "Without any picture, and beside prompts with pictures"
    lv = relative(kind, tmp_path)
    def blind(p): return replace(p, image=None, demos=tuple(replace(d, image=None) for d in p.demos))
    half = [replace(p, image=None) for p in world[0][:4]]
    prompts = [*map(blind, world[0][:6]), *half, *world[0][:2]]
    targets = [goals("dax", "yes", "yes it is")]*len(prompts)
    want = NaiveScorer(lv).run(prompts, targets)
    for kw in ({}, dict(prefix_cache="global", prefix_depth=2)):
        s = SharedScorer(lv, **kw)
        for _ in range(2): assert_same(s.run(prompts, targets), want)

def test_sliding_windows_and_flash_are_refused(lvlm, tmp_path):
    import json, shutil
    shutil.copytree(lvlm.name, tmp_path / "m")
    f = tmp_path / "m" / "config.json"
    c = json.loads(f.read_text())
    c["text_config"] |= dict(
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
        layer_types=["full_attention"] + ["sliding_attention"] * (c["text_config"]["num_hidden_layers"] - 1),
    )
    f.write_text(json.dumps(c))
    with pytest.raises(ValueError, match="sliding"): load_lvlm(tmp_path/"m")
    with pytest.raises(ValueError, match="flash"): load_lvlm(lvlm.name, attn="flash_attention_2")

@pytest.mark.parametrize(
    "kw,says",
    [
        (dict(prefix_cache="on"), "off, query, global"),
        (dict(batch_tokens=0), "wanted a whole number >= 1"),
        (dict(window=0), "wanted a whole number >= 1"),
        (dict(max_new_tokens=0), "wanted a whole number >= 1"),
    ],
)
def test_bad_settings(lvlm, kw, says):
    with pytest.raises(ValueError, match=says): SharedScorer(lvlm, **kw)

def test_answer_that_would_be_cut_differently_fails_by_name(lvlm, images, monkeypatch):
    s = SharedScorer(lvlm)
    real = s.lvlm.tokenizer.__class__.__call__
    def tokenise(self, text, **kw):
        out = real(self, text, **kw)
        # as if two tokens had merged
        if isinstance(text, str) and text.endswith("dax") and text != "dax":
            out["input_ids"] = out["input_ids"][:-1]
        return out
    monkeypatch.setattr(s.lvlm.tokenizer.__class__, "__call__", tokenise)
    a, b = s.run([prompt(images, 20, (0,)), prompt(images, 21, (0,))], [goals("dax"), goals("wug")])
    assert "answer 'dax' is tokenised differently" in a.error and b.error is None

@pytest.mark.parametrize("generate", [True, False])
def test_numbers_that_are_none_are_failed_rows(tmp_path, images, generate):
    "As where float16 overflows: an answer made of such logits is no answer"
    lv = load_lvlm(save_lvlm(tiny_qwen(seed=1), tmp_path))
    ps = [prompt(images, 20 + k, (0,)) for k in range(3)]
    with torch.no_grad(): lv.model.lm_head.weight[7] = math.nan
    for s in (SharedScorer(lv), SharedScorer(lv, prefix_cache="global")):
        for out in (s.run(ps, generate=generate), s.run(ps, [goals("dax")] * 3, generate=generate)):
            assert all("not finite" in r.error and r.text is None and not r.logprobs for r in out)
    assert all("not finite" in r.error for r in NaiveScorer(lv).run(ps, [goals("dax")]*3))

def test_compare_sees_nan(lvlm, images):
    a = SharedScorer(lvlm).run([prompt(images, 20, ())], [goals("dax", "yes")])
    b = [replace(a[0], logprobs=(math.nan, a[0].logprobs[1]))]
    assert math.isnan(compare(a, b)["logprob"])

def test_a_demonstration_without_an_answer(lvlm, oracle, images):
    p = prompt(images, 20, (1, 2))
    p = replace(p, demos=(replace(p.demos[0], answer=""), p.demos[1]))
    t = [goals("dax")]
    assert_same(SharedScorer(lvlm).run([p], t), oracle.run([p], t))

def test_answers_of_the_same_tokens_count_once(lvlm, oracle, images):
    "Whatever the spellings, their order and their weights; each keeps its log-probability"
    p = prompt(images, 20, (1,))
    one, two = "caf\u00e9", "cafe\u0301"
    alone = oracle.run([p], [Targets((one,), (1.,))])[0].gt_prob
    red = oracle.run([p], [Targets(("red",), (1.,))])[0].gt_prob
    cases = {
        Targets((one, two), (.6, .3)): .9*alone,
        Targets((two, one), (.6, .6)): alone,
        Targets((two, "red", one), (.3, .6, 0.)): .3*alone + .6*red,
        Targets((two,), (1.,)): alone,
    }
    for scorer in (SharedScorer(lvlm), SharedScorer(lvlm, prefix_cache="global"), oracle):
        for target, want in cases.items():
            said = scorer.run([p], [target])[0]
            assert said.error is None and said.gt_prob == pytest.approx(want, rel=1e-3)
            spelled = [l for text, l in zip(target.texts, said.logprobs) if text in (one, two)]
            assert spelled == [spelled[0]]*len(spelled)

def test_a_lost_device_stops_the_run(lvlm, world, monkeypatch):
    s = SharedScorer(lvlm)
    def lost(*args): raise RuntimeError("CUDA error: device-side assert triggered")
    monkeypatch.setattr(s, "_score", lost)
    with pytest.raises(RuntimeError, match="device-side"): s.run(*world)

CHANGES = dict(
    rope=("text", "rope_parameters", {"rope_theta": 50.0}),
    eps=("text", "rms_norm_eps", 1e-2),
    act=("text", "hidden_act", "gelu"),
    windows=("vision", "window_size", 112),
    full=("vision", "fullatt_block_indexes", [0, 1]),
)

@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_sees_what_weights_do_not_show(change):
    lv = tiny_qwen(seed=2)
    was, eyes = lv.fingerprint, lv.vision_fingerprint
    part, name, value = CHANGES[change]
    c = lv.model.config.get_text_config() if part == "text" else lv.model.config.vision_config
    setattr(c, name, {**getattr(c, name), **value} if isinstance(value, dict) else value)
    assert lv.fingerprint != was and (lv.vision_fingerprint != eyes) == (part == "vision")

def test_fingerprint_sees_the_tokenizer_but_not_its_last_call():
    lv = tiny_qwen(seed=2)
    was = lv.fingerprint
    lv.tokenizer(["a", "some longer text"], padding=True, truncation=True, max_length=3)
    assert lv.fingerprint == was
    lv.tokenizer.add_tokens(["island"])
    assert lv.fingerprint != was

def test_compare_refuses_different_prompts(lvlm, images):
    s = SharedScorer(lvlm)
    a = s.run([prompt(images, 20, ())], [goals("dax")])
    with pytest.raises(ValueError, match="different prompts"):
        compare(a, s.run([prompt(images, 21, ())], [goals("dax")]))
    assert compare(a, a) == dict(n=1, failed=0, logprob=0., text=0)

def test_scorers_name_their_reference(lvlm):
    s = SharedScorer(lvlm, max_new_tokens=4)
    r = s.reference()
    assert isinstance(r, NaiveScorer) and r.max_new_tokens == 4 and r.reference() is r
    assert s.tolerance == r.tolerance == 1e-3 and r.fingerprint == s.fingerprint
