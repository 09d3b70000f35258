"Older files: what is detected, what is refused, what is a failure, and the way back"
import json
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from leverplus.dls import GroupDataset
from leverplus.embed import EmbedStore
from leverplus.groups import PROB_FACTS, RECORD, TEXT_FACTS, RLData
from leverplus.lvlm import MockScorer
from leverplus.pools import Pool
from leverplus.settings import Guarding
from leverplus.rewards import reward
from leverplus.rldata_generate import generate
from leverplus.earlier_json import DIALECTS, HOLDS, detect, lost_in, read_beams, row_map
from leverplus.rldata_merge import merge, skip_fallback, sources
from leverplus.vqa import relevances, vqa_accuracies

N = 8
IDS = {i: 100 + 7 * i for i in range(N)}
ITEMS = pd.DataFrame(
    dict(
        question_id=list(IDS.values()),
        image_id=range(N),
        question=[f"What is {i}?" for i in range(N)],
        answers=[["cat"] * 7 + ["dog"] * 3] * N,
    ),
    index=list(IDS.values()),
)

POOL = Pool({IDS[q]: [IDS[i] for i in range(N) if i > 1] for q in (0, 1)}, dict(sampler="by hand", K=6))

def cand(pointer=(2, 3), answer="cat", acc=1.0, **kw):
    return (
        dict(
            pointer=list(pointer) if isinstance(pointer, tuple) else pointer,
            vqa_pred_answer=answer,
            vqa_correct=int(acc > 0),
            vqa_acc_score=acc,
        )
        | kw
    )
def v1_cand(*a, **kw):
    return cand(
        *a,
        **(
            dict(gen_method="random", beam_rank=None, beam_score=None, logprob_score=None, temperature=None)
            | kw
        )
    )
def v4_cand(pointer=(2, 3), answer="cat", acc=1., **kw):
    return v1_cand(
        pointer,
        answer,
        acc,
        **(
            dict(
                pointer_pos=[2, 3],
                similarity_score=None,
                vqa_raw_generation=answer,
                vqa_prompt_len=99,
                vqa_gt_prob=0.3,
                vqa_rel_token_f1=1.0,
                vqa_rel_edit_sim=1.0,
                vqa_rel_score=1.0,
                vqa_eval_mode="vqaEval",
                eval_split_used="train",
                eval_failed=False,
            )
            | kw
        )
    )
def block(k):
    return dict(
        query_id=k,
        question_id=IDS[k],
        image_id=k,
        question=f"What is {k}?",
        gt_answers_raw=["cat"] * 7 + ["dog"] * 3,
        gt_answers_norm=["cat"] * 7 + ["dog"] * 3,
    )
def v1(**kw):
    return {
        "0": {"pointer_candidates": [v1_cand(**kw), v1_cand((3, 2), "dog", 0.9)]},
        "1": {"pointer_candidates": [v1_cand((4, 5), "bus", 0.0)]},
    }
def v4(**kw):
    return {"_meta": dict(created_at="2025-12-15", vqa_model="m", notes=[])} | {
        "0": {"query": block(0), "pointer_candidates": [v4_cand(**kw), v4_cand((3, 2), "dog", 0.9)]}
    }
def k64(**kw):
    return {
        "_meta": {},
        "0": {
            "query": block(0),
            "candidate_pool_ids": [5, 2, 7],
            "pointer_candidates": [
                v4_cand(**(dict(pointer=[0, 2], pointer_global=[5, 7]) | kw)),
                v4_cand((1, 0), "dog", 0.9, pointer_global=[2, 5]),
            ],
        },
    }
def balanced(**kw):
    return {
        "0": {
            "pointer_candidates": [
                dict(pointer=[2, 3], vqa_pred_answer="cat", vqa_acc_score=1.0) | kw,
                dict(pointer=[3, 2], vqa_pred_answer="dog", vqa_acc_score=0.9),
            ]
        }
    }
def augmented(**kw):
    return {
        "0": {
            "pointer_candidates": [
                cand(
                    gen_method="aug_swap",
                    aug_type="one_swap",
                    aug_round=1,
                    proxy_score=0.2,
                    raw_generation="a cat",
                    prompt_text="...",
                    vqa_eval_mode="train",
                    **kw
                )
            ]
        }
    }
def merged(**kw): return {"0": {"pointer_candidates": v4(**kw)["0"]["pointer_candidates"]}}
FILES = dict(v1=v1, v4=v4, k64=k64, balanced=balanced, augmented=augmented, merged=merged)

