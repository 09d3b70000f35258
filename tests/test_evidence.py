"Evidence: its numbers against a slow reference, own pictures left out, and who reads a store with a bank"
import math
from copy import deepcopy
import numpy as np, pandas as pd, pytest, torch
from leverplus.callback_onpolicy import draw_groups
from leverplus.core import fingerprint, seed_all
from leverplus.dls import group_dls
from leverplus.embed import EmbedStore
from leverplus.evidence import NAMES, BankStore, Evidence, answer_vectors, inputs, kind_for, n_evidence
from leverplus.evaluate import pick_baselines
from leverplus.groups import RLData, as_record
from leverplus.infer import pick_model, pick_similar
from leverplus.learner import selector_learner
from leverplus.pools import make_pool
from leverplus.rldata_generate import with_kind
from leverplus.rldata_propose import SimilarityPrior, propose
from leverplus.selector import PointerSelector, Shared
from leverplus.settings import Proposing
from leverplus.synth import quiet

# ---- a bank of five questions --------------------------------------------------------------------------
F = len(NAMES)
QUERY = 9
BANK = [1, 2, 3, 4, 5]
ANSWERS = ["dog", "dog", "cat", "hot dog", "cat"]
VECTORS = torch.tensor([   # cosines with the query: .8, .6, 0, 1 (its own picture), -.6
    [.8, .6, 0.],
    [.6, 0., .8],
    [0., 1., 0.],
    [1., 0., 0.],
    [-.6, 0., .8],
    [1., 0., 0.],
])
QUESTIONS = ["What is it?", "A dog or a cat?", "Which cat is it?", "hot?", "what is it", "Is it a dog or a hot cat?"]
OF_ANSWER = {"dog": [1., 0.], "cat": [0., 1.], "hot dog": [.8, .6]}

def five(answers=ANSWERS, own="no idea"):
    "Five questions and the query, which has the picture of the fourth"
    return pd.DataFrame(dict(
        question_id=[*BANK, QUERY], image_id=[11, 12, 13, 90, 15, 90], question=QUESTIONS, answer=[*answers, own],
        split=["train"]*5 + ["dev"]))

def store_of(answers=ANSWERS):
    own = [OF_ANSWER[a] for a in answers] + [[.6, -.8]]
    return EmbedStore([*BANK, QUERY], text=VECTORS, answer=torch.tensor(own))

def evidence_of(answers=ANSWERS, own="no idea", **kw): return Evidence(five(answers, own), store_of(answers), **kw)

def numbers(evidence, cands=BANK, query=QUERY):
    return pd.DataFrame(evidence([query], [cands])[0].double().numpy(), cands, list(NAMES))

def weights_by_hand(scale):
    "Of the four neighbours that do not share the query's picture"
    w = {1: math.exp(.8/scale), 2: math.exp(.6/scale), 3: 1., 5: math.exp(-.6/scale)}
    return {q: x / sum(w.values()) for q, x in w.items()}

def ridge_by_hand():
    others = [1, 2, 3, 5]
    v = VECTORS[[0, 1, 2, 4]].double().numpy()
    K = np.exp(6 * (v @ v.T - 1))
    k = np.exp(6 * (v[:, 0] - 1))
    return dict(zip(others, np.linalg.solve(K + np.eye(4), k)))

OPINIONS = dict(near=weights_by_hand(.05), wide=weights_by_hand(.1), ridge=ridge_by_hand())

def test_similarity_is_the_cosine_of_the_questions():
    assert numbers(evidence_of()).similar.tolist() == pytest.approx([.8, .6, 0., 1., -.6], abs=1e-6)

def test_what_is_known_of_an_answer_alone():
    about = numbers(evidence_of())
    assert about.words.tolist() == pytest.approx(np.log1p([1, 1, 1, 2, 1]))
    assert about.letters.tolist() == pytest.approx(np.log1p([3, 3, 3, 7, 3]))

