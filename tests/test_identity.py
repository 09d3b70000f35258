"A model is what it is now: every bit of every weight, settings set later, one processor for scorer and reference"
import json, shutil
from functools import lru_cache
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import AutoImageProcessor
from leverplus import core, lvlm as lvlm_page, embed as embed_page
from leverplus.core import fingerprint, read_json, repo_path, tensor_hash, tensors_fingerprint
from leverplus.data import read_okvqa
from leverplus.embed import EmbedStore, embed_items, gather_stores, load_clip
from leverplus.identity import image_settings, tokenizer_fingerprint, unlike_config, weights_fingerprint
from leverplus.lvlm import NaiveScorer, Targets, compare, load_lvlm
from leverplus.prompt import prompter
from leverplus.rldata_ask import FactCache, ask
from leverplus.rldata_generate import policy_fingerprint
from leverplus.rldata_propose import SimilarityPrior
from leverplus.scorer import SharedScorer
from leverplus.tiny import tiny_qwen

TINY, CLIP = repo_path("models", "tiny-qwen2.5-vl"), repo_path("models", "tiny-clip")

# ---- the hash ----------------------------------------------------------------------------------------------

def by_hand(x):
    "The same sum in Python's integers"
    data = x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    level = 0
    while True:
        data += b"\0" * (-len(data) % 4)
        words = np.frombuffer(data, np.uint32).tolist()
        weights = [w % 2**64 for w in core._place_weights(level, torch.device("cpu")).tolist()]
        starts = range(0, max(1, len(words)), len(weights))
        sums = [sum(w*x for w, x in zip(weights, words[i : i + len(weights)])) % 2**64 for i in starts]
        if len(sums) == 1: return sums[0]
        data = b"".join(s.to_bytes(8, "little") for s in sums)
        level += 1

def some(*shape): return torch.randn(*shape, generator=torch.Generator().manual_seed(0))

TENSORS = dict(
    float32=some(7),
    float64=some(7).double(),
    bfloat16=some(5).bfloat16(),
    float16_behind_an_odd_offset=some(9).half()[1:],
    int64=torch.arange(-3, 4),
    uint8=torch.arange(7, dtype=torch.uint8),
    bool=torch.tensor([True, False, True]),
    complex=torch.complex(some(3), some(3)),
    scalar=torch.tensor(3.),
    empty=torch.zeros(0, 3),
    transposed=some(3, 5).T,
    every_other=some(70_000, 4)[::2],
    several_rows=some(200_001),
    one_row=some(65_536),
)

@pytest.mark.parametrize("name", TENSORS)
def test_the_hash_is_the_sum_that_the_page_defines(name):
    x = TENSORS[name]
    assert tensor_hash(x).item() % 2**64 == by_hand(x)

@pytest.mark.parametrize("name", ["float32", "bool", "empty", "one_row"])
def test_devices_without_unsigned_words_give_the_same(name):
    words = core._words(TENSORS[name])[None]
    weights = core._place_weights(0, words.device)[:words.shape[1]]
    assert torch.equal(core._weighted(words, weights), core._weighted_anywhere(words, weights))

def test_threads_and_layout_change_nothing():
    x = some(300, 1000)
    was = torch.get_num_threads()
    try:
        hashes = []
        for n in (1, 3):
            torch.set_num_threads(n)
            hashes += [tensor_hash(x).item(), tensor_hash(x.T.contiguous().T).item()]
    finally: torch.set_num_threads(was)
    assert len(set(hashes)) == 1

def flipped(x, *bits):
    "A copy with some bits flipped"
    data = x.clone().view(torch.int32)
    for bit in bits: data[bit//32] ^= torch.tensor(1 << bit % 32).to(torch.int32)
    return data.view(x.dtype)

ROWS = some(140_000)
BITS = st.integers(0, 32*len(ROWS) - 1)

@settings(max_examples=60, deadline=None, derandomize=True)
@given(BITS, BITS)
def test_one_bit_or_two_anywhere(a, b):
    once = tensor_hash(flipped(ROWS, a))
    assert once != tensor_hash(ROWS)
    if a != b: assert len({int(tensor_hash(x)) for x in (ROWS, flipped(ROWS, a), flipped(ROWS, a, b))}) == 3

def test_two_signs_do_not_cancel():
    hashes = [int(tensor_hash(flipped(ROWS, 31, 32*k + 31))) for k in range(1, 300)]
    assert len({*hashes, int(tensor_hash(ROWS))}) == 300

@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, len(ROWS) - 1), st.integers(0, len(ROWS) - 1))
def test_order_counts(i, j):
    swapped = ROWS.clone()
    swapped[[i, j]] = ROWS[[j, i]]
    assert (tensor_hash(swapped) != tensor_hash(ROWS)) == bool(ROWS[i] != ROWS[j])