@pytest.fixture
def read(tmp_path):
    def go(obj, raw=None, **kw):
        f = tmp_path / "old.json"
        f.write_text(json.dumps(obj) if raw is None else raw)
        pool = {} if raw or any("candidate_pool" in k for e in obj.values() for k in e) else dict(pool=POOL)
        return RLData.from_json(f, **(dict(id_map=IDS, items=ITEMS) | pool | kw))
    return go

def fails(f, *texts, kind=ValueError):
    with pytest.raises(kind) as e: f()
    for t in texts: assert t in str(e.value), str(e.value)

# ---- detection ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FILES)
def test_each_dialect_is_known_and_read(name, read, tmp_path):
    d = read(FILES[name]())
    (told,) = sources(d)
    told = told["import"]
    assert told["dialect"] == name == detect(tmp_path / "old.json")[0]
    assert f"dialect {name} (" in d.log[0]
    assert told["file"] == "old.json"
    assert set(d.rows.scorer) == {f"imported:{told['fingerprint']}"}
    assert d.rows.pointer[0] == tuple(IDS[i] for i in ((5, 7) if name == "k64" else (2, 3)))
    assert d.rows.vqa_acc_score[0] == 1
    assert d.rows.vqa_correct[0] == 1
    assert d.rows.vqa_rel_score[0] == 1
    assert set(FILES) == set(DIALECTS)
    fails(lambda: read(FILES[name](), dialect="v1" if name != "v1" else "v4"), f"looks like dialect {name!r}")

def test_what_a_dialect_cannot_tell_is_stated(read):
    a = read(v1())
    assert set(a.rows.vqa_eval_mode) == {"unstated"}
    assert a.rows.vqa_raw_generation[0] == "cat"
    assert a.rows.vqa_gt_prob.isna().all()
    for t in (
        "vqa_raw_generation of 3 rows: not in the file, the answer stands in",
        "vqa_eval_mode of 3 rows",
        "relevance of 3 rows computed",
    ):
        assert t in a.log[0]
    b = read(balanced())
    assert set(b.rows.gen_method) == {"random"}
    assert "gen_method of 2 rows: not in the file, 'random'" in b.log[0]
    assert b.rows.vqa_correct.tolist() == [1, 1]
    assert "vqa_correct: from accuracy" in b.log[0]
    c = read(augmented())
    assert c.rows.gen_method[0] == "mined"
    assert c.rows.vqa_raw_generation[0] == "a cat"
    assert c.rows.vqa_eval_mode[0] == "official"
    assert "not read: aug_round, prompt_text, proxy_score" in c.log[0]
    d = read(v4(vqa_gt_prob=2e-7))
    assert "not read: pointer_pos, vqa_prompt_len" in d.log[0]
    assert d.rows.vqa_gt_prob.tolist() == [2e-7, 0.3]
    assert "official labels computed again: 1 of 2 differ" in read(v4(answer="bus")).log[0]

def test_relevance_is_computed_from_the_people(read):
    a = read(v1())
    want = relevances(a.rows.vqa_pred_answer, [ITEMS.answers[q] for q in a.rows.question_id])
    for c in want: assert np.allclose(a.rows[c], want[c])
    # the file has the answers
    o = v4()
    [c.pop("vqa_rel_score") for c in o["0"]["pointer_candidates"]]
    assert read(o, items=None).rows.vqa_rel_score.tolist() == [1.0, 1.0]
    fails(lambda: read(v1(), items=None), "old.json: query 0, candidate 0: no relevance")

def test_broken_files_are_named(read, tmp_path):
    fails(lambda: RLData.from_json(tmp_path/"none.json"), "none.json", kind=FileNotFoundError)
    for raw, says in (
        ('{"0": {', "not valid JSON"),
        ("[1]", "one entry per query"),
        ("{}", "one entry per query"),
        ('{"_meta": {}}', "one entry per query"),
        ('{"a": {}}', "key 'a' is no query"),
        ('{"0": {}, "0": {}}', "key '0' occurs twice"),
        ('{"1": {"pointer_candidates": []}, "01": {"pointer_candidates": []}}', "two keys are one query"),
        ('{"3": {"x": 1}}', "query 3 has no list `pointer_candidates`"),
        ('{"3": {"pointer_candidates": [1]}}', "query 3 has no list"),
        ('{"3": {"pointer_candidates": []}}', "no candidate"),
        ('{"3": {"id_list": []}}', "read_beams"),
        (
            '{"0": {"pointer_candidates": [{"pointer": [1, 2], "pointer": [2, 1]}]}}',
            "key 'pointer' occurs twice",
        ),
    ):
        fails(lambda: read(None, raw), "old.json", says)
    fails(lambda: detect(tmp_path/"old.json"), "key 'pointer' occurs twice")