def test_rank_is_one_over_the_place():
    about = numbers(evidence_of())
    assert about["rank"].tolist() == pytest.approx([1/2, 1/3, 1/4, 1, 1/5])
    assert numbers(evidence_of(), [5, 3])["rank"].tolist() == pytest.approx([1/2, 1])

def test_of_candidates_alike_the_smaller_id_comes_first():
    alike = torch.tensor([[.6, .8, 0.]]).repeat(6, 1)
    same = Evidence(five(), EmbedStore([*BANK, QUERY], text=alike))
    assert numbers(same, [3, 1, 2])["rank"].tolist() == pytest.approx([1/3, 1, 1/2])

def test_rank_counts_real_candidates_only():
    "Padding may stand anywhere, and look like anybody"
    evidence = evidence_of()
    told = evidence([QUERY], [[4, 3, 1]], torch.tensor([[False, True, True]]))[0, :, NAMES.index("rank")]
    assert told.tolist() == pytest.approx([0, 1/2, 1])

def test_words_that_are_asked_about_and_shared():
    "The query: is, it, a, dog, or, hot, cat"
    about = numbers(evidence_of())
    assert about.asked.tolist() == [1, 1, 1, 1, 1]
    assert about.shared.tolist() == pytest.approx([2/8, 4/7, 3/8, 1/7, 2/8])
    other = numbers(evidence_of(), query=1)   # what, is, it
    assert other.asked.tolist() == [0, 0, 0, 0, 0]
    assert other.shared[5] == 1 and other.shared[2] == 0
    plain = EmbedStore([*BANK, QUERY], text=VECTORS)
    half = numbers(Evidence(five(["dog", "blue dog", "cat", "hot dog", "cat"]), plain))
    assert half.asked[2] == pytest.approx(1/2)

def test_same_counts_the_pool_and_not_the_bank():
    ln2, ln3 = math.log(2), math.log(3)
    evidence = evidence_of()
    assert numbers(evidence).same.tolist() == pytest.approx([ln2, ln2, ln2, 0, ln2])
    assert numbers(evidence, [1, 3, 4]).same.tolist() == [0, 0, 0]
    three = evidence_of(["dog", "dog", "cat", "dog", "cat"])
    assert numbers(three).same.tolist() == pytest.approx([ln3, ln3, ln2, ln3, ln2], abs=1e-6)
    assert numbers(three, [1, 2, 4])["same"].tolist() == pytest.approx([ln3]*3)

@pytest.mark.parametrize("opinion", OPINIONS)
def test_votes_are_those_of_others_with_the_same_answer(opinion):
    w = OPINIONS[opinion]
    wanted = [w[2], w[1], w[5], 0, w[3]]   # dog hears of the other dog, cat of the other cat, nobody says hot dog
    wanted = np.sqrt(np.clip(wanted, 0, None))
    assert numbers(evidence_of())["votes_" + opinion].to_numpy() == pytest.approx(wanted, abs=2e-4)

def test_a_candidate_that_has_no_vote_gets_all_the_votes_for_its_answer():
    "The fourth has the query's picture: its own vote does not count, those of the dogs do"
    about = numbers(evidence_of(["dog", "dog", "cat", "dog", "cat"]))
    for opinion in ("near", "wide"):
        w = OPINIONS[opinion]
        assert about["votes_" + opinion][4] == pytest.approx(math.sqrt(w[1] + w[2]), rel=1e-4)
    e4 = math.exp(-4)   # near: weights 1 and exp(-4), the others below exp(-16)
    assert about.votes_near[1] == pytest.approx(math.sqrt(e4 / (1 + e4)), rel=1e-4)
    assert about.votes_near[2] == pytest.approx(math.sqrt(1 / (1 + e4)), rel=1e-4)