def test_names_types_and_shapes_count():
    x = some(4, 6)
    a, b = some(3), some(3) + 1
    same = [dict(w=x), dict(w=x.clone())]
    others = [
        dict(v=x), dict(w=x.view(torch.int32)), dict(w=x.view(6, 4)), dict(w=x.view(-1)), dict(w=x.T),
        dict(w=torch.zeros(0)), dict(w=torch.zeros(0, 2)), dict(w=torch.tensor(1.)), dict(w=torch.tensor([1.])),
        dict(w=a, v=b), dict(w=b, v=a), {},
    ]
    assert len({tensors_fingerprint(t) for t in same}) == 1
    assert len({tensors_fingerprint(t) for t in same + others}) == 1 + len(others)

def test_tied_tensors_are_read_once_and_equal_untied_ones(monkeypatch):
    x = some(5, 3)
    read = []
    monkeypatch.setattr(core, "tensor_hash", lambda t: read.append(1) or tensor_hash(t))
    tied = tensors_fingerprint(dict(a=x, b=x, part=x[:2]))
    assert len(read) == 2 and tied == tensors_fingerprint(dict(a=x, b=x.clone(), part=x[:2].clone()))

def test_a_tensor_without_content_is_refused_by_name():
    with pytest.raises(ValueError, match="layer.weight lies on the meta device.*without offloading"):
        tensors_fingerprint({"layer.weight": torch.zeros(3, device="meta")})

def test_fingerprints_of_half_precision():
    x = some(3)
    prints = [fingerprint(t) for t in (x, x.half(), x.bfloat16(), x.bfloat16().float(), x.bfloat16()[:2])]
    assert len(set(prints)) == 5

def test_an_array_of_objects_is_known_by_what_they_are():
    "Its memory holds addresses, which differ from process to process"
    def array(*texts): return np.array(["".join(list(text)) for text in texts], dtype=object)
    assert fingerprint(array("red", "bus")) == fingerprint(array("red", "bus"))
    assert len({fingerprint(x) for x in (array("red", "bus"), array("bus", "red"), array("red"))}) == 3
    with pytest.raises(TypeError, match="fingerprint got a object"): fingerprint(np.array([object()]))

# ---- weights -----------------------------------------------------------------------------------------------

def test_a_bit_of_any_weight_is_another_model():
    lv = load_lvlm(TINY)
    whole, eyes = lv.fingerprint, lv.vision_fingerprint
    seen = {whole}
    g = torch.Generator().manual_seed(1)
    tensors = lv.model.state_dict()
    for name, x in list(tensors.items())[::4]:
        at = int(torch.randint(x.numel(), (), generator=g))
        bits = x.data.view(-1).view(torch.int32) # behind torch's counter of changes
        bits[at] ^= 1
        seen.add(lv.fingerprint)
        assert (lv.vision_fingerprint != eyes) == name.startswith("model.visual."), name
        bits[at] ^= 1
    assert len(seen) == 1 + len(list(tensors)[::4]) and lv.fingerprint == whole

def test_two_tensors_that_change_places():
    lv = load_lvlm(TINY)
    was = lv.fingerprint
    a, b = (lv.model.model.language_model.layers[k].mlp.up_proj.weight.data for k in (0, 1))
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)
    assert lv.fingerprint != was

# ---- settings ----------------------------------------------------------------------------------------------

def test_the_same_in_the_oldest_and_the_newest_libraries():
    "Written down once; a release that moves these makes strangers of stored facts and vectors"
    lv = load_lvlm(TINY)
    assert weights_fingerprint(lv.model) == "a11880b51bf832b1"
    assert tokenizer_fingerprint(lv.tokenizer) == "3c68a9c921314bbc"
    assert image_settings(lv.image_processor) == ["Qwen2VLImageProcessor", dict(
        do_convert_rgb=True, do_normalize=True, do_rescale=True, do_resize=True,
        image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711],
        merge_size=2, patch_size=14, resample=3, rescale_factor=1/255,
        size=dict(longest_edge=50176, shortest_edge=3136), temporal_patch_size=2,
    )]
    assert unlike_config(lv.model) == [] == unlike_config(load_clip(CLIP).model)