def test_two_dialects_in_one_file(read):
    o = k64()
    o["1"] = v4()["0"] | {"query": block(1)}
    fails(lambda: read(o, pool="used"), "1 of 2 queries have candidate_pool_ids, query 1 has not")
    o = k64()
    o["0"]["pointer_candidates"][1].pop("pointer_global")
    fails(lambda: read(o), "query 0, candidate 1: no pointer_global")

def test_places_or_row_numbers(read):
    o = k64()
    [c.pop("pointer_global") for c in o["0"]["pointer_candidates"]]
    fails(lambda: read(o), "candidate_pool_ids without pointer_global", "dialect='k64' for places, or 'v4'")
    assert read(o, dialect="k64").rows.pointer.tolist() == [(IDS[5], IDS[7]), (IDS[2], IDS[5])]
    o["0"]["pointer_candidates"] = [v4_cand((5, 2)), v4_cand((2, 7), "dog", 0.9)]
    assert read(o, dialect="v4").rows.pointer.tolist() == [(IDS[5], IDS[2]), (IDS[2], IDS[7])]
    fails(lambda: read(o, dialect="k64"), "pointer names place 5 of a pool of 3")
    o = k64()
    o["0"].pop("candidate_pool_ids")
    d = read(o)
    assert d.rows.pointer[0] == (IDS[5], IDS[7])
    assert "cannot be checked" in d.log[0]

# ---- ids and pools -----------------------------------------------------------------------------------------

def test_id_maps(read):
    assert row_map(ITEMS.sample(frac=1, random_state=0)) == IDS
    fails(lambda: row_map(pd.concat([ITEMS, ITEMS[:1]])), "100 occurs more than once")
    want = read(v4()).rows
    pd.testing.assert_frame_equal(read(v4(), id_map=list(IDS.values())).rows, want)
    pd.testing.assert_frame_equal(read(v4(), id_map={str(k): v for k, v in IDS.items()}).rows, want)
    assert read(
        v1(), id_map="question_id", items=ITEMS.assign(question_id=range(N)), pool="used"
    ).rows.pointer[0] == (2, 3)
    fails(lambda: read(v1(), id_map=None), "its ids are row numbers; pass id_map")
    fails(lambda: read(v1(), id_map="rows"), "id_map='rows'")
    fails(
        lambda: read(v1(), id_map={k: v for k, v in IDS.items() if k != 5}),
        "query 1, candidate 0: pointer names row 5, which the id map of 7 rows lacks",
    )
    fails(lambda: read(v1(), id_map={k: v for k, v in IDS.items() if k != 1}), "query 1: its key names row 1")
    fails(lambda: read(v1(), id_map={0: 1, 1: 1}), "one question_id to two rows")

def test_a_map_of_another_set_is_noticed(read):
    off = {i: IDS[(i + 1) % N] for i in IDS}
    fails(lambda: read(v4(), id_map=off), "query 0: question_id is 100, but the id map says 107")
    o = v4()
    o["0"]["query"]["question_id"] = "100"
    assert read(o).rows.question_id.tolist() == read(v4()).rows.question_id.tolist()
    o["0"]["query"]["question_id"] = "22MexNk"
    fails(lambda: read(o), "query 0: question_id is 22MexNk, but the id map says 100")
    accent = ITEMS.assign(question="Caf\u00e9?")
    o = v4()
    o["0"]["query"]["question"] = "Cafe\u0301?"
    assert read(o, items=accent).rows.question_id.tolist() == read(v4()).rows.question_id.tolist()
    o = v4()
    o["0"]["query"].pop("question_id")
    fails(lambda: read(o, id_map=off), "question is 'What is 0?', but question_id 107 asks 'What is 1?'")
    o = v4()
    o["0"]["query"]["query_id"] = 3
    fails(lambda: read(o), "query 0: query_id is 3")
    fails(lambda: read(v4(), items=ITEMS[3:]), "query 0: question_id 100 is not among the 5 items")
    many = {
        "0": {
            "pointer_candidates": [
                v1_cand((a, b), "cat", 0.0, vqa_eval_mode="file")
                for a in range(1, 6)
                for b in range(1, 6)
                if a != b
            ]
        }
    }
    fails(lambda: read(many), "20 of 20 official labels differ", "is this the id map of the file?")
    for c in many["0"]["pointer_candidates"]: c["vqa_eval_mode"] = "fallback"
    assert len(read(many, pool="used")) == 20

