"The cost formulas count what torch's own counter counts, on the embedded model and on random configs of the family"
from dataclasses import asdict
import pytest, torch
from hypothesis import given, settings, strategies as st
from leverplus.core import repo_path
from leverplus.cost import (
    WAYS, PEAKS, count_flops, feature_bytes, kv_bytes, mfu, peak_flops, prompt_flops, qwen_config,
    text_flops, vision_flops,
)
from leverplus.scorer import run_text

KINDS = "qwen2_vl", "qwen2_5_vl", "qwen3_vl"

def random_config(kind, draw):
    "A small config of one class; every size that the formulas read is drawn"
    heads, kv = draw(st.sampled_from([(4, 2), (4, 4), (6, 2), (2, 1)]))
    hidden = heads * 16
    depth = draw(st.integers(1, 4))
    dim = 16 * draw(st.integers(1, 3))
    text = dict(
        vocab_size=draw(st.integers(50, 300)),
        hidden_size=hidden,
        intermediate_size=draw(st.integers(20, 200)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]),
    )
    common = dict(
        depth=depth,
        num_heads=2,
        patch_size=draw(st.sampled_from([8, 14])),
        in_channels=3,
        temporal_patch_size=2,
    )
    wide = draw(st.integers(20, 150))
    if kind == "qwen2_vl":
        from transformers import Qwen2VLConfig as Config
        vision = dict(common, embed_dim=dim, hidden_size=hidden, mlp_ratio=draw(st.sampled_from([2, 4])))
    elif kind == "qwen2_5_vl":
        from transformers import Qwen2_5_VLConfig as Config
        vision = dict(
            common,
            hidden_size=dim,
            out_hidden_size=hidden,
            intermediate_size=wide,
            fullatt_block_indexes=draw(st.lists(st.integers(0, depth - 1), unique=True)),
            window_size=2 * common["patch_size"] * draw(st.integers(1, 3)),
        )
    else:
        from transformers import Qwen3VLConfig as Config
        text |= dict(head_dim=16 * draw(st.integers(1, 2)), num_hidden_layers=3)
        text["rope_parameters"]["mrope_section"] = [
            text["head_dim"] // 4,
            text["head_dim"] // 8,
            text["head_dim"] // 8,
        ]
        vision = dict(
            common,
            hidden_size=dim,
            out_hidden_size=hidden,
            intermediate_size=wide,
            num_position_embeddings=64,
            deepstack_visual_indexes=draw(st.lists(st.integers(0, depth - 1), unique=True, max_size=2)),
        )
    return Config(
        text_config=text,
        vision_config=vision,
        image_token_id=1,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )

def build(config):
    from transformers import AutoModelForImageTextToText
    return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()

def patches(config, grid):
    v = config.vision_config
    return torch.randn(grid[0] * grid[1] * grid[2], v.in_channels * v.temporal_patch_size * v.patch_size**2)

@pytest.mark.parametrize(
    "kw,kv_heads",
    [({}, 4), (dict(is_causal=True), 4), (dict(mask=True), 4), (dict(enable_gqa=True), 2)],
    ids=["plain", "causal", "mask", "grouped"],
)
def test_attention_is_counted_by_hand(kw, kv_heads):
    "Two products of the whole square, whichever kernel torch would choose, and whether its counter knows it or not"
    heads = 4
    queries = 6
    keys = 6
    width = 8
    q = torch.randn(1, heads, queries, width)
    k = torch.randn(1, kv_heads, keys, width)
    v = torch.randn(1, kv_heads, keys, width)
    if "mask" in kw: kw = {"attn_mask": torch.ones(1, 1, queries, keys, dtype=torch.bool)}
    counted = count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, **kw))
    assert counted == 2*2*heads*queries*keys*width