def test_the_pool_votes_with_its_own_answers():
    "By cosine/.05, the candidate itself and who shares the query's picture among them"
    w = np.exp(np.array([.8, .6, 0, 1, -.6])/.05)
    wanted = np.sqrt(np.array([w[0] + w[1], w[0] + w[1], w[2] + w[4], w[3], w[2] + w[4]]) / w.sum())
    assert numbers(evidence_of()).votes_pool.to_numpy() == pytest.approx(wanted, rel=1e-4)
    one, two = math.exp(.6/.05), 1.
    wanted = np.sqrt(np.array([one, two]) / (one + two))
    assert numbers(evidence_of(), [2, 3]).votes_pool.to_numpy() == pytest.approx(wanted, rel=1e-4)

@pytest.mark.parametrize("opinion", OPINIONS)
def test_agreement_is_the_cosine_with_the_mean_answer_of_others(opinion):
    w = OPINIONS[opinion]
    of = {q: np.array(OF_ANSWER[a]) for q, a in zip(BANK, ANSWERS)}
    usual = sum(of.values()) / 5
    wanted = []
    for c in BANK:
        mean = usual + sum(w[q] * (of[q] - usual) for q in w if q != c)
        wanted.append(mean @ of[c] / np.linalg.norm(mean))
    assert numbers(evidence_of())["agrees_" + opinion].to_numpy() == pytest.approx(wanted, abs=2e-5)

def test_answers_of_many_people_vote_with_what_they_are_worth():
    "Nine of ten said cat, one said dog: the official scores are 1 and .3, and what is shown is dog"
    items = five()
    items["answers"] = [["cat"]*9 + ["dog"]] + [[a]*10 for a in [*ANSWERS[1:], "no idea"]]
    about = numbers(Evidence(items, store_of()))
    w = OPINIONS["near"]
    assert about.votes_near[2] == pytest.approx(math.sqrt(.3 * w[1]), rel=1e-4)
    assert about.votes_near[3] == pytest.approx(math.sqrt(w[1] + w[5]), rel=1e-4)
    assert about.votes_near[1] == pytest.approx(math.sqrt(w[2]), rel=1e-4)   # .3 of its own is taken off

def test_the_nearest_vote_and_no_others():
    "near=2: the dogs; the cats are as nobody"
    about = numbers(evidence_of(near=2))
    w1, w2 = (x / (1 + math.exp(-2)) for x in (1, math.exp(-2)))
    assert about.votes_wide[1] == pytest.approx(math.sqrt(w2), rel=1e-4)
    assert about.votes_wide[2] == pytest.approx(math.sqrt(w1), rel=1e-4)
    assert about.votes_wide[[3, 5]].tolist() == [0, 0]

# ---- what must not be in it ----------------------------------------------------------------------------
def test_nothing_of_the_query_is_in_its_evidence():
    "Neither the query's answer nor that of another question about its picture, but for the usual answer"
    about = numbers(evidence_of())
    pd.testing.assert_frame_equal(numbers(evidence_of(own="dog")), about)
    other = numbers(evidence_of(["dog", "dog", "cat", "cat", "cat"]), [1, 2, 3, 5])
    votes = ["votes_" + opinion for opinion in OPINIONS]
    pd.testing.assert_frame_equal(other[votes], about.loc[[1, 2, 3, 5], votes])

def test_a_question_of_the_bank_does_not_vote_about_itself():
    "Asked about the first: the second is the nearest of the others, whatever the first answers"
    for first in ("dog", "cat"):
        evidence = evidence_of([first, "dog", "cat", "hot dog", "cat"])
        said = evidence.opinion([1])
        assert said.weight[:, 0, 0].tolist() == [0, 0, 0]
        assert said.votes[0, 0].sum() == pytest.approx(1, abs=1e-5)
        about = numbers(evidence, [2, 3, 4, 5], 1)
        assert about.votes_near[3] < 1e-2 and about.votes_near[4] == 0