def test_pools(read):
    fails(lambda: read(v1(), pool=None), "it has no pools; pass pool=")
    fails(lambda: read(v1(), pool="all"), "pool='all'")
    d = read(v1(), pool="used")
    assert set(d.pool[100]) == {IDS[i] for i in (2, 3, 4, 5)}
    assert d.pool.recipe["sampler"] == "used"
    mine = Pool({100: [IDS[i] for i in (2, 3, 6)], 107: [IDS[i] for i in (4, 5, 6)]})
    assert read(v1(), pool=mine).pool == mine
    fails(
        lambda: read(v1(), pool=Pool({100: [IDS[i] for i in (2, 4, 6)], 107: [IDS[i] for i in (4, 5, 6)]})),
        "old.json",
        "question_id 100: pointer (114, 121) leaves the pool",
    )
    assert read(k64()).pool[100] == (IDS[5], IDS[2], IDS[7])
    fails(lambda: read(k64(), pool=mine), "it has pools of its own")
    assert read(k64(), pool="used").pool.recipe["sampler"] == "imported"
    o = k64()
    o["0"]["candidate_pool_ids"] = [5, 2, 5]
    fails(lambda: read(o), "query 0: candidate_pool_ids names 5 twice")
    o = k64()
    o["0"]["candidate_pool_indices"] = [5, 2, 6]
    fails(lambda: read(o), "candidate_pool_ids and candidate_pool_indices disagree")
    o = k64()
    o["0"]["candidate_pool_indices"] = o["0"].pop("candidate_pool_ids")
    assert read(o).pool[100] == (IDS[5], IDS[2], IDS[7])
    o = k64()
    o["0"]["candidate_pool_ids"] = "5 2 7"
    fails(lambda: read(o), "wanted a list of whole numbers")

def test_a_query_that_is_shown_to_itself(read):
    d = read(v1(pointer=(0, 3)), pool="used")
    assert len(d) == 2
    assert d.manifest["history"][0]["dropped"] == {"that show the query to itself": 1}
    assert 100 not in d.pool[100]
    o = k64()
    o["0"]["candidate_pool_ids"] = [5, 2, 7, 0]
    d = read(o)
    assert d.pool[100] == (IDS[5], IDS[2], IDS[7])
    assert "1 pools held their own query" in d.log[0]

# ---- pointers, repeats, numbers ----------------------------------------------------------------------------

@pytest.mark.parametrize(
    "kw, says",
    [
        (dict(pointer=[2, 2]), "question_id 100: pointer (114, 114) repeats an id"),
        (dict(pointer=[]), "pointer is []"),
        (dict(pointer="2,3"), "pointer is '2,3'"),
        (dict(pointer=[2, 3.5]), "pointer is [2, 3.5]"),
        (dict(pointer=[True, 3]), "pointer is [True, 3]"),
        (dict(vqa_acc_score=60), "vqa_acc_score 60 beside 2 that are within 0..1"),
        (dict(vqa_acc_score=-0.1), "vqa_acc_score -0.1"),
        (dict(vqa_acc_score=float("nan")), "vqa_acc_score is NaN"),
        (dict(vqa_acc_score="1"), "vqa_acc_score is 1, wanted a number"),
        (dict(vqa_acc_score=0.0, vqa_correct=1), "vqa_correct is 1, but vqa_acc_score is 0"),
        (dict(vqa_correct=0.5), "vqa_correct is 0.5"),
        (dict(temperature=float("inf")), "temperature is Infinity"),
        (dict(gen_method="guess"), "gen_method 'guess' is none of"),
        (dict(gen_method=None), "no gen_method; pass method="),
        (dict(vqa_pred_answer=3.5), "vqa_pred_answer is 3.5"),
        (dict(vqa_eval_mode="exact"), "vqa_eval_mode 'exact' is none of"),
        (
            dict(vqa_eval_mode="file", eval_split_used="fallback"),
            "vqa_eval_mode 'file', but eval_split_used 'fallback'",
        ),
        (dict(eval_failed="yes"), "eval_failed is 'yes'"),
        (dict(logprob_score=-1.0, beam_score=-2.0), "logprob_score -1, but beam_score -2"),
        (dict(vqa_raw_generation="x", raw_generation="y"), "disagree: 'x' / 'y'"),
    ],
)
def test_refusals_name_file_query_and_field(kw, says, read): fails(lambda: read(v1(**kw)), "old.json", says)