@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(data=st.data())
def test_formulas_equal_the_counter(kind, data):
    config = random_config(kind, data.draw)
    model = build(config)
    lm = model.model.language_model
    tokens = data.draw(st.integers(2, 40))
    past = data.draw(st.integers(0, 30))
    grid = [1, 2*data.draw(st.integers(1, 5)), 2*data.draw(st.integers(1, 5))]
    from transformers import DynamicCache
    cache = DynamicCache(config=lm.config)
    emb = lambda n: torch.randn(1, n, lm.config.hidden_size)
    if past:
        with torch.no_grad(): run_text(lm, emb(past), cache)
    counted = count_flops(lambda: model.lm_head(run_text(lm, emb(tokens), cache)[:, -2:]))
    assert text_flops(config, tokens, past, logits=2, causal=False) == pytest.approx(counted, rel=.01)
    assert text_flops(config, tokens, past, logits=2) <= text_flops(
        config, tokens, past, logits=2, causal=False
    )
    counted = count_flops(lambda: model.model.visual(patches(config, grid), torch.tensor([grid])))
    assert vision_flops(config, grid) == pytest.approx(counted, rel=.01)
    # whole windows are the most that windows can cost
    assert vision_flops(config, grid[1] * grid[2]) >= vision_flops(config, grid) * (1 - 1e-9)

def test_a_whole_prompt_on_the_embedded_model():
    "The naive procedure and the shared one, run by hand and counted"
    from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(repo_path("models", "tiny-qwen2.5-vl")).eval()
    c, lm = model.config, model.model.language_model
    grid = [1, 8, 8]
    text = 30
    A = 5
    n = 2
    px = patches(c, grid)
    g = torch.tensor([grid])
    L = 16 + text
    ids = lambda k: torch.cat(
        [
            torch.tensor([[c.vision_start_token_id] + [c.image_token_id] * 16]),
            torch.arange(10, 10 + L + k - 17)[None],
        ],
        1,
    )
    def naive():
        for _ in range(A):
            model(
                input_ids=ids(n + 1),
                pixel_values=px,
                image_grid_thw=g,
                mm_token_type_ids=(ids(n + 1) == c.image_token_id).int(),
            )
        model(
            input_ids=ids(0),
            pixel_values=px,
            image_grid_thw=g,
            mm_token_type_ids=(ids(0) == c.image_token_id).int(),
            logits_to_keep=1,
        )
    def shared():
        model.model.visual(px, g)
        cache = DynamicCache(config=lm.config)
        h = run_text(lm, torch.randn(1, L, 128), cache)
        model.lm_head(h[:, -1:])
        see = torch.ones(1, 1, A*n, L + A*n, dtype=torch.bool)
        model.lm_head(run_text(lm, torch.randn(1, A * n, 128), cache, see))
        cache.crop(-A * n)
        for _ in range(2): model.lm_head(run_text(lm, torch.randn(1, 1, 128), cache))
    size = dict(image_tokens=16, text_tokens=text, answers=A, answer_tokens=n, causal=False)
    slow = count_flops(naive)
    fast = count_flops(shared)
    assert prompt_flops(c, **size, new_tokens=1, way="naive").total == pytest.approx(slow, rel=.01)
    assert (
        prompt_flops(c, **size, new_tokens=3, way="shared").total == pytest.approx(fast, rel=0.01)
        and fast < slow / 3
    )

sizes = dict(
    images=st.lists(st.integers(4, 400), min_size=1, max_size=5),
    text=st.integers(5, 200),
    A=st.integers(0, 12),
    n=st.integers(1, 4),
    new=st.integers(0, 6),
)