def test_where_nobody_is_left_nobody_votes():
    items = five().assign(image_id=90)
    about = numbers(Evidence(items, store_of()))
    assert np.isfinite(about.to_numpy()).all()
    assert not about[["votes_" + opinion for opinion in OPINIONS]].to_numpy().any()

def test_the_bank_is_the_training_split_or_what_is_named():
    assert evidence_of().ids.tolist() == BANK
    assert evidence_of(demos=[3, 1]).ids.tolist() == [3, 1]
    assert Evidence(five().drop(columns="split"), store_of()).ids.tolist() == [*BANK, QUERY]

def test_strangers_are_named():
    evidence = evidence_of(demos=[1, 2, 3])
    with pytest.raises(KeyError, match="5: candidates that are not in the bank of 3"): evidence([QUERY], [[1, 5]])
    with pytest.raises(KeyError, match="77: not among the 6 items"): evidence([77], [[1, 2]])

def test_fingerprint_says_whether_evidence_is_the_same():
    one = evidence_of()
    one([QUERY], [BANK])
    assert one.fingerprint == evidence_of().fingerprint
    others = evidence_of(["cat", *ANSWERS[1:]]), evidence_of(near=2), evidence_of(demos=[1, 2, 3, 5])
    assert len({e.fingerprint for e in (one, *others)}) == 4

# ---- shape, order, padding -----------------------------------------------------------------------------
def test_order_of_candidates_and_padding_change_nothing():
    evidence = evidence_of()
    whole = numbers(evidence)
    turned = numbers(evidence, BANK[::-1])
    pd.testing.assert_frame_equal(turned.loc[BANK], whole, check_exact=False, rtol=1e-5)
    padded = evidence([QUERY, 1], [[1, 3, 1, 1], [2, 3, 4, 5]], torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool())
    torch.testing.assert_close(padded[0, :2], evidence([QUERY], [[1, 3]])[0])
    torch.testing.assert_close(padded[1], evidence([1], [[2, 3, 4, 5]])[0])
    assert not padded[0, 2:].any()

def test_many_queries_are_as_one_by_one():
    evidence = evidence_of()
    queries = [QUERY, 1, 2, 3] * 20   # more than a block of 64
    cands = [[5, 4]] * 80
    together = evidence(queries, cands)
    for i in (0, 1, 2, 3, 79): torch.testing.assert_close(together[i], evidence_of()([queries[i]], [[5, 4]])[0])

# ---- answers as vectors --------------------------------------------------------------------------------
def test_vectors_of_letters_know_what_looks_alike():
    texts = ["dog", "dogs", "guide dog", "boat", ""]
    vecs = answer_vectors(texts)
    assert vecs.norm(dim=-1).tolist() == pytest.approx([1, 1, 1, 1, 0], abs=1e-5)
    cos = vecs @ vecs.T
    assert cos[0, 1] > .25 and cos[0, 2] > .5
    assert cos[:3, 3].abs().max() < .2
    torch.testing.assert_close(answer_vectors(texts), vecs)

def test_evidence_without_vectors_of_answers_takes_letters():
    plain = EmbedStore([*BANK, QUERY], text=VECTORS)
    about = numbers(Evidence(five(), plain))
    with_vectors = numbers(evidence_of())
    votes = [n for n in NAMES if not n.startswith("agrees")]
    pd.testing.assert_frame_equal(about[votes], with_vectors[votes])
    assert about.agrees_near[4] > about.agrees_near[3]   # hot dog looks like dog, which is near; cat does not

