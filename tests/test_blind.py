"Items without pictures, the whole way: read, embedded, put into pools, asked, learned from, picked, shown"
import numpy as np, pandas as pd, pytest, torch
from leverplus.core import repo_path
from leverplus.data import read_okvqa, read_soft_labels, show_items
from leverplus.dls import group_dls, show_prompts
from leverplus.embed import EmbedStore, embed_items
from leverplus.evaluate import pick_baselines, score_picks
from leverplus.groups import OtherContents, RLData
from leverplus.infer import kind_of, pick, pick_model, pick_similar
from leverplus.learner import load_selector, selector_learner
from leverplus.lvlm import compare, load_lvlm
from leverplus.pools import make_pool, pool_similarity
from leverplus.cases import case_block, pick_cases, plot_examples
from leverplus.rldata_ask import FactCache, ask, item_contents, score_pairs, self_test
from leverplus.rldata_generate import generate
from leverplus.rldata_propose import propose
from leverplus.scorer import SharedScorer
from leverplus.settings import Asking, Guarding, Picking, Proposing

ROOT = repo_path("data", "islands")

@pytest.fixture(scope="module")
def scorer(): return SharedScorer(load_lvlm(device="cpu"))

@pytest.fixture(scope="module")
def items(): return read_okvqa(ROOT, "dev").iloc[::5].drop(columns="image_path")

@pytest.fixture(scope="module")
def store(items): return embed_items(items, device="cpu", progress=False)

@pytest.fixture(scope="module")
def pool(items, store): return make_pool(items[:24], items[10:], 8, "text", store)

@pytest.fixture(scope="module")
def data(items, store, pool, scorer, tmp_path_factory):
    proposing = Proposing(shots=(1, 2), counts=dict(beam=2, retrieval=2, random=2))
    guarding = Guarding(window=8, test=6, verify=24)
    how = dict(proposing=proposing, guarding=guarding, progress=False)
    return generate(tmp_path_factory.mktemp("run"), list(pool), items, pool, scorer, store, **how)

def test_readers_give_items_without_pictures(items, okvqa):
    real = read_soft_labels(okvqa, "val")
    assert real.image_path.isna().all() and len(real) == 5046
    for frame in (items, real[:4]): assert len(show_items(frame, n=2)) == 2

def test_pools_keep_a_querys_own_image_out(items, store, pool):
    image = items.image_id
    assert all(image[q] != image[c] for q in pool for c in pool[q])
    pool.validate(items)
    random = make_pool(items[:24], items[10:], 8, "random")
    assert pool_similarity(pool, store).mean() > pool_similarity(random, store).mean()
    for sampler, kind in dict(image="image", mixed="image").items():
        with pytest.raises(ValueError, match=f"kind '{kind}' is not in this store: choose one of text"):
            make_pool(items[:24], items[10:], 8, sampler, store)

def test_a_run_is_verified_by_the_reference(data, scorer):
    assert not data.rows.eval_failed.any() and data.rows.vqa_acc_score.notna().all()
    verified, tested = data.manifest["verify"], data.manifest["self_test"]
    assert verified["asked"] == 24 and verified["logprob"] < 1e-4 and verified["text"] == 0
    assert tested["failed"] == 0 and "🖼" not in tested["prompt"]
    assert data.manifest["settings"]["proposing"]["kind"] == "text"