def test_pointers_that_contradict_each_other(read):
    fails(
        lambda: read(k64(pointer_global=[7, 5])),
        "query 0, candidate 0: pointer [0, 2] leads to [5, 7] in candidate_pool_ids, but pointer_global says"
        " [7, 5]",
    )
    fails(lambda: read(k64(pointer=[0, 3])), "query 0, candidate 0: pointer names place 3 of a pool of 3")
    fails(lambda: read(k64(pointer=[0, -1])), "place -1")

def test_repeats(read):
    same = v1(pointer=(3, 2), answer="dog", acc=0.9)
    d = read(same)
    assert len(d) == 2
    assert d.manifest["history"][0]["dropped"] == {"repeated sequences": 1}
    other = v1(pointer=(3, 2))
    fails(lambda: read(other), "query 0, candidate 1: pointer (121, 114) occurs twice with different labels")
    assert read(other, duplicates="first").rows.vqa_pred_answer[0] == "cat"
    assert read(other, duplicates="last").rows.vqa_pred_answer[0] == "dog"
    fails(lambda: read(other, duplicates="best"), "duplicates='best'")

def test_percent(read):
    o = {
        "0": {
            "pointer_candidates": [
                v1_cand(acc=100.0),
                v1_cand((3, 2), "dog", 90.0),
                v1_cand((3, 4), "bus", 0.0),
            ]
        }
    }
    fails(lambda: read(o), "pass acc_scale=100")
    assert read(o, acc_scale=100).rows.vqa_acc_score.tolist() == [1.0, 0.9, 0.0]
    o["0"]["pointer_candidates"][1]["vqa_acc_score"] = 0.9
    fails(lambda: read(o, acc_scale=100), "vqa_acc_score 0.9 beside 2")

def test_methods(read):
    assert read(v1(gen_method=None), method="policy").rows.gen_method.tolist() == [
        "policy",
        "random",
        "random",
    ]
    assert read(v1(gen_method="guess"), method=dict(guess="mined")).rows.gen_method[0] == "mined"
    assert read(augmented(), method=dict(aug_swap="policy")).rows.gen_method[0] == "policy"
    b = read(v1(gen_method="beam", beam_rank=0, beam_score=-3.0))
    assert b.rows.logprob_score[0] == -3.0
    assert b.rows.beam_rank[0] == 0

# ---- failures ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "kw, says",
    [
        (dict(eval_failed=True, acc=0.0), "eval_failed in the file"),
        (dict(eval_failed=True, error="bad image", acc=0.0), "bad image"),
        (dict(vqa_eval_mode="error", acc=0.0), "vqa_eval_mode 'error'"),
        (dict(error="timeout", acc=0.0), "timeout"),
        (dict(answer="", acc=0.0), "empty answer"),
        (dict(answer=" ", acc=0.5, vqa_eval_mode="fallback"), "empty answer"),
        (dict(answer=None, acc=0.0), "no label in the file"),
        (dict(vqa_acc_score=None), "no label in the file"),
        (dict(answer="RuntimeError: CUDA out of memory", acc=0.0), "RuntimeError: CUDA"),
        (dict(answer="[ERROR] no image", acc=0.0), "[ERROR]"),
        (dict(answer="Traceback (most recent call last)", acc=0.0), "Traceback"),
    ],
)
def test_failures_written_as_negatives_come_in_as_failures(kw, says, read):
    d = read(v1(**kw))
    r = d.rows.iloc[0]
    assert r.eval_failed
    assert says in r.error
    assert r[[*TEXT_FACTS, *PROB_FACTS]].isna().all()
    assert d.rows.eval_failed.sum() == 1
    assert "failures: 1 " in d.log[0]
    assert np.isnan(reward(d.rows)[0])
    assert (reward(d.rows)[1:] >= 0).all()

@pytest.mark.parametrize(
    "kw",
    [
        dict(answer="error", acc=1.0),
        dict(answer="terror", acc=0.0),
        dict(answer="bus", acc=0.0),
        dict(answer="", acc=0.0, vqa_raw_generation="Question"),
        dict(answer="failure", acc=0.0),
    ],
)
def test_answers_are_not_failures(kw, read): assert not read(v1(**kw)).rows.eval_failed.any()