# ---- a store with a bank -------------------------------------------------------------------------------
def bank_of(n=40, dev=6):
    "Questions in four topics; each topic has its own answer"
    g = torch.Generator().manual_seed(0)
    topic = torch.arange(n + dev) % 4
    vecs = torch.eye(4)[topic] + .3*torch.randn(n + dev, 4, generator=g)
    items = pd.DataFrame(dict(
        question_id=range(100, 100 + n + dev), image_id=range(n + dev), question=[f"what? {i}" for i in range(n + dev)],
        answer=[("red", "green fish", "blue", "white")[t] for t in topic], split=["train"]*n + ["dev"]*dev))
    items["answers"] = [[a]*10 for a in items.answer]
    items = items.set_index("question_id", drop=False).rename_axis(None)
    plain = EmbedStore(items.index, text=vecs)
    return items, plain, BankStore(plain, items)

def groups_of(items, pool, split):
    "Pairs of neighbours in each pool; right where the last one has the query's answer"
    queries = [q for q in pool if items.split[q] == split]
    rows = [(q, pair) for q in queries for pair in zip(pool[q], pool[q][1:])]
    worth = [float(items.answer[pair[-1]] == items.answer[q]) for q, pair in rows]
    frame = pd.DataFrame(rows, columns=["question_id", "pointer"])
    frame = frame.assign(gen_method="random", vqa_acc_score=worth, vqa_correct=worth, eval_failed=False)
    return RLData(as_record(frame), pool.only(queries))

def loaders(bank, store, kind=None):
    parts = (groups_of(bank["items"], bank["pool"], split) for split in ("train", "dev"))
    return group_dls(*parts, store, "soft_only", kind, bs=20)

@pytest.fixture(scope="module")
def bank():
    "Items, a store with a bank and one without, pools, and a selector that was warmed up with the bank"
    items, plain, store = bank_of()
    demos = items[items.split == "train"]
    out = dict(items=items, plain=plain, store=store, pool=make_pool(items, demos, 8, "random", plain))
    seed_all(0)
    learn = selector_learner(loaders(out, store), d_hidden=8)
    with quiet(learn):
        learn.fit_warmup(demos, store, 5, sampler="random", steps=30, bs=20, best=False)
    return out | dict(learn=learn, model=learn.model)

def test_kinds_of_a_store_with_a_bank(bank):
    store, plain = bank["store"], bank["plain"]
    assert store.kinds == ("text+answers", "text")
    assert store.kind() == "text+answers" and plain.kind() == "text"
    assert store.dim() == plain.dim() == 4
    torch.testing.assert_close(store.get([100, 101]), plain.get([100, 101]))
    pictured = EmbedStore(plain.ids, image=plain.text, text=plain.text)
    assert BankStore(pictured, bank["items"]).kinds == ("mixed+answers", "text+answers", "image", "text", "mixed")
    with pytest.raises(ValueError, match="image"): store.kind("image+answers")
    assert [n_evidence(kind) for kind in ("text+answers", "text")] == [F, 0]

def test_inputs_have_evidence_behind_the_candidates_and_zeros_behind_the_query(bank):
    cands = [[100, 101, 102]]
    query, shown = inputs(bank["store"], [142], cands)
    assert query.shape == (1, 4 + F) and shown.shape == (1, 3, 4 + F)
    assert not query[:, 4:].any()
    torch.testing.assert_close(shown[..., 4:], bank["store"].evidence([142], cands))
    for plain in (inputs(bank["store"], [142], cands, kind="text"), inputs(bank["plain"], [142], cands)):
        torch.testing.assert_close(plain[0], query[:, :4])
        torch.testing.assert_close(plain[1], shown[..., :4])

def test_batches_hold_the_evidence_of_each_query(bank):
    dls = loaders(bank, bank["store"])
    assert dls.info["kind"] == "text+answers"
    query, cands, mask, *_ = dls.valid.one_batch()
    ds = dls.valid_ds
    pools = [bank["pool"][q] for q in ds.question_ids]
    wanted = inputs(bank["store"], ds.question_ids.tolist(), pools)
    torch.testing.assert_close(query, wanted[0])
    torch.testing.assert_close(cands, wanted[1])
    some = ds.select(ds.items[2:4])
    torch.testing.assert_close(some.evidence, ds.evidence[2:4])
    plain = loaders(bank, bank["store"], "text")
    torch.testing.assert_close(plain.valid.one_batch()[1], cands[..., :4])
    assert fingerprint(plain.train_ds.content()) != fingerprint(dls.train_ds.content())