PROCESSING = dict(
    size=dict(size=dict(shortest_edge=28*28, longest_edge=28*28)),
    limits=dict(min_pixels=28*28, max_pixels=28*28),
    mean=dict(image_mean=[.4, .5, .5]),
    resample=dict(resample=2),
    unscaled=dict(do_rescale=False),
    as_it_is=dict(do_resize=False),
    factor=dict(rescale_factor=1/128),
)

@pytest.mark.parametrize("change", PROCESSING)
def test_settings_of_the_image_processor_that_are_set_later(change):
    lv = load_lvlm(TINY)
    was, eyes = lv.fingerprint, lv.vision_fingerprint
    before = {name: getattr(lv.image_processor, name, None) for name in PROCESSING[change]}
    for name, value in PROCESSING[change].items(): setattr(lv.image_processor, name, value)
    assert lv.fingerprint != was and lv.vision_fingerprint != eyes
    for name, value in before.items(): setattr(lv.image_processor, name, value)
    assert (lv.fingerprint, lv.vision_fingerprint) == (was, eyes)

def test_a_size_that_is_set_later_is_the_size_that_is_loaded():
    small = dict(shortest_edge=28*28, longest_edge=28*28)
    later, limits, loaded = load_lvlm(TINY), load_lvlm(TINY), load_lvlm(TINY)
    later.image_processor.size = small
    limits.image_processor.min_pixels = limits.image_processor.max_pixels = 28*28
    loaded.image_processor = AutoImageProcessor.from_pretrained(TINY, size=small)
    assert later.fingerprint == limits.fingerprint == loaded.fingerprint

def test_a_setting_that_is_off_counts_as_absent():
    lv = load_lvlm(TINY)
    was = lv.fingerprint
    for name, value in dict(do_pad=False, do_center_crop=False, min_pixels=None, device="cpu").items():
        setattr(lv.image_processor, name, value)
    assert lv.fingerprint == was

def test_limits_of_qwen_vl_utils_and_the_way_pictures_are_read(monkeypatch):
    from qwen_vl_utils import vision_process
    lv, clip = load_lvlm(TINY), load_clip(CLIP)
    seen = {(lv.fingerprint, lv.vision_fingerprint)}
    monkeypatch.setattr(vision_process, "IMAGE_MAX_TOKEN_NUM", 4)
    seen.add((lv.fingerprint, lv.vision_fingerprint))
    before = clip.fingerprint
    for page in (lvlm_page, embed_page): monkeypatch.setattr(page, "DECODING", dict(orientation="ignored"))
    seen.add((lv.fingerprint, lv.vision_fingerprint))
    assert len({a for a, _ in seen}) == len({b for _, b in seen}) == 3 and clip.fingerprint != before

def edit_normalizer(tok):
    from tokenizers import normalizers
    tok.backend_tokenizer.normalizer = normalizers.NFKC()

def edit_splitting(tok):
    from tokenizers import pre_tokenizers
    tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)

def edit_template(tok): tok.chat_template = tok.chat_template.replace("helpful", "careful")
def edit_words(tok): tok.add_tokens(["island"])
def edit_specials(tok): tok.add_special_tokens({"additional_special_tokens": ["<|island|>"]})
def edit_decoding(tok): tok.clean_up_tokenization_spaces = True

@pytest.mark.parametrize("edit", [
    edit_normalizer, edit_splitting, edit_template, edit_words, edit_specials, edit_decoding,
])
def test_a_tokenizer_that_is_edited_later(edit):
    lv = load_lvlm(TINY)
    was, eyes = lv.fingerprint, lv.vision_fingerprint
    edit(lv.tokenizer)
    assert lv.fingerprint != was and lv.vision_fingerprint == eyes

def test_attention_that_is_set_later():
    lv = load_lvlm(TINY)
    lv.model.set_attn_implementation("eager")
    assert lv.attn == "eager" and lv.fingerprint == load_lvlm(TINY, attn="eager").fingerprint
    lv.model.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2.*wanted sdpa or eager"): lv.fingerprint
    with pytest.raises(ValueError, match="wanted sdpa or eager"): SharedScorer(lv).run([])