def test_evaluators_of_old_files(read):
    for m, want in dict(
        file="official",
        vqaEval="official",
        train="official",
        val="official",
        fallback="fallback",
        simple_match="fallback",
        lmms="lmms",
    ).items():
        assert read(v1(vqa_eval_mode=m)).rows.vqa_eval_mode[0] == want
    d = read(v1(eval_split_used="fallback"))
    assert d.rows.vqa_eval_mode[0] == "fallback"
    assert len(skip_fallback(d)) == 2

def test_another_definition_of_positive(read):
    d = read(v1(acc=0.3, vqa_correct=0))
    assert d.rows.vqa_correct[0] == 1
    assert "vqa_correct of 1 rows was 0 at an accuracy above 0" in d.log[0]

def test_gt_prob_is_all_or_nothing(read):
    assert read(v4()).rows.vqa_gt_prob.tolist() == [.3, .3]
    for p, says in ((None, "missing in 1 rows"), (0.0, "exactly 0 (a failed computation) in 1")):
        d = read(v4(vqa_gt_prob=p))
        assert d.rows.vqa_gt_prob.isna().all()
        assert says in d.log[0]
    o = v4(vqa_gt_prob=3e-7)
    o["0"]["pointer_candidates"][1]["vqa_gt_prob"] = 1e-7
    assert "at most 3e-07: it was probably taken over image tokens" in read(o).log[0]
    fails(lambda: read(v4(vqa_gt_prob=-1.2)), "old.json", "vqa_gt_prob -1.2 is not within 0..1")

# ---- and back ----------------------------------------------------------------------------------------------

words = st.sampled_from(["cat", "dog", "a bus", "red & blue", "été", "\"x\"\n"])
maybe = lambda s: st.none() | s
@st.composite
def records(draw, dialect):
    "Groups of rows that differ in everything a dialect can hold"
    rows, whole = [], dialect in ("v4", "k64")
    prob = draw(st.booleans()) and dialect != "merged" or whole and draw(st.booleans())
    for k in draw(st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True)):
        for p in draw(
            st.lists(
                st.permutations([4, 5, 6, 7]).flatmap(
                    lambda p: st.integers(1, 3).map(lambda n: tuple(p[:n]))
                ),
                min_size=1,
                max_size=5,
                unique=True,
            )
        ):
            answer = draw(words | st.just("")) if whole else draw(words)
            mode = draw(st.sampled_from(["official", "fallback", "unstated", "lmms"]))
            bad = draw(st.integers(0, 4)) == 0
            only = whole and prob and draw(st.integers(0, 4)) == 0
            acc = vqa_accuracies([answer], [ITEMS.answers[100]])[0]
            text = not bad and not only
            m = draw(st.sampled_from(["beam", "sample", "random", "retrieval", "mined", "policy"]))
            t = dict(
                vqa_pred_answer=answer,
                vqa_raw_generation=answer if dialect in ("v1", "balanced") else draw(words),
                vqa_correct=float(acc > 0),
                vqa_acc_score=acc,
                vqa_rel_token_f1=draw(st.floats(0, 1)),
                vqa_rel_edit_sim=draw(st.floats(0, 1)),
                vqa_rel_score=draw(st.floats(0, 1)),
                vqa_eval_mode=mode,
            )
            rows.append(
                dict(
                    question_id=IDS[k],
                    pointer=tuple(IDS[i] for i in p),
                    gen_method=m,
                    beam_rank=draw(maybe(st.integers(0, 4))),
                    temperature=draw(maybe(st.floats(0.1, 2))),
                    logprob_score=draw(maybe(st.floats(-99, 0))),
                    similarity_score=draw(maybe(st.floats(-1, 1))),
                    **(t if text else dict.fromkeys(t)),
                    vqa_gt_prob=draw(st.floats(0, 1)) if prob and not bad else None,
                    vqa_gt_logprobs=(-1.0, -2.0) if prob and not bad else None,
                    eval_failed=bad,
                    error="no image" if bad else None,
                    scorer="s1"
                )
            )
    if all(r["vqa_acc_score"] is None for r in rows):
        rows[0] |= t | dict(eval_failed=False, error=None, vqa_gt_prob=0.5 if prob else None)
    pool = draw(st.permutations([4, 5, 6, 7]))
    return RLData.from_frame(
        pd.DataFrame(rows),
        Pool({r["question_id"]: [IDS[i] for i in pool] for r in rows}, dict(sampler="by hand", K=4)),
    )