def test_a_learner_of_such_batches_has_a_selector_that_reads_evidence(bank):
    model = bank["model"]
    assert model.n_evidence == F and model.d_in == 4 + F and model.width == 4
    assert selector_learner(loaders(bank, bank["plain"]), d_hidden=8).model.n_evidence == 0

def test_a_warm_up_teaches_what_evidence_is_worth(bank):
    "The part that reads evidence starts with zeros, and the warm-up moves it"
    assert PointerSelector(4 + F, 8, n_evidence=F).evidence.out.weight.abs().sum() == 0
    assert bank["model"].evidence.out.weight.abs().sum() > 0
    picks = pick_model(bank["model"], bank["pool"], bank["store"], 1, kind="text+answers")
    answer = bank["items"].answer
    right = [answer[p[0]] == answer[q] for q, p in zip(picks.question_id, picks.pointer)]
    there = [(answer[list(bank["pool"][q])] == answer[q]).any() for q in picks.question_id]
    assert np.mean(right) > .9 * np.mean(there)

def test_proposals_picks_and_draws_show_a_selector_its_evidence(bank):
    model, pool, store = bank["model"], bank["pool"], bank["store"]
    dev = [q for q in pool if bank["items"].split[q] == "dev"]
    with torch.no_grad():
        query, cands = inputs(store, dev, [pool[q] for q in dev])
        mask = torch.ones(cands.shape[:2], dtype=torch.bool)
        model.eval()
        greedy = model.greedy(model.encode(query, cands, mask), 2)
    wanted = [tuple(pool[q][j] for j in row) for q, row in zip(dev, greedy.tolist())]
    assert pick_model(model, pool.only(dev), store, 2, kind="text+answers").pointer.tolist() == wanted
    drawn = draw_groups(model, pool, store, dev, 2, 3)
    torch.testing.assert_close(drawn["cands"], cands)
    torch.testing.assert_close(drawn["greedy"], greedy)
    for kind in (None, "text"):
        proposing = Proposing(counts=dict(beam=1), kind=kind)
        assert list(map(tuple, propose(pool, store, dev, 2, model, proposing).pointer)) == wanted

def test_a_selector_that_reads_evidence_refuses_a_store_without(bank):
    model, pool, plain = deepcopy(bank["model"]), bank["pool"], bank["plain"]
    model.info = dict(kind="text+answers")   # as a checkpoint says
    asked = dict(
        as_trained=lambda: pick_model(model, pool, plain, 2),
        pick=lambda: pick_model(model, pool, plain, 2, kind="text"),
        propose=lambda: propose(pool, plain, list(pool), 2, model),
        draw=lambda: draw_groups(model, pool, plain, list(pool), 2, 3),
    )
    for ask in asked.values():
        with pytest.raises(ValueError, match=r"pass store = BankStore\(store, items\)"): ask()

def test_who_reads_vectors_alone_is_shown_no_evidence(bank):
    store, plain, pool = bank["store"], bank["plain"], bank["pool"]
    other = PointerSelector(4, 8)
    assert kind_for(bank["model"], store) == "text+answers"
    assert kind_for(other, store) == kind_for(SimilarityPrior(), store, "text+answers") == "text"
    pd.testing.assert_frame_equal(pick_similar(pool, store, 2), pick_similar(pool, plain, 2))
    pd.testing.assert_frame_equal(pick_model(other, pool, store, 2), pick_model(other, pool, plain, 2))
    baselines = [pick_baselines(pool, s, (1, 2), 1, items=bank["items"]) for s in (store, plain)]
    pd.testing.assert_frame_equal(*baselines)
    assert with_kind(Proposing(), store) == with_kind(Proposing(), plain)
    dev = list(pool)[-4:]
    pd.testing.assert_frame_equal(propose(pool, store, dev, 2), propose(pool, plain, dev, 2))

