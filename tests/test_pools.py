"Pools: what is in them, what must not be, and that nothing but seed and query decides"
import json, time
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from leverplus.core import repo_path
from leverplus.embed import EmbedStore
from leverplus.evidence import BankStore
from leverplus.pools import (
    Pool, SAMPLERS, check_encoder, encoder_of, image_groups, make_pool, plot_pools, pool_similarity,
    sampler_parts,
)

def frame(n, per=2, start=0, **kw):
    i = np.arange(n) + start
    items = dict(question_id=1000 + i, image_id=i // per, question=[f"what {k}?" for k in i])
    return pd.DataFrame(items | kw)

def vectors(items, seed=0, d=8):
    g = torch.Generator().manual_seed(seed)
    return EmbedStore(items.question_id, *(torch.randn(len(items), d, generator=g) for _ in range(2)))

samplers = st.sampled_from(list(SAMPLERS))
worlds = st.tuples(st.integers(12, 30), st.integers(1, 3), st.integers(1, 6), samplers, st.integers(0, 3))

@settings(max_examples=60, deadline=None, derandomize=True)
@given(worlds)
def test_every_pool_holds_K_distinct_allowed_candidates(w):
    n, per, K, sampler, seed = w
    it = frame(n, per)
    pool = make_pool(it, it, K, sampler, vectors(it), seed)
    pic = it.set_index("question_id").image_id
    assert len(pool) == n and pool.K == K
    for q in pool:
        assert len(pool[q]) == len(set(pool[q])) == K and q not in pool[q]
        assert pic[q] not in set(pic[list(pool[q])])
    assert pool.validate(it) is pool

@settings(max_examples=30, deadline=None, derandomize=True)
@given(worlds, st.randoms(use_true_random=False))
def test_pool_ignores_company_and_row_order(w, r):
    n, per, K, sampler, seed = w
    it = frame(n, per)
    store = vectors(it)
    pool = make_pool(it, it, K, sampler, store, seed)
    some = r.sample(range(n), 4)
    mixed_up = it.iloc[r.sample(range(n), n)]
    again = make_pool(it.iloc[some], mixed_up, K, sampler, store, seed)
    assert list(again) == it.question_id.iloc[some].tolist()
    assert all(again[q] == pool[q] for q in again)

@pytest.mark.parametrize("kind", ["text", "image"])
def test_similarity_sampler_takes_the_nearest_allowed(kind):
    it = frame(40)
    store = vectors(it)
    pool = make_pool(it, it, 7, kind, store)
    pic = it.set_index("question_id").image_id
    for q in pool:
        c = [i for i in it.question_id if pic[i] != pic[q]]
        cos = (store.get(c, kind).double() @ store.get(q, kind).double()).numpy()
        assert set(pool[q]) == {c[i] for i in np.argsort(-cos)[:7]}

def test_mixed_is_quarter_text_quarter_image_half_random_even_when_both_lists_agree():
    it = frame(60)
    g = torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    store = EmbedStore(it.question_id, g, g)
    pool = make_pool(it, it, 16, "mixed", store)
    pic = it.set_index("question_id").image_id
    assert sampler_parts("mixed", 16) == {"text": 4, "image": 4, "random": 8}
    for q in pool:   # image list = text list, so together they reach eight deep
        c = np.array([i for i in it.question_id if pic[i] != pic[q]])
        cos = (store.get(c, "text") @ store.get(q, "text")).numpy()
        assert set(c[np.argsort(-cos)[:8]]) <= set(pool[q]) and len(set(pool[q])) == 16

@pytest.mark.parametrize("K", range(1, 20))
def test_parts_sum_to_K(K):
    for s in SAMPLERS: assert sum(sampler_parts(s, K).values()) == K

def test_position_carries_no_information():
    it = frame(600, 1)
    store = vectors(it)
    pool = make_pool(it, it, 8, "mixed", store)
    cos = pool_similarity(pool, store).reshape(len(pool), 8)
    by_place = cos.mean(0)
    assert cos.std() / np.sqrt(600) * 4 > np.abs(by_place - by_place.mean()).max()
    assert np.mean([list(pool[q]) == sorted(pool[q]) for q in pool]) < .01

def test_random_is_uniform_over_allowed():
    it = frame(21, 1)
    n = np.zeros(21)
    for seed in range(300): n[np.array(make_pool(it.head(1), it, 5, "random", seed=seed)[1000]) - 1000] += 1
    assert n[0] == 0 and np.abs(n[1:] - 75).max() < 4.5 * np.sqrt(300 * .25 * .75)

def test_ties_are_broken_at_random_and_not_by_id():
    it = frame(50, 1)
    one = torch.ones(50, 4)
    store = EmbedStore(it.question_id, one, one)
    pool = make_pool(it, it, 5, "text", store)
    assert len({frozenset(c) for c in pool.ids.values()}) > 40

# -- regression: how an answer once got into a pool ----------------------------------------------------------

def test_neighbour_zero_is_not_presumed_to_be_the_query():
    "Two equal pictures under different ids: the twin's rank is 0 or 1; both query and twin stay out"
    it = frame(20, 1)
    v = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    v[1] = v[0]
    paths = [None] * 20
    # nothing says they are one picture
    pool = make_pool(it, it, 19, "image", EmbedStore(it.question_id, v, v))
    assert 1001 in pool[1000] and 1000 not in pool[1000]

def test_byte_identical_files_are_one_picture(tmp_path):
    it = frame(8, 1)
    for i in range(8): (tmp_path/f"{i}.png").write_bytes(b"same" if i in (0, 5) else f"pic{i}".encode())
    it["image_path"] = [tmp_path/f"{i}.png" for i in range(8)]
    pool = make_pool(it, it, 6, "random")
    assert 1005 not in pool[1000]
    assert 1000 not in pool[1005]
    assert pool.recipe["excluded"]["same_image_bytes"] == 2
    with pytest.raises(ValueError, match="query 1000: candidate 1005 shows the same picture"):
        Pool({1000: (1005, 1001)}).validate(it)

def test_same_picture_is_transitive_over_ids_and_bytes(tmp_path):
    for n, b in (("a", b"x1"), ("b", b"x1"), ("c", b"y2")): (tmp_path/n).write_bytes(b)
    paths = [tmp_path / n for n in "abcc"]
    it = pd.DataFrame(dict(question_id=[1, 2, 3, 4], image_id=[10, 11, 11, 12], image_path=paths))
    it["question"] = "q"
    assert len(set(image_groups(it))) == 1

def test_missing_file_names_file_and_question(tmp_path):
    it = frame(4).assign(image_path=[tmp_path/"gone.png"] * 4)
    with pytest.raises(FileNotFoundError, match="gone.png: image of question_id 1000"): make_pool(it, it, 1)

def test_some_paths_missing_is_allowed(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    it = frame(6, 1)
    it["image_path"] = [tmp_path / "a", None, None, np.nan, tmp_path / "a", None]
    assert len(set(image_groups(it))) == 5

def test_twin_demonstrations_take_one_place():
    # two pictures, one question: two candidates
    q = frame(3, 1)
    d = frame(10, 5, start=100)
    d["question"] = "the same?"
    pool = make_pool(q, d, 2)
    assert set(pool[1000]) == {1100, 1105} and pool.recipe["excluded"]["twin_demos"] == 8
    with pytest.raises(ValueError, match="query 1000: 2 candidates are available"): make_pool(q, d, 3)

def test_two_candidates_everywhere_is_visible():
    "The first two training rows as everybody's pool. K says 2, and the rule differs from the training pool's"
    it = frame(30)
    train = make_pool(it, it, 8)
    fixed = Pool({q: (1000, 1001) for q in range(1010, 1020)})
    assert fixed.K == 2 and fixed.rule != train.rule
    assert make_pool(it.head(3), it, 8, seed=5).rule == train.rule

# -- errors -------------------------------------------------------------------------------------------------

def test_errors_say_what_and_where():
    it = frame(10)
    store = vectors(it)
    with pytest.raises(ValueError, match="query 1000: 8 candidates .* K=9"): make_pool(it, it, 9)
    with pytest.raises(ValueError, match="K 0: wanted a whole number >= 1"): make_pool(it, it, 0)
    with pytest.raises(ValueError, match="needs `store`"): make_pool(it, it, 3, "image")
    with pytest.raises(ValueError, match="choose one of random"): make_pool(it, it, 3, "rnd")
    with pytest.raises(ValueError, match="queries is empty"): make_pool(it.head(0), it, 3)
    with pytest.raises(ValueError, match="demos has no column image_id"):
        make_pool(it, it.drop(columns="image_id"), 3)
    with pytest.raises(ValueError, match="question_id 1000 occurs more than once"):
        make_pool(pd.concat([it, it.head(1)]), it, 3)
    with pytest.raises(KeyError, match="1010 not in this store"):
        make_pool(frame(1, start=10), it, 3, "text", store)
    for bad, msg in (({1: ()}, "empty"), ({1: (2, 2)}, "twice"), ({1: (1, 2)}, "own candidate")):
        with pytest.raises(ValueError, match=f"query 1.*{msg}"): Pool(bad)
    with pytest.raises(KeyError, match="query 1 of the pool"): Pool({1: (1000,)}).validate(it)

# -- local and global, disk ---------------------------------------------------------------------------------

@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_local_and_ids_are_inverse(data):
    ids = {
        q: tuple(data.draw(st.lists(st.integers(100, 140), min_size=4, max_size=9, unique=True)))
        for q in range(5)
    }
    pool = Pool(ids)
    qs = data.draw(st.lists(st.integers(0, 4), max_size=12))
    ptr = [tuple(data.draw(st.permutations(ids[q])))[:data.draw(st.integers(0, 4))] for q in qs]
    loc = pool.local_rows(qs, ptr)
    assert pool.ids_rows(qs, loc) == ptr
    for q, p, l in zip(qs, ptr, loc):
        assert pool.local(q, p) == tuple(l[l >= 0]) and pool.ids_of(q, l[l >= 0]) == p

def test_local_rows_names_query_and_id():
    pool = Pool({1: (10, 20, 30), 2: (20, 40)})
    with pytest.raises(ValueError, match="query 2: demonstration 10"):
        pool.local_rows([1, 2], [(10, 20), (20, 10)])
    with pytest.raises(IndexError, match="query 2: local index 2"): pool.ids_rows([1, 2], [[0, 2], [0, 2]])
    with pytest.raises(ValueError, match="2 question_ids but 1 pointers"): pool.local_rows([1, 2], [(10,)])
    with pytest.raises(KeyError, match="3 has no pool"): pool.local_rows([3], [(10,)])

def test_save_load_and_tampering(tmp_path):
    it = frame(20)
    store = vectors(it)
    pool = make_pool(it, it, 5, "mixed", store)
    pool.save(tmp_path / "p")
    back = Pool.load(tmp_path / "p")
    assert back == pool
    assert back.fingerprint == pool.fingerprint
    assert back.rule == pool.rule
    assert list(back) == list(pool)
    make_pool(it, it, 5, "mixed", store, seed=1).save(tmp_path / "q")
    (tmp_path / "q/pool.parquet").replace(tmp_path / "p/pool.parquet")
    with pytest.raises(ValueError, match="not of one pool"): Pool.load(tmp_path/"p")
    (tmp_path/"p/pool.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="pool.parquet"): Pool.load(tmp_path/"p")

def test_fingerprint_follows_ids_order_in_pool_and_recipe():
    a = Pool({1: (2, 3), 4: (5, 6)})
    b = Pool({4: (5, 6), 1: (2, 3)})
    c = Pool({1: (3, 2), 4: (5, 6)})
    assert a.fingerprint == b.fingerprint != c.fingerprint != Pool(a.ids, {"sampler": "x"}).fingerprint
    assert a.only([4]).ids == {4: (5, 6)}

# -- the real size ------------------------------------------------------------------------------------------

def okvqa(split):
    p = repo_path("..", "shared", "data", "okvqa", f"OpenEnded_mscoco_{split}2014_questions.json")
    if not p.exists(): pytest.skip("real OKVQA questions are not here")
    return pd.DataFrame(json.loads(p.read_text())["questions"])

def test_real_okvqa_validation_queries_from_training_demonstrations():
    train = okvqa("train")
    val = okvqa("val").head(300)
    both = pd.concat([train, val])
    store = vectors(both, d=32)
    t = time.process_time()
    pool = make_pool(val, train, 64, "mixed", store)
    secs = time.process_time() - t
    assert (len(pool), pool.K) == (300, 64) and secs < 10
    pool.validate(train, val)

def test_real_okvqa_training_queries_never_see_their_picture():
    train = okvqa("train")
    pool = make_pool(train, train, 32)
    pool.validate(train)
    assert pool.recipe["excluded"]["self"] == 9009 and pool.recipe["excluded"]["same_image_id"] == 22

@pytest.mark.parametrize("column, value", [("question", "another?"), ("image_id", 77)])
def test_an_id_is_one_question(column, value):
    "Two tables that both count from 0: a shared id would bar a stranger, and be shown with the other's texts"
    n = 12
    columns = dict(question_id=range(n), image_id=range(n), question=[f"what {i}?" for i in range(n)])
    items = pd.DataFrame(columns)
    other = items.copy()
    other.loc[5, column] = value
    says = f"question_id 5 has {column} .* among the queries, .*{value}.* among the demonstrations .1 such ids"
    with pytest.raises(ValueError, match=says): make_pool(items[3:7], other, 3)
    pool = make_pool(items[3:7], items, 3)
    with pytest.raises(ValueError, match="question_id 5 has"): pool.validate(other, queries=items[3:7])
    assert make_pool(items[:5], other, 3).validate(other, queries=items[:5])      # 5 is no query
    assert make_pool(items.assign(question=items.question + " "), items, 3).ids == make_pool(items, items, 3).ids

def test_a_plot_of_pools_names_the_vectors_that_it_compares():
    items = frame(24).assign(answer="a word")
    store = vectors(items)
    pools = dict(random=make_pool(items[:8], items[8:], 6))
    bank = BankStore(store, items, items.question_id[8:])
    assert [plot_pools(pools, s).get_ylabel() for s in (store, bank)] == ["cosine to the query (mixed)"]*2
    assert plot_pools(pools, bank, "text").get_ylabel() == "cosine to the query (text)"

def test_vectors_of_no_clip_are_known_by_their_encoder():
    items = frame(24)
    def of(**source): return EmbedStore.from_vectors(items.question_id, vectors(items).text, source=source)
    one, other = of(encoder="one", items="these"), of(encoder="other", items="these")
    assert [encoder_of(s) for s in (one, of(clip="a CLIP"), vectors(items))] == ["one", "a CLIP", None]
    assert make_pool(items[:8], items[8:], 6, "text", one).recipe["clip"] == "one"
    trained = SimpleNamespace(info=dict(encoder="one"))
    check_encoder(trained, encoder_of(one))
    with pytest.raises(ValueError, match="vectors of CLIP one, these are of CLIP other"):
        check_encoder(trained, encoder_of(other))