@pytest.mark.parametrize("dialect", HOLDS)
@settings(max_examples=40)
@given(d=st.data(), mapped=st.booleans())
def test_round_trip(dialect, d, mapped, tmp_path_factory):
    data = d.draw(records(dialect))
    f = tmp_path_factory.mktemp("j") / "x.json"
    meta = dialect in ("v4", "k64")
    ids = IDS if mapped else None if meta else "question_id"
    lost = data.to_json(f, dialect, ids, ITEMS if d.draw(st.booleans()) else None)
    assert lost == lost_in(data, dialect)
    back = RLData.from_json(f, None if dialect == "k64" else data.pool, IDS if mapped else ids, items=ITEMS)
    held = [c for c in RECORD if c in HOLDS[dialect]]
    pd.testing.assert_frame_equal(back.rows[held], data.rows[held])
    assert detect(f)[0] == dialect or dialect == "v1"
    assert back.pool == data.pool
    assert (back.rows.scorer == "s1").all() == meta
    for c in set(RECORD) - set(held) - {"scorer"}:
        known = data.rows[c] != 0 if c == "content" else data.rows[c].notna()
        assert any(l.startswith(f"{c} of {known.sum()} rows") for l in lost) == bool(known.any())
    back.to_json(f.with_name("y.json"), dialect, ids)
    once, twice = (json.loads(p.read_text()) for p in (f, f.with_name("y.json")))
    key = next(k for k in once if k != "_meta")
    assert twice[key]["pointer_candidates"] == once[key]["pointer_candidates"]
    assert list(twice) == list(once)

def test_files_hold_what_the_dialects_have(read, tmp_path):
    d = read(k64())
    d.to_json(tmp_path / "k.json", "k64", IDS, ITEMS)
    o = json.loads((tmp_path / "k.json").read_text())
    c = o["0"]["pointer_candidates"][0]
    assert list(o) == ["_meta", "0"]
    assert o["0"]["candidate_pool_ids"] == [5, 2, 7]
    assert c["pointer"] == [0, 2]
    assert c["pointer_global"] == [5, 7]
    assert o["0"]["query"]["question_id"] == 100
    assert c["vqa_eval_mode"] == "vqaEval"
    assert o["_meta"]["ids"] == "row"
    assert (set(k64()["0"]["pointer_candidates"][0]) - set(c)
        == {"pointer_pos", "vqa_prompt_len", "eval_split_used"})
    assert "NaN" not in (tmp_path / "k.json").read_text()
    d.to_json(tmp_path / "b.json", "balanced", IDS)
    assert set(json.loads((tmp_path / "b.json").read_text())["0"]["pointer_candidates"][0]) == {
        "pointer",
        "vqa_pred_answer",
        "vqa_acc_score",
    }
    d.to_json(tmp_path / "v.json", "v1", IDS)
    assert set(json.loads((tmp_path / "v.json").read_text())["0"]["pointer_candidates"][0]) == set(
        v1_cand()
    ) | {"vqa_eval_mode"}

def test_an_unstated_evaluator_stays_unstated(read, tmp_path):
    for dialect in ("v1", "v4"):
        read(v1(answer="", acc=0.0)).to_json(tmp_path / "x.json", dialect, IDS)
        modes = [
            c["vqa_eval_mode"]
            for e in json.loads((tmp_path / "x.json").read_text()).values()
            for c in e.get("pointer_candidates", [])
        ]
        assert modes == ["error", None, None]

def test_writing_refuses(read, tmp_path):
    d = read(v4())
    fails(lambda: d.to_json(tmp_path / "x", "v1"), "cannot say what its ids are")
    fails(lambda: d.to_json(tmp_path / "x", "v1", {0: 100}), "question_id 114 is not in the id map of 1 rows")
    fails(lambda: d.to_json(tmp_path / "x", "augmented"), "cannot be written")
    assert not list(tmp_path.glob("x*"))
    d.to_json(tmp_path / "own.json", "k64")
    fails(
        lambda: RLData.from_json(tmp_path / "own.json", id_map=IDS),
        "`_meta` says that its ids are question_ids",
    )
    assert len(RLData.from_json(tmp_path / "own.json")) == 2

