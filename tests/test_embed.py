"Embeddings: real CLIPModel code path on a random tiny CLIP; ids, fingerprints, disk, broken input"
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from leverplus.embed import (
    Clip, EmbedStore, embed_items, gather_stores, load_clip, nearest, show_neighbours, unit,
)

WORDS = "what shape colour is this that thing on the island ?".split()

def make_clip(path, seed=0, size=16):
    "A random CLIP of 16x16 pictures and a dozen words, saved as transformers saves it"
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
    chars = sorted(set("abcdefghijklmnopqrstuvwxyz?0123456789"))
    tokens = [*chars, *(c + "</w>" for c in chars), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tok = CLIPTokenizer(vocab=vocab, merges=[])
    n = len(vocab)
    common = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    special = dict(bos_token_id=n - 2, eos_token_id=n - 1, pad_token_id=n - 1)
    text = common | special | dict(vocab_size=n, max_position_embeddings=40)
    vision = common | dict(image_size=size, patch_size=8)
    cfg = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    torch.manual_seed(seed)
    CLIPModel(cfg).save_pretrained(path)
    tok.save_pretrained(path)
    crop = {"height": size, "width": size}
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size=crop).save_pretrained(path)
    return path

def make_items(folder, n=12):
    g = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(g.integers(256, size=(20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return pd.DataFrame(
        dict(
            question_id=500 + np.arange(n),
            image_id=np.arange(n),
            image_path=[folder / f"{i}.png" for i in range(n)],
            question=[f"what {WORDS[i % 5]} is this ?" for i in range(n)],
            answer=[f"a{i}" for i in range(n)],
        )
    )

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    d = tmp_path_factory.mktemp("clip")
    (d / "img").mkdir()
    return dict(dir=d, path=make_clip(d/"clip"), items=make_items(d/"img"))

@pytest.fixture(scope="module")
def clip(world): return load_clip(world["path"], "cpu")

@pytest.fixture(scope="module")
def store(world, clip): return embed_items(world["items"], clip, progress=False)

# -- through CLIP -------------------------------------------------------------------------------------------

def test_vectors_are_those_of_the_model_called_by_hand(world, clip, store):
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel
    m, p, t = (c.from_pretrained(world["path"]) for c in (CLIPModel, AutoImageProcessor, AutoTokenizer))
    m.eval()
    it = world["items"].iloc[3]
    with torch.no_grad():
        out = m(
            **t([it.question], return_tensors="pt"),
            **p(images=[Image.open(it.image_path)], return_tensors="pt")
        )
    torch.testing.assert_close(store.get([it.question_id], "image"), out.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(store.get([it.question_id], "text"), out.text_embeds, atol=1e-5, rtol=0)

def test_store_is_unit_float32_in_the_order_of_items(world, store):
    assert store.ids.tolist() == world["items"].question_id.tolist()
    assert (store.dim("image"), store.dim("text"), store.dim()) == (12, 12, 24)
    for k in ("image", "text", "mixed"):
        v = store.get(store.ids, k)
        assert v.dtype == torch.float32 and v.shape[1] == store.dim(k)
        torch.testing.assert_close(v.norm(dim=-1), torch.ones(len(store)))

def test_batch_size_company_and_order_change_nothing(world, clip, store):
    it = world["items"].iloc[[9, 2, 7]]
    again = embed_items(it, clip, batch_size=1, progress=False)
    torch.testing.assert_close(again.get([502, 507, 509]), store.get([502, 507, 509]), atol=1e-5, rtol=0)

def test_distinct_pictures_and_questions_are_encoded_once(world, clip, monkeypatch):
    it = pd.concat([world["items"].head(3)] * 4, ignore_index=True).assign(question_id=range(12))
    seen = []
    (world["dir"] / "img/copy.png").write_bytes((world["dir"] / "img/0.png").read_bytes())
    it.loc[11, "image_path"] = world["dir"] / "img/copy.png"
    for what in ("images", "texts"):
        fn = getattr(Clip, what)
        monkeypatch.setattr(Clip, what, lambda s, x, fn=fn: (seen.append(len(x)), fn(s, x))[1])
    s = embed_items(it, clip, progress=False)
    assert seen == [3, 3]
    assert torch.equal(s.get(11, "image"), s.get(0, "image"))
    assert len(set(s.meta["image_hash"])) == 3

def test_old_and_new_transformers_outputs_are_read_alike(clip):
    from types import SimpleNamespace
    x = torch.randn(3, 12)
    assert torch.equal(clip._unit(x), clip._unit(SimpleNamespace(pooler_output=x)))

def test_long_question_is_cut_and_counted(world, clip):
    s = embed_items(world["items"].head(2).assign(question=["what is " * 50, "what ?"]), clip, progress=False)
    assert s.meta["cut_short"] == 1

def test_grey_and_transparent_pictures_become_rgb(world, clip, tmp_path):
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        Image.new(mode, (9, 7)).save(tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    paths = sorted(tmp_path.iterdir())
    n = len(paths)
    items = pd.DataFrame(dict(question_id=range(n), image_path=paths, question="what ?"))
    assert len(embed_items(items, clip, progress=False)) == 5

# -- fingerprint --------------------------------------------------------------------------------------------

def test_fingerprint_follows_weights_preprocessing_and_items(world, clip, store, tmp_path):
    it = world["items"]
    f = lambda items=it, c=clip: embed_items(items, c, progress=False).fingerprint
    assert f() == store.fingerprint and f(c=load_clip(str(world["path"]), "cpu")) == store.fingerprint
    changed = [
        f(c=load_clip(make_clip(tmp_path / "seed1", seed=1), "cpu")),
        f(it.head(11)),
        f(it.assign(question=it.question.str.upper())),
        f(it.assign(image_path=it.image_path.to_list()[::-1])),
        f(it.assign(question_id=it.question_id + 1)),
    ]
    other = load_clip(world["path"], "cpu")
    other.image_processor.image_mean = [0.1, 0.2, 0.3]
    changed.append(f(c=Clip(other.model, other.tokenizer, other.image_processor, "x")))
    assert len({store.fingerprint, *changed}) == 7

def test_fingerprint_does_not_follow_folder_or_use(world, clip, store, tmp_path):
    import shutil
    before = clip.fingerprint
    shutil.copytree(world["path"], tmp_path / "moved")
    shutil.copytree(world["dir"] / "img", tmp_path / "img")
    it = world["items"]
    moved = it.assign(image_path=[tmp_path / "img" / p.name for p in it.image_path])
    # `clip` has padded and truncated meanwhile
    assert load_clip(tmp_path / "moved", "cpu").fingerprint == before
    assert embed_items(moved, tmp_path/"moved", device="cpu", progress=False).fingerprint == store.fingerprint

# -- broken input -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n cut"])
def test_broken_picture_names_file_and_question(world, clip, tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    it = world["items"].copy()
    it.loc[5, "image_path"] = tmp_path / "bad.png"
    with pytest.raises(ValueError, match="bad.png: image of question_id 505 is broken"):
        embed_items(it, clip, progress=False)

def test_truncated_png_is_broken_too(world, clip, tmp_path):
    b = (world["dir"] / "img/1.png").read_bytes()
    (tmp_path / "half.png").write_bytes(b[: len(b) // 2])
    with pytest.raises(ValueError, match="half.png.*500"):
        embed_items(world["items"].head(1).assign(image_path=tmp_path / "half.png"), clip, progress=False)

def test_missing_picture_column_model(world, clip):
    it = world["items"]
    with pytest.raises(FileNotFoundError, match="gone.png: image of question_id 500"):
        embed_items(it.assign(image_path="gone.png"), clip, progress=False)
    with pytest.raises(ValueError, match="no column question"):
        embed_items(it.drop(columns="question"), clip, progress=False)
    with pytest.raises(ValueError, match="no items"): embed_items(it.head(0), clip, progress=False)
    with pytest.raises(ValueError, match="500 occurs more than once"):
        embed_items(pd.concat([it, it.head(1)]), clip, progress=False)
    with pytest.raises(FileNotFoundError, match="config.json is missing"): load_clip(world["dir"]/"img")

# -- without pictures ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("column", ["absent", None, np.nan, pd.NA])
def test_items_without_pictures(world, clip, store, column, tmp_path):
    it = world["items"].drop(columns="image_path")
    if not isinstance(column, str): it = it.assign(image_path=[column]*len(it))
    s = embed_items(it, clip, progress=False)
    assert s.kinds == ("text",) and s.kind() == "text" and s.image is None
    assert torch.equal(s.get(s.ids), store.get(s.ids, "text")) and s.dim() == 12
    for kind in ("image", "mixed"):
        with pytest.raises(ValueError, match=f"kind '{kind}' is not in this store: choose one of text"):
            s.get(500, kind)
    assert nearest(s, 500, 2).equals(nearest(store, 500, 2, "text"))
    s.save(tmp_path/"s")
    back = EmbedStore.load(tmp_path/"s")
    assert back.kinds == s.kinds and back.fingerprint == s.fingerprint != store.fingerprint
    assert torch.equal(back.get(back.ids), s.get(s.ids))
    assert s.unlike([500], ["0"*32], [it.question.iloc[0]]) == [500]       # a picture came later
    assert s.unlike([500], [None], [it.question.iloc[0]]) == []

def test_some_items_without_a_picture(world, clip, store, tmp_path):
    "They are like nothing by image, and their question by mixed; all others are as they were"
    it = world["items"].copy()
    it["image_path"] = [None if i in (0, 5) else str(path) for i, path in enumerate(it.image_path)]
    s = embed_items(it, clip, progress=False)
    assert s.kinds == store.kinds and s.kind() == "mixed"
    blind, others = it.question_id.iloc[[0, 5]], it.question_id.drop(index=[0, 5])
    torch.testing.assert_close(s.get(others), store.get(others), atol=1e-5, rtol=0)
    assert not s.get(blind, "image").any()
    assert torch.equal(s.get(blind)[:, 12:], s.get(blind, "text")) and not s.get(blind)[:, :12].any()
    torch.testing.assert_close(s.get(s.ids).norm(dim=-1), torch.ones(len(s)))
    assert s.meta["image_hash"][0] is None
    s.save(tmp_path/"s")
    assert torch.equal(EmbedStore.load(tmp_path/"s").get(s.ids), s.get(s.ids))
    parts = [embed_items(it[:1], clip, progress=False), embed_items(it[1:], clip, progress=False)]
    got = gather_stores(it, parts)
    assert got.fingerprint == s.fingerprint
    torch.testing.assert_close(got.get(s.ids), s.get(s.ids), atol=1e-5, rtol=0)
    text_only = gather_stores(it[:1], parts)
    assert text_only.kinds == ("text",) and text_only.fingerprint == parts[0].fingerprint

def test_given_vectors_are_known_by_their_source(tmp_path):
    g = torch.Generator().manual_seed(0)
    text, answer = torch.randn(4, 5, generator=g), torch.randn(4, 3, generator=g)
    made = dict(encoder="minilm", items="okvqa")
    s = EmbedStore.from_vectors(range(4), text, answer=answer, source=made)
    assert s.source == made and s.kinds == ("text", "answer")
    assert [s.kind(), s.kind("answer")] == ["text", "answer"]
    torch.testing.assert_close(s.get([2], "answer"), unit(answer[2:3]))
    rounded = EmbedStore.from_vectors(range(4), text*(1 + 1e-6), answer=answer, source=made)
    assert rounded.fingerprint == s.fingerprint
    others = [
        EmbedStore(range(4), text=text, answer=answer),
        EmbedStore.from_vectors(range(4), text, answer=answer, source=dict(encoder="other", items="okvqa")),
        EmbedStore.from_vectors(range(1, 5), text, answer=answer, source=made),
    ]
    assert len({s.fingerprint, *(o.fingerprint for o in others)}) == 4
    s.save(tmp_path/"s")
    back = EmbedStore.load(tmp_path/"s")
    assert back.fingerprint == s.fingerprint and back.source == made and back.kinds == s.kinds
    s.vectors["answer"][0, 0] += .1
    assert "vectors" in s.source and s.fingerprint != back.fingerprint

def test_same_numbers_under_other_names_are_other_stores():
    v = torch.eye(3)
    stores = [
        EmbedStore(range(3), v), EmbedStore(range(3), text=v), EmbedStore(range(3), answer=v),
        EmbedStore(range(3), other=v), EmbedStore(range(3), v, v), EmbedStore(range(3), text=v, answer=v),
    ]
    assert len({s.fingerprint for s in stores}) == len(stores)
    assert [s.kind() for s in stores] == ["image", "text", "answer", "other", "mixed", "text"]

@pytest.mark.parametrize(
    "given,says",
    [
        (dict(), "no vectors"),
        (dict(mixed=torch.eye(2)), "made of image and text"),
        (dict(text=torch.eye(3)), "3 text vectors"),
    ],
)
def test_stores_that_cannot_be(given, says):
    with pytest.raises(ValueError, match=says): EmbedStore([1, 2], **given)
    with pytest.raises(ValueError, match="take another word"):
        EmbedStore.from_vectors([1, 2], torch.eye(2), source=dict(vectors="abc"))

# -- the store ----------------------------------------------------------------------------------------------

@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_mixed_cosine_is_the_mean_of_both(n, d1, d2, seed):
    g = torch.Generator().manual_seed(seed)
    s = EmbedStore(range(n), torch.randn(n, d1, generator=g), torch.randn(n, d2, generator=g))
    i, t, m = (s.get(range(n), k) for k in ("image", "text", "mixed"))
    torch.testing.assert_close(m @ m.T, (i @ i.T + t @ t.T) / 2, atol=1e-5, rtol=0)
    assert m.shape == (n, s.dim())

def test_get_keeps_the_shape_of_ids_and_names_unknown_ones(store):
    ids = torch.tensor([[500, 501, 502], [509, 500, 500]])
    assert store.get(ids, "text").shape == (2, 3, 12)
    assert torch.equal(store.get(ids)[1, 0], store.get(509))
    assert store.get([]).shape == (0, 24)
    with pytest.raises(KeyError, match="question_id 7, 8 not in this store.*2 unknown"):
        store.get([[500, 7], [8, 7]])
    with pytest.raises(ValueError, match="choose one of image, text, mixed"): store.get(500, "both")
    assert 500 in store and 7 not in store

def test_constructor_refuses(store):
    e = torch.eye(2)
    with pytest.raises(ValueError, match="3 ids, 2 image vectors"): EmbedStore([1, 2, 3], e, e)
    for bad in (e * 0, e / 0):
        with pytest.raises(ValueError, match="no direction"): EmbedStore([1, 2], e, bad)

def test_save_load_round_trip_and_tampering(store, tmp_path):
    store.save(tmp_path / "s")
    back = EmbedStore.load(tmp_path / "s")
    assert back.fingerprint == store.fingerprint
    assert torch.equal(back.get(store.ids), store.get(store.ids))
    assert back.meta == store.meta
    assert sorted(p.name for p in (tmp_path/"s").iterdir()) == ["embed.json", "embed.safetensors"]
    EmbedStore(store.ids, store.text, store.image).save(tmp_path / "t")
    (tmp_path / "t/embed.safetensors").replace(tmp_path / "s/embed.safetensors")
    with pytest.raises(ValueError, match="different stores"): EmbedStore.load(tmp_path/"s")
    with pytest.raises(FileNotFoundError, match="embed.safetensors"): EmbedStore.load(tmp_path/"t")
    with pytest.raises(FileNotFoundError, match="embed.json"): EmbedStore.load(tmp_path/"none")

@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=12, max_size=12), st.integers(1, 12))
def test_any_parts_make_the_whole(world, clip, store, whose, n):
    "Parts may overlap, hold more than is wanted, and be empty of what is wanted"
    items = world["items"]
    parts = [items[[w == k or k == 0 and i < 3 for i, w in enumerate(whose)]] for k in (0, 1, 2)]
    stores = [embed_items(p, clip, batch_size=2, progress=False) for p in parts if len(p)]
    got = gather_stores(items[:n], stores)
    want = embed_items(items[:n], clip, progress=False)
    assert got.fingerprint == want.fingerprint
    assert got.ids.tolist() == want.ids.tolist()
    assert got.meta["image_hash"] == want.meta["image_hash"]
    for kind in ("image", "text", "mixed"):
        assert torch.allclose(got.get(got.ids, kind), want.get(want.ids, kind), atol=1e-5)

def test_parts_that_do_not_fit_are_refused(world, store, clip, tmp_path):
    items = world["items"]
    half = embed_items(items[:6], clip, progress=False)
    with pytest.raises(ValueError, match=r"question_id 506 is in none of 1 stores \(6 such items\)"):
        gather_stores(items, [half])
    other = embed_items(items[6:], load_clip(make_clip(tmp_path/"other", seed=1), "cpu"), progress=False)
    with pytest.raises(ValueError, match="stores of 2 CLIPs"): gather_stores(items, [half, other])
    with pytest.raises(ValueError, match="stores of 0 CLIPs"): gather_stores(items, [])

def test_nearest_leaves_out_the_item_by_id_even_when_a_twin_is_nearer():
    v = unit(torch.tensor([[1.0, 0], [1, 0], [0.6, 0.8], [0, 1]]))
    s = EmbedStore([4, 3, 2, 1], v, v)
    n = nearest(s, 4, 3)
    assert n.index.tolist() == [3, 2, 1]
    assert n.tolist() == pytest.approx([1, 0.6, 0])
    assert nearest(s, 4, 5, among=[1, 2]).index.tolist() == [2, 1]

def test_show_neighbours_takes_and_returns_axes(world, store):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    axs = plt.subplots(3, 3)[1]
    assert show_neighbours(store, world["items"], 500, 2, axs) is axs
    blind = embed_items(world["items"].drop(columns="image_path"), world["path"], device="cpu", progress=False)
    assert show_neighbours(blind, world["items"].drop(columns="image_path"), 500, 2).shape == (1, 3)
    plt.close("all")

def test_a_clip_of_the_checkout_is_found_from_anywhere(tmp_path, monkeypatch):
    "As a language model is; a folder of that name where one stands comes first"
    from leverplus.core import repo_path
    usual = load_clip(repo_path("models", "tiny-clip"))
    monkeypatch.chdir(tmp_path)
    assert load_clip("models/tiny-clip").fingerprint == usual.fingerprint == load_clip().fingerprint
    (tmp_path/"models"/"tiny-clip").mkdir(parents=True)
    with pytest.raises(OSError): load_clip("models/tiny-clip")