# ---- a selector with evidence --------------------------------------------------------------------------
def reader():
    "A selector whose part for evidence says something"
    seed_all(1)
    model = PointerSelector(4 + F, 8, n_evidence=F).eval()
    torch.nn.init.normal_(model.evidence.out.weight)
    return model

def batch_of(bank):
    queries = [q for q in bank["pool"] if bank["items"].split[q] == "dev"]
    ids = torch.tensor([bank["pool"][q] for q in queries])
    query, cands = inputs(bank["store"], queries, ids.numpy())
    return query, cands, torch.ones(ids.shape, dtype=torch.bool), ids

@torch.no_grad()
def logps(model, query, cands, mask, seqs, **kw): return model.logp(model.encode(query, cands, mask, **kw), seqs)

SEQS = torch.tensor([[0, 1], [1, 0], [5, 2]])

def test_evidence_changes_what_a_selector_says(bank):
    query, cands, mask, _ = batch_of(bank)
    other = cands.clone()
    other[:, 1, 4:] += 1
    seqs = SEQS.expand(len(query), -1, -1)
    assert (logps(reader(), query, cands, mask, seqs) - logps(reader(), query, other, mask, seqs)).abs().min() > 1e-4

def test_permuted_candidates_and_padding_change_no_probability(bank):
    model = reader()
    query, cands, mask, _ = batch_of(bank)
    seqs = SEQS.expand(len(query), -1, -1)
    whole = logps(model, query, cands, mask, seqs)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 4, 5])
    torch.testing.assert_close(logps(model, query, cands[:, order], mask, order.argsort()[seqs]), whole)
    more = torch.cat([cands, torch.full_like(cands[:, :2], 9.)], 1)
    there = torch.cat([mask, torch.zeros_like(mask[:, :2])], 1)
    torch.testing.assert_close(logps(model, query, more, there, seqs), whole)

def test_shared_pools_with_evidence_are_the_same_pools(bank):
    model = reader()
    query, cands, mask, ids = batch_of(bank)
    seqs = SEQS.expand(len(query), -1, -1)
    used, index = ids.unique(return_inverse=True)
    shared = Shared(bank["plain"].get(used.numpy()), index, cands[..., 4:])
    assert shared.shape == cands.shape
    torch.testing.assert_close(logps(model, query, shared, mask, seqs), logps(model, query, cands, mask, seqs))

@pytest.mark.parametrize("form", ["own", "shared"])
def test_the_nearest_of_a_pool_keep_their_evidence(bank, form):
    "top_m=5 is the pool of the five most similar"
    model = reader()
    query, cands, mask, ids = batch_of(bank)
    sim = torch.nn.functional.cosine_similarity(query[:, None, :4], cands[..., :4], dim=-1)
    few = sim.topk(5, -1).indices.sort(-1).values
    wanted = model.encode(query, cands.gather(1, few[..., None].expand(-1, -1, 4 + F)), mask[:, :5])
    shown = cands
    if form == "shared":
        used, index = ids.unique(return_inverse=True)
        shown = Shared(bank["plain"].get(used.numpy()), index, cands[..., 4:])
    with torch.no_grad():
        enc = model.encode(query, shown, mask, top_m=5)
        torch.testing.assert_close(enc.evidence, wanted.evidence)
        torch.testing.assert_close(model.greedy(enc, 2), few.gather(1, model.greedy(wanted, 2)))

def test_one_pool_for_all_has_no_room_for_evidence(bank):
    query, cands, mask, _ = batch_of(bank)
    with pytest.raises(ValueError, match=f"one pool for all queries, but this selector reads {F} numbers"):
        reader().encode(query, cands[0], mask)