@pytest.mark.parametrize("name,value", [("hidden_act", "gelu"), ("rms_norm_eps", 1e-2)])
def test_a_config_edited_too_late_is_not_the_model_of_that_config(tmp_path, name, value):
    "The modules are those of before: such a model answers otherwise than one that is loaded with the setting"
    shutil.copytree(TINY, tmp_path/"m")
    config = json.loads((tmp_path/"m/config.json").read_text())
    config["text_config"][name] = value
    (tmp_path/"m/config.json").write_text(json.dumps(config))
    late, loaded = load_lvlm(TINY), load_lvlm(tmp_path/"m")
    setattr(late.model.config.text_config, name, value)
    assert len({late.fingerprint, loaded.fingerprint, load_lvlm(TINY).fingerprint}) == 3
    assert unlike_config(late.model) and not unlike_config(loaded.model)

def test_what_modules_hold_beside_their_weights():
    lv = load_lvlm(TINY)
    seen = [lv.fingerprint]
    rotary = lv.model.model.language_model.rotary_emb
    rotary.inv_freq[3] *= 1 + 3e-7 # rounding of another machine
    assert lv.fingerprint == seen[0]
    lv.model.model.language_model.layers[1].self_attn.scaling *= 2
    seen.append(lv.fingerprint)
    rotary.inv_freq[3] *= 1.1
    seen.append(lv.fingerprint)
    assert len(set(seen)) == 3

def test_rope_settings_that_no_weight_shows():
    lv = load_lvlm(TINY)
    rope = lv.model.config.get_text_config().rope_parameters
    prints = []
    for factor in (2., 4.):
        rope["factor"] = factor
        prints.append(lv.fingerprint)
    assert prints[0] != prints[1]

def test_looking_draws_no_random_number():
    lv = tiny_qwen(seed=3)
    was = torch.get_rng_state()
    lv.fingerprint, lv.vision_fingerprint, load_clip(CLIP).fingerprint
    assert torch.equal(torch.get_rng_state(), was)

# ---- scorer and reference ----------------------------------------------------------------------------------

@lru_cache
def items():
    world = repo_path("data", "islands")
    return pd.concat([read_okvqa(world, s, images=world/"images") for s in ("train", "test")])

@lru_cache
def asked():
    "Six prompts of two demonstrations each, and their answers"
    f = items()
    train, test = (f[f.split == s].question_id.tolist() for s in ("train", "test"))
    make = prompter(f)
    prompts = [make(q, train[2*k : 2*k + 2]) for k, q in enumerate(test[:6])]
    return prompts, [Targets(("red", "red circle", "dax"), (1., .6, .3))]*6

SMALL = dict(shortest_edge=28*28, longest_edge=28*28)
def smaller_pictures(lv): lv.image_processor.size = SMALL
def limits(lv): lv.image_processor.min_pixels = lv.image_processor.max_pixels = 28*28
def another_processor(lv): lv.image_processor = AutoImageProcessor.from_pretrained(TINY, size=SMALL)
def trained(lv): lv.model.model.language_model.layers[0].self_attn.v_proj.weight.data[:16] *= 3
def trained_eyes(lv): lv.model.model.visual.blocks[0].mlp.down_proj.weight.data[:16] *= 5
def another_template(lv): lv.tokenizer.chat_template = lv.tokenizer.chat_template.replace("assistant.", "bot.")

@pytest.mark.filterwarnings("ignore:Passing `min_pixels`")
@pytest.mark.parametrize("way", [
    dict(), dict(prefix_cache="query"), dict(prefix_cache="global", prefix_depth=2),
    dict(prefix_cache="global", vision_dir=True),
], ids=str)
@pytest.mark.parametrize("change", [
    smaller_pictures, limits, another_processor, trained, trained_eyes, another_template,
])
def test_nothing_of_the_old_model_is_used_again(change, way, tmp_path):
    lv = load_lvlm(TINY)
    if "vision_dir" in way: way = way | dict(vision_dir=tmp_path)
    scorer, naive = SharedScorer(lv, **way), NaiveScorer(lv)
    before = scorer.run(*asked())
    was = scorer.fingerprint
    change(lv)
    assert scorer.fingerprint == naive.fingerprint != was
    after = scorer.run(*asked())
    reference = compare(after, naive.run(*asked()))
    fresh = compare(after, SharedScorer(lv).run(*asked()))
    assert not reference["failed"] and max(reference["logprob"], fresh["logprob"]) < 1e-4
    assert reference["text"] == fresh["text"] == 0
    assert compare(before, after)["logprob"] > 1e-2