@pytest.mark.parametrize("style", ["interleaved", "chat"])
def test_facts_are_those_of_the_reference(items, pool, scorer, style):
    rows = [(q, tuple(pool[q][:n])) for q, n in zip(list(pool)[:6], (0, 1, 2, 3, 4, 2))]
    pairs = pd.DataFrame(rows, columns=["question_id", "pointer"])
    asking = Asking(style=style)
    fast = score_pairs(pairs, scorer, items, asking)
    same = compare(fast, score_pairs(pairs, scorer.reference(), items, asking))
    assert same["failed"] == same["text"] == 0 and same["logprob"] < 1e-4
    blank = items.assign(image_path=[None, np.nan]*(len(items)//2) + [None]*(len(items) % 2))
    assert compare(fast, score_pairs(pairs, scorer, blank, asking))["logprob"] == 0
    assert self_test(scorer, items, pool, 4, asking=asking)["failed"] == 0

def test_a_picture_that_comes_later_is_another_content(items, store, pool, scorer, tmp_path):
    queries = list(pool)[:4]
    pairs = pd.DataFrame(dict(question_id=queries, pointer=[tuple(pool[q][:1]) for q in queries]))
    cache = FactCache()
    ask(pairs, scorer, items, cache)
    pictured = read_okvqa(ROOT, "dev", images=ROOT/"images").loc[items.index]
    assert item_contents(items, queries).picture.isna().all()
    assert item_contents(pictured, queries).picture.notna().all()
    with pytest.warns(UserWarning, match="are about other questions"):
        seen = ask(pairs, scorer, pictured, cache)
    pd.testing.assert_frame_equal(seen, ask(pairs, scorer, pictured))
    with pytest.raises(ValueError, match="are about other questions"): ask(pairs, None, items, cache)
    how = dict(progress=False, guarding=Guarding(window=4, test=0))
    generate(tmp_path, queries, items, pool, scorer, store, **how)
    with pytest.raises((OtherContents, ValueError), match="pictures of question_id|of another picture"):
        generate(tmp_path, queries, pictured, pool, scorer, store, **how)

def test_a_path_that_leads_nowhere_is_no_absent_picture(items, pool, scorer):
    q = next(iter(pool))
    gone = items.assign(image_path=["gone.png" if i == q else None for i in items.index])
    pairs = pd.DataFrame(dict(question_id=[q], pointer=[tuple(pool[q][:1])]))
    failed = ask(pairs, scorer, gone)
    assert failed.eval_failed.all() and "gone.png" in failed.error[0]
    with pytest.raises(FileNotFoundError, match="gone.png"): embed_items(gone, device="cpu", progress=False)

def part(data, queries):
    "The groups of some queries"
    rows = data.rows[data.rows.question_id.isin(queries)]
    return RLData(rows.reset_index(drop=True), data.pool.only(queries))

def test_a_selector_learns_from_texts_and_says_so(data, items, store, pool, tmp_path):
    train, valid = part(data, data.queries[:16]), part(data, data.queries[16:])
    dls = group_dls(train, valid, store, bs=8, items=items)
    assert dls.info["kind"] == "text" and dls.valid_ds.d == store.dim("text")
    learn = selector_learner(dls, d_hidden=16)
    with learn.no_bar(), learn.no_logging():
        learn.fit_warmup(items[24:], store, 1, K=4, steps=2)
        learn.fit_listwise(1)
    learn.save_selector(tmp_path/"selector", dls.info)
    model = load_selector(tmp_path/"selector")
    assert model.info["kind"] == "text" and kind_of(model, store=store) == "text"
    picks = pick_model(model, pool, store, 2)
    assert picks.pointer.tolist() == pick(pool, Picking(shots=(2,)), model, store).pointer.tolist()
    model.info["kind"] = "mixed"
    with pytest.raises(ValueError, match="kind 'mixed' is not in this store"):
        pick_model(model, pool, store, 2)

def test_baselines_are_those_that_there_are(items, store, pool):
    names = set(pick_baselines(pool, store, (1, 2), draws=1).selector)
    assert names == {"zero_shot", "random", "similar_text", "similar_text_first", "mmr"}
    assert set(pick_similar(pool, store, 2).selector) == {"similar_text"}
    assert len(propose(pool, store, list(pool)[:3])) > 0

def test_vectors_of_another_encoder_serve_as_well(items, pool):
    g = torch.Generator().manual_seed(0)
    source = dict(encoder="another", items="islands")
    vectors = torch.randn(len(items), 8, generator=g)
    mine = EmbedStore.from_vectors(items.question_id, vectors, source=source)
    assert make_pool(items[:24], items[10:], 8, "text", mine).recipe["store"] == mine.fingerprint
    assert len(propose(pool, mine, list(pool)[:3])) > 0

def test_what_has_no_picture_is_shown_without(items, pool, scorer):
    queries = list(pool)[:4]
    picks = pick_baselines(pool.only(queries), embed_items(items, device="cpu", progress=False), (2,), draws=1)
    picks = picks[picks.selector == "similar_text"]
    facts = ask(picks[["question_id", "pointer"]], scorer, items)
    scored = score_picks(picks, facts)
    assert plot_examples(items, scored, 2).shape == (2, 4)
    assert "no picture here" in case_block(items, pick_cases(scored, 1).iloc[0]).html()
    table = pd.DataFrame(dict(query=queries[:1], picks=[list(pool[queries[0]][:2])]))
    assert show_prompts(table, items).shape == (1, 3)

def test_the_second_world_is_read_and_asked(okvqa, blind_okvqa, scorer):
    "Real questions in its own template: the fast scorer says what the reference says"
    items = read_soft_labels(okvqa, "train").drop(columns="image_path")
    rows = pd.read_parquet(blind_okvqa/"dev-text.parquet", columns=["question_id", "pointer"])[::2500]
    rows = rows.assign(pointer=list(map(tuple, rows.pointer))).reset_index(drop=True)
    vectors = np.load(blind_okvqa/"minilm.npz")
    source = dict(encoder="minilm", items="okvqa")
    store = EmbedStore.from_vectors(vectors["question_id"], torch.from_numpy(vectors["text"]), source=source)
    assert store.kind() == "text" and set(rows.question_id) <= set(store.ids)
    lvlm = load_lvlm(device="cpu")
    lvlm.tokenizer.chat_template = (blind_okvqa/"chat_template.jinja").read_text()
    asked = SharedScorer(lvlm, prefix_cache="query")
    asking = Asking(style="chat")
    fast = score_pairs(rows, asked, items, asking)
    assert asked.fingerprint != scorer.fingerprint
    same = compare(fast, score_pairs(rows, asked.reference(), items, asking))
    assert same["failed"] == same["text"] == 0 and same["logprob"] < 1e-4