def test_what_is_lost_is_listed(read):
    d = read(v1(answer="", acc=0.0))
    assert lost_in(d, "k64") == ["error of 1 rows"]
    assert "the pools of 2 queries" in lost_in(d, "v4")
    assert "scorer of 3 rows" in lost_in(d, "balanced")
    rows = d.rows.assign(scorer=["s1", "s2", "s2"])
    two = RLData(rows, d.pool)
    assert "scorer of 3 rows" in lost_in(two, "v4")
    rows = read(v4()).rows.assign(
        vqa_pred_answer=["", "Error: x"],
        vqa_raw_generation=["", "y"],
        vqa_acc_score=0.0,
        vqa_correct=0.0,
        vqa_gt_prob=[0.0, 0.1],
    )
    bad = RLData(rows, read(v4()).pool)
    assert {"2 answers that read like failures: they come back as such"} < set(lost_in(bad, "v1"))
    assert any("exactly 0" in l for l in lost_in(bad, "merged"))
    assert not any("failures" in l for l in lost_in(bad, "v4"))

def test_imported_data_go_the_way_of_others(read, tmp_path):
    old = read(v1())
    new = generate(
        tmp_path / "run",
        [100],
        ITEMS.assign(image_path=[f"{i}.png" for i in range(N)], answer="cat"),
        Pool({100: [IDS[i] for i in range(2, 6)]}),
        MockScorer(),
        store := EmbedStore(list(IDS.values()), torch.randn(N, 4), torch.randn(N, 4)),
        guarding=Guarding(test=0),
        progress=False,
    )
    fails(lambda: merge(old, new, pools="unite"), "facts='common'")
    m = merge(old, new, pools="unite", facts="common")
    assert m.rows.groupby("question_id").scorer.nunique().max() == 1
    assert (m.rows.scorer[m.rows.question_id == 107] == old.rows.scorer[0]).all()
    assert len(sources(m)) == 2
    ds = GroupDataset(m.rows, m.pool, store, reward(m.rows))
    assert len(ds) == 2
    m.save(tmp_path / "m")
    assert RLData.load(tmp_path / "m").log == m.log

# ---- beams -------------------------------------------------------------------------------------------------

def beam_file(path, **kw):
    path.write_text(
        json.dumps({"0": dict(id_list=[[2, 3, 0], [4, 2, 0]], score_list=[0.1, 0.3], few_shot_num=2) | kw})
    )
    return path

def test_beams_become_groups(tmp_path):
    b = read_beams(beam_file(tmp_path / "b.json"), IDS)
    assert b.pointer.tolist() == [(114, 121), (128, 114)]
    assert b.score.tolist() == [0.1, 0.3]
    assert b.beam_rank.tolist() == [1, 0]
    assert b.question_id.tolist() == [100, 100]
    store = EmbedStore(list(IDS.values()), torch.randn(N, 4), torch.randn(N, 4))
    ds = GroupDataset(b, Pool({100: [IDS[i] for i in (2, 3, 4, 5)]}), store, b.score)
    assert np.allclose(ds.rewards, [0.1, 0.3])
    s = read_beams(beam_file(tmp_path / "b.json", shot_scores=[[0.0, 0.1], [0.4, 0.3]]), IDS)
    assert s.shot_scores.tolist() == [(0.0, 0.1), (0.4, 0.3)]
    assert s.attrs["file"] != b.attrs["file"]

@pytest.mark.parametrize(
    "kw, says",
    [
        (dict(id_list=[[0, 2, 3], [4, 2, 0]]), "anchor 0: a sequence ends with 3, not with the anchor"),
        (dict(score_list=[0.1]), "2 sequences, 1 scores"),
        (dict(id_list=[[2, 2, 0], [4, 2, 0]]), "repeats an id"),
        (dict(id_list=[[0], [4, 2, 0]]), "id_list holds [0]"),
        (dict(id_list=[[0, 2, 0], [4, 2, 0]]), "repeats an id"),
        (dict(id_list=[[2, 3, 0]] * 2), "twice"),
        (dict(score_list=[0.1, float("nan")]), "score NaN"),
        (dict(shot_scores=[[0.1], [0.3, 0.3]]), "shot_scores"),
        (dict(id_list=[[2, 9, 0], [4, 2, 0]]), "names row 9"),
        (dict(id_list=None), "is this a beam file?"),
    ],
)
def test_beam_refusals(kw, says, tmp_path):
    fails(lambda: read_beams(beam_file(tmp_path / "b.json", **kw), IDS), says)

def test_beams_need_a_map(tmp_path):
    fails(lambda: read_beams(beam_file(tmp_path / "b.json"), None), "its ids are row numbers")