def test_back_to_the_old_model_is_the_old_facts(tmp_path):
    lv = load_lvlm(TINY)
    scorer = SharedScorer(lv, prefix_cache="global", vision_dir=tmp_path)
    before = scorer.run(*asked())
    size = lv.image_processor.size
    smaller_pictures(lv)
    scorer.run(*asked())
    lv.image_processor.size = size
    encoded = scorer.vision.counts["encoded"]
    assert compare(before, scorer.run(*asked()))["logprob"] < 1e-4
    assert scorer.vision.counts["encoded"] == encoded and len(list(tmp_path.iterdir())) == 2

def test_what_did_not_change_is_kept():
    lv = load_lvlm(TINY)
    scorer = SharedScorer(lv, prefix_cache="global")
    scorer.run(*asked())
    encoded, beginnings = scorer.vision.counts["encoded"], len(scorer.prefixes)
    scorer.run(*asked())
    assert scorer.vision.counts["encoded"] == encoded and len(scorer.prefixes) == beginnings > 0
    trained(lv) # the eyes are the same
    scorer.run(*asked())
    assert scorer.vision.counts["encoded"] == encoded

def test_a_cache_of_facts_asks_the_changed_model_again():
    lv = load_lvlm(TINY)
    scorer = SharedScorer(lv)
    prompts, _ = asked()
    pairs = pd.DataFrame(dict(question_id=[p.question_id for p in prompts], pointer=[p.pointer for p in prompts]))
    cache = FactCache()
    def facts(lv, cache=None): return ask(pairs, SharedScorer(lv), items(), cache)
    first = facts(lv, cache)
    scorer.run(*asked())
    smaller_pictures(lv)
    changed = ask(pairs, scorer, items(), cache)
    loaded = load_lvlm(TINY)
    loaded.image_processor = AutoImageProcessor.from_pretrained(TINY, size=SMALL)
    other = facts(loaded)
    assert changed.scorer.unique().tolist() == other.scorer.unique().tolist() != first.scorer.unique().tolist()
    np.testing.assert_allclose(changed.vqa_gt_prob, other.vqa_gt_prob, rtol=1e-3)
    assert np.abs(changed.vqa_gt_prob/first.vqa_gt_prob - 1).max() > .01
    assert scorer.stats.prompts == 12 and len(cache) == 12

def test_the_official_processor_holds_what_the_model_holds():
    lv = load_lvlm(TINY)
    official = lv.processor
    assert official.image_processor is lv.image_processor and official.tokenizer is lv.tokenizer
    lv.image_processor = AutoImageProcessor.from_pretrained(TINY, size=SMALL)
    assert lv.processor.image_processor is lv.image_processor

def test_only_the_length_of_answers_is_the_scorers_own():
    lv = load_lvlm(TINY)
    scorer = SharedScorer(lv)
    was = scorer.fingerprint
    scorer.batch_tokens = scorer.budget = 64
    scorer.window = 2
    assert scorer.fingerprint == was
    scorer.max_new_tokens = 5
    assert scorer.fingerprint == NaiveScorer(lv, max_new_tokens=5).fingerprint != was

# ---- CLIP and its store ------------------------------------------------------------------------------------

def clip_weight(c): c.model.text_model.encoder.layers[0].mlp.fc1.weight.data[7, 9] += 1e-4
def clip_size(c): c.image_processor.size = dict(shortest_edge=48)
def clip_crop(c): c.image_processor.do_center_crop = False
def clip_words(c): c.tokenizer.add_tokens(["zebra"])
def clip_length(c): c.max_length = 5
def clip_activation(c): c.model.config.vision_config.hidden_act = "gelu"
def clip_epsilon(c): c.model.vision_model.post_layernorm.eps = 1e-2

@pytest.mark.parametrize("change", [
    clip_weight, clip_size, clip_crop, clip_words, clip_length, clip_activation, clip_epsilon,
])
def test_a_clip_is_what_it_is_now(change):
    clip = load_clip(CLIP)
    was = clip.fingerprint
    assert was == load_clip(CLIP).fingerprint
    change(clip)
    assert clip.fingerprint != was