@given(**sizes)
def test_sharing_only_saves(images, text, A, n, new):
    c = qwen_config("3b")
    L = sum(images) + text
    cost = lambda way, **kw: prompt_flops(c, images, text, A, n, new, way, **kw)
    total = {way: cost(way).total for way in WAYS}
    assert all(v >= 0 for way in WAYS for v in asdict(cost(way)).values())
    assert cost("naive").total == pytest.approx(sum(asdict(cost("naive")).values()))
    if not A and not new:
        assert set(total.values()) == {0}
        return
    assert (
        total["shared"] <= total["naive_vision"] * (1 + 1e-9)
        and total["naive_vision"] <= total["naive"]
        and total["naive_logits"] <= total["naive"] * (1 + 1e-9)
    )
    known = [cost("shared", known_tokens=k).total for k in (0, L // 3, L - 1)]
    assert known == sorted(known, reverse=True)
    assert cost("shared", known_images=1.0).vision == 0 and cost(
        "shared", known_images=0.5
    ).vision == pytest.approx(cost("shared").vision / 2)

@given(a=st.integers(1, 500), b=st.integers(1, 500))
def test_causal_work_does_not_depend_on_where_a_prompt_is_cut(a, b):
    c = qwen_config("7b")
    assert text_flops(c, a, logits=0) + text_flops(c, b, a, logits=0) == pytest.approx(
        text_flops(c, a + b, logits=0)
    )

def test_table_of_the_3b_model():
    c = qwen_config("3b")
    p = dict(image_tokens=[300] * 3, text_tokens=60)
    t = lambda **kw: prompt_flops(c, **p, **kw).total / 1e12
    got = [
        t(way="naive"),
        t(way="naive_logits"),
        t(way="naive_vision"),
        t(),
        t(known_images=1),
        t(known_images=1, known_tokens=320),
        t(known_images=1, known_tokens=640),
    ]
    assert got == pytest.approx([118.4, 112.3, 71.0, 10.3, 5.6, 3.8, 2.0], abs=.1)
    assert prompt_flops(qwen_config("7b"), **p, known_images=1).total/1e12 == pytest.approx(13., abs=.1)

def test_bytes():
    c = qwen_config("3b")
    d = 2*36*2*128
    assert (
        kv_bytes(c, torch.float32) == 4 * d
        and kv_bytes(c, torch.bfloat16) == 2 * d
        and kv_bytes(c, torch.float8_e4m3fn) == d
    )
    assert feature_bytes(c, 300) == 300*2048*2

@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6)
@given(data=st.data())
def test_bytes_are_those_of_the_real_tensors(kind, data):
    from transformers import DynamicCache
    config = random_config(kind, data.draw)
    model = build(config)
    lm = model.model.language_model
    cache = DynamicCache(config=lm.config)
    with torch.no_grad():
        run_text(lm, torch.randn(1, 7, lm.config.hidden_size), cache)
        out = model.model.get_image_features(
            patches(config, [1, 4, 6]), torch.tensor([[1, 4, 6]]), return_dict=True
        )
    assert kv_bytes(config, torch.float32)*7 == sum(x.nbytes for layer in cache for x in layer[:2])
    assert feature_bytes(config, 6, torch.float32) == sum(
        f.nbytes for fs in [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])] for f in fs
    )

def test_refusals():
    c = qwen_config("3b")
    with pytest.raises(TypeError, match="a qwen2_5_vl_text config"): text_flops(c.text_config, 5)
    with pytest.raises(TypeError, match="a clip config"):
        from transformers import CLIPConfig
        vision_flops(CLIPConfig(), 64)
    with pytest.raises(ValueError, match="sliding attention"):
        text_flops(
            qwen_config("3b", dict(use_sliding_window=True, sliding_window=64, max_window_layers=10)), 5
        )
    with pytest.raises(ValueError, match="way='fast'"): prompt_flops(c, 300, 60, way="fast")
    with pytest.raises(ValueError, match="keeps nothing"):
        prompt_flops(c, 300, 60, way="naive_logits", known_tokens=5)
    for bad in (dict(known_images=1.5), dict(known_tokens=360), dict(known_tokens=-1)):
        with pytest.raises(ValueError, match="wanted (0|a .*number >= 0)"): prompt_flops(c, 300, 60, **bad)
    for s, p in ((0, 1), (1, 0), (-1, 1)):
        with pytest.raises(ValueError, match="wanted a number > 0"): mfu(1, s, p)

def test_every_known_gpu_is_found_by_its_own_name():
    assert {k: peak_flops(f"NVIDIA {k} 80GB") for k in PEAKS} == PEAKS
    assert (
        peak_flops("Tesla T4") is None
        and peak_flops("NVIDIA L40") is None
        and peak_flops("nvidia h100-sxm5") == PEAKS["H100"]
    )