def test_two_folders_of_one_name_are_two_clips(tmp_path):
    for home in ("a", "b"): shutil.copytree(CLIP, tmp_path/home/"clip")
    a, b = (load_clip(tmp_path/home/"clip") for home in "ab")
    assert a.fingerprint == b.fingerprint
    clip_weight(b)
    b.model.save_pretrained(tmp_path/"b/clip")
    assert load_clip(tmp_path/"b/clip").fingerprint == b.fingerprint != a.fingerprint and a.name == b.name

@pytest.fixture(scope="module")
def embedded(): return embed_items(items().head(8), load_clip(CLIP), progress=False)

def test_vectors_beside_the_meta_of_others(embedded):
    ids, image, text = embedded.ids, embedded.image, embedded.text
    other = EmbedStore(ids, image.roll(1, 0), text, meta=embedded.meta)
    assert other.fingerprint != embedded.fingerprint and "clip" not in other.source
    assert other.meta["model"] == embedded.meta["model"] and "clip" in embedded.meta["source"]
    assert other.fingerprint == EmbedStore(ids, image.roll(1, 0), text).fingerprint
    with pytest.raises(ValueError, match="not those that a CLIP made of items"):
        gather_stores(items().head(4), [other])

def test_vectors_that_are_written_to(embedded, tmp_path):
    embedded.save(tmp_path/"s")
    store = EmbedStore.load(tmp_path/"s")
    assert store.fingerprint == embedded.fingerprint and store.source == embedded.source
    kept = store.text[3, 5].item()
    store.text[3, 5] += .1
    written = store.fingerprint
    assert written != embedded.fingerprint and "clip" not in store.source
    store.save(tmp_path/"w")
    assert EmbedStore.load(tmp_path/"w").fingerprint == written
    store.text[3, 5] = kept
    assert store.fingerprint == embedded.fingerprint

def test_a_source_that_is_written_to_is_none(embedded):
    store = gather_stores(items().head(8), [embedded])
    was = store.fingerprint
    store.meta["source"] = dict(store.meta["source"], clip="another")
    assert store.fingerprint != was and "clip" not in store.source

def test_a_store_that_was_saved_before_is_read(embedded, tmp_path):
    "Files say the same as they did: head, digest, source inside meta"
    head = read_json(embedded.save(tmp_path/"s")/"embed.json")
    assert head["meta"]["source"] == embedded.source and head["fingerprint"] == embedded.fingerprint
    head["meta"]["source"]["clip"] = "d22dd57d79c3bbd6" # as an earlier version fingerprinted this CLIP
    head["fingerprint"] = fingerprint("embed", embedded.ids.to_numpy(), head["meta"]["source"])
    (tmp_path/"s/embed.json").write_text(json.dumps(head))
    assert EmbedStore.load(tmp_path/"s").source["clip"] == "d22dd57d79c3bbd6"

# ---- policies ----------------------------------------------------------------------------------------------

def test_a_prior_is_its_scale_of_now():
    prior = SimilarityPrior(10.)
    was = prior.fingerprint
    prior.scale = 3.
    assert prior.fingerprint == SimilarityPrior(3.).fingerprint != was
    assert policy_fingerprint(prior) == prior.fingerprint

def test_a_policy_in_half_precision_has_a_fingerprint():
    net = torch.nn.Linear(3, 2).bfloat16()
    was = policy_fingerprint(net)
    net.weight.data[1, 2] += 1
    assert policy_fingerprint(net) != was

def test_a_selector_is_its_settings_of_now():
    from leverplus.selector import PointerSelector
    torch.manual_seed(0)
    policy = PointerSelector(8, d_hidden=8)
    was = policy_fingerprint(policy)
    state = torch.get_rng_state()
    assert policy_fingerprint(policy.eval()) == was and torch.equal(torch.get_rng_state(), state)
    again = PointerSelector(8, d_hidden=8)
    again.load_state_dict(policy.state_dict())
    assert policy_fingerprint(again) == was == fingerprint(
        "PointerSelector", dict(policy.state_dict()), policy.config) # as it was before settings were looked at
    policy.pointer_temp = .2
    hotter = policy_fingerprint(policy)
    policy.prior_scale = 3.
    assert len({was, hotter, policy_fingerprint(policy)}) == 3

def test_a_policy_whose_config_is_no_list_of_arguments():
    class Told(torch.nn.Linear): config = dict(temperature=.5)
    assert policy_fingerprint(Told(2, 3)) != policy_fingerprint(Told(2, 3))
