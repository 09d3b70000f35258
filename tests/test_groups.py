"The record: exact columns, faithful files, errors that name file and id"
import json, shutil
import numpy as np, pandas as pd, pytest
from hypothesis import given, strategies as st
from leverplus.core import read_json
from leverplus.groups import (
    FACT_COLUMNS, PROB_FACTS, RECORD, TEXT_FACTS, RLData, as_record, check_shard, differing,
    finish_manifest, pack, pointer_matrix, read_part, shard_files, shard_tag, unpack, write_part,
)
from leverplus.pools import Pool

POOL = Pool({7: (1, 2, 3, 4), 8: (1, 3, 5, 6)}, dict(sampler="by hand"))

def tried(**over):
    rows = pd.DataFrame(
        dict(
            question_id=[7, 7, 7, 8],
            pointer=[(1, 2), (2, 1), (3,), (1, 3)],
            gen_method=["beam", "random", "retrieval", "sample"],
            beam_rank=[0, None, None, None],
            temperature=[None, None, None, 1.3],
            logprob_score=[-1.0, -2.0, None, -3.0],
            similarity_score=0.5,
            vqa_raw_generation=["a cat", "", "dog", None],
            vqa_pred_answer=["cat", "", "dog", None],
            vqa_acc_score=[1.0, 0.0, 0.6, None],
            vqa_correct=[1, 0, 1, None],
            vqa_rel_token_f1=[1.0, 0.0, 0.0, None],
            vqa_rel_edit_sim=[1.0, 0.0, 0.2, None],
            vqa_rel_score=[1.0, 0.0, 0.2, None],
            vqa_gt_prob=[0.8, 0.5, 0.1, None],
            vqa_gt_logprobs=[(-0.2, -3.0), (-0.7, -9.0), (-2.3, -4.0), None],
            vqa_eval_mode=["official"] * 3 + [None],
            eval_failed=[False] * 3 + [True],
            error=[None] * 3 + ["image truncated"],
            scorer="a1b2",
        )
    )
    return rows.assign(**over)

def test_columns_are_those_of_the_record():
    proposed = "question_id pointer gen_method beam_rank temperature logprob_score similarity_score kappa"
    answered = "vqa_pred_answer vqa_raw_generation vqa_correct vqa_acc_score vqa_gt_prob vqa_gt_logprobs"
    judged = "vqa_rel_token_f1 vqa_rel_edit_sim vqa_rel_score vqa_eval_mode eval_failed error scorer content"
    assert list(RECORD) == f"{proposed} {answered} {judged}".split()
    rec = as_record(tried())
    assert list(rec.columns) == list(RECORD)
    assert rec.question_id.dtype == "int64"
    assert rec.eval_failed.dtype == bool
    assert rec.vqa_correct.dtype == "float64"
    assert all(isinstance(p, tuple) and all(type(i) is int for i in p) for p in rec.pointer)

def test_empty_answer_is_not_a_missing_answer():
    rec = unpack(pack(as_record(tried())))
    assert rec.vqa_pred_answer[1] == ""
    assert pd.isna(rec.vqa_pred_answer[3])
    assert rec.vqa_gt_logprobs[3] is None

@pytest.mark.parametrize(
    "over, says",
    [
        (dict(reward=1.0), "unknown columns ['reward']"),
        (dict(pointer=["12"] * 4), "'12'"),
        (dict(pointer=[(1.5, 2)] * 4), "(1.5, 2)"),
        (dict(question_id=[7, 7, 7, None]), "missing values"),
        (dict(question_id=[7, 7, 7, 8.5]), "not integers"),
        (dict(eval_failed=[True, None, False, False]), "missing values"),
    ],
)
def test_other_kinds_are_refused(over, says):
    with pytest.raises((TypeError, ValueError)) as e: as_record(tried(**over))
    assert says in str(e.value)

def test_required_columns():
    with pytest.raises(ValueError, match="'pointer' is required"): as_record(tried().drop(columns="pointer"))

pointers = st.lists(st.lists(st.integers(0, 2**40), max_size=4).map(tuple), max_size=8)

@given(pointers, st.data())
def test_parquet_round_trip(ps, data):
    n = len(ps)
    def some(s): return data.draw(st.lists(st.none() | s, min_size=n, max_size=n))
    frame = pd.DataFrame(
        dict(
            question_id=np.arange(n),
            pointer=pd.Series(ps, dtype=object),
            error=pd.Series(some(st.text(alphabet="aé\n\"", max_size=3)), dtype=object),
            vqa_gt_prob=pd.Series(some(st.floats(0, 1)), dtype=float),
            vqa_gt_logprobs=pd.Series(some(st.lists(st.floats(-1e9, 0), max_size=3)), dtype=object),
        )
    )
    rec = as_record(frame)
    pd.testing.assert_frame_equal(unpack(pack(rec)), rec)
    m, size = pointer_matrix(ps)
    assert [tuple(r[:k].tolist()) for r, k in zip(m, size)] == ps

def test_same_set_in_another_order_is_no_duplicate():
    RLData.from_frame(tried(), POOL)
    with pytest.raises(ValueError, match=r"question_id 7: pointer \(1, 2\) occurs twice"):
        RLData.from_frame(tried(pointer=[(1, 2), (1, 2), (3,), (1, 3)]), POOL)

BAD = dict(
    no_pool=(dict(question_id=[7, 7, 7, 9]), "question_id 9: has no pool"),
    shows=(
        dict(gen_method=["beam", "zero_shot", "sample", "sample"]),
        "question_id 7: gen_method 'zero_shot' beside pointer (2, 1)",
    ),
    nothing_twice=(dict(pointer=[(), (), (3,), (1, 3)]), "question_id 7: pointer () occurs twice"),
    repeats=(dict(pointer=[(1, 2), (2, 2), (3,), (1, 3)]), "question_id 7: pointer (2, 2) repeats"),
    outside=(dict(pointer=[(1, 2), (2, 1), (3,), (1, 4)]), "question_id 8: pointer (1, 4) leaves the pool"),
    too_long=(dict(pointer=[(1, 2), (2, 1), (3,), (1, 3, 5, 6)]), "question_id 8: the pool is not larger"),
    label_on_failure=(dict(vqa_correct=[1, 0, 1, 0]), "question_id 8: eval_failed, and yet it has labels"),
    prob_on_failure=(
        dict(vqa_gt_prob=[0.8, 0.5, 0.1, 0.0]),
        "question_id 8: eval_failed, and yet it has labels",
    ),
    no_reason=(dict(error=None), "question_id 8: eval_failed without a text"),
    half=(dict(vqa_acc_score=[1.0, None, 0.6, None]), "question_id 7: vqa_acc_score missing"),
    some_prob=(
        dict(vqa_gt_prob=[0.8, None, 0.1, None], vqa_gt_logprobs=None),
        "question_id 7: vqa_gt_prob missing, though other rows have it",
    ),
    no_facts=(dict.fromkeys([*TEXT_FACTS, *PROB_FACTS]), "question_id 7: not failed, but without facts"),
    no_scorer=(dict(scorer=None), "question_id 7: facts without the fingerprint"),
    out_of_range=(
        dict(vqa_acc_score=[1.0, 0.0, 60.0, None]),
        "question_id 7: vqa_acc_score 60.0 is not within 0..1",
    ),
    method=(dict(gen_method=["beam", "random", "guess", "sample"]), "question_id 7: gen_method 'guess'"),
)

@pytest.mark.parametrize("name", BAD)
def test_validate_names_query_and_fault(name):
    over, says = BAD[name]
    with pytest.raises(ValueError) as e: RLData.from_frame(tried(**over), POOL)
    assert says in str(e.value), str(e.value)

def test_nothing_shown_is_a_row_like_any_other(tmp_path):
    methods = ["beam", "zero_shot", "random", "policy"]
    data = RLData.from_frame(tried(pointer=[(1, 2), (), (3,), ()], gen_method=methods), POOL)
    assert data.shots == (0, 1, 2)
    data.save(tmp_path/"run")
    again = RLData.load(tmp_path/"run")
    assert again.rows.pointer.tolist() == [(1, 2), (), (3,), ()]
    assert again.fingerprint == data.fingerprint
    other = RLData.from_frame(tried(pointer=[(1, 2), (2,), (3,), ()], gen_method="policy"), POOL)
    assert other.fingerprint != data.fingerprint
    assert "none" in data.group(7).frame().demonstrations.tolist()

def test_a_record_of_nothing_but_empty_pointers_is_whole(tmp_path):
    rows = tried(pointer=[(), (1,), (3,), ()]).iloc[[0, 3]].assign(gen_method="zero_shot")
    data = RLData.from_frame(rows, POOL)
    assert pointer_matrix(data.rows.pointer)[0].shape == (2, 0)
    data.save(tmp_path/"run")
    pd.testing.assert_frame_equal(RLData.load(tmp_path/"run").rows, data.rows)

def test_probability_only_rows_are_whole():
    RLData.from_frame(tried(**dict.fromkeys(TEXT_FACTS)), POOL)

def test_unknown_ids_are_named():
    items = pd.DataFrame(dict(question_id=range(1, 9), question="q", answer="a"), index=range(1, 9))
    data = RLData.from_frame(tried(), POOL)
    data.validate(items)
    with pytest.raises(ValueError, match="question_id 3 is not among the 7 items"):
        data.validate(items.drop(3))

def test_save_and_load(tmp_path):
    data = RLData.from_frame(tried(), POOL, dict(settings=dict(a=1), seed=3))
    data.save(tmp_path / "d", part_rows=3)
    back = RLData.load(tmp_path / "d")
    pd.testing.assert_frame_equal(back.rows, data.rows)
    assert back.pool == data.pool
    assert back.fingerprint == data.fingerprint
    assert back.manifest["settings"] == dict(a=1)
    assert len(back.manifest["parts"]) == 2
    assert back.manifest["counts"] == dict(
        rows=4,
        queries=2,
        failed=1,
        shots={"1": 1, "2": 3},
        methods=dict(beam=1, random=1, retrieval=1, sample=1),
    )
    less = RLData.from_frame(tried()[:2], POOL)
    less.save(tmp_path / "d")
    assert len(RLData.load(tmp_path/"d")) == 2
    assert len(list((tmp_path/"d").glob("part-*"))) == 1

def test_a_save_that_dies_leaves_the_old_content(tmp_path, monkeypatch):
    import leverplus.groups as g
    RLData.from_frame(tried(), POOL).save(tmp_path/"d")
    def die(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(g, "write_json", die)
    with pytest.raises(KeyboardInterrupt): RLData.from_frame(tried()[:2], POOL).save(tmp_path/"d")
    assert len(RLData.load(tmp_path/"d")) == 4

def test_load_errors_name_the_file(tmp_path):
    d = RLData.from_frame(tried(), POOL).save(tmp_path / "d")
    part = next(d.glob("part-*"))
    whole = part.read_bytes()
    def fails(says, kind=ValueError):
        with pytest.raises(kind) as e: RLData.load(d)
        assert says in str(e.value) and str(d) in str(e.value), str(e.value)
    part.write_bytes(whole[:200])
    fails(part.name)
    write_part(part, as_record(tried()[:2]))
    fails("manifest says 4")
    write_part(part, as_record(tried(vqa_acc_score=[1, None, 0.6, None])))
    fails(f"{part.name}: question_id 7: vqa_acc_score missing")
    part.unlink()
    fails(part.name, FileNotFoundError)
    part.write_bytes(whole)
    m = d / "manifest.json"
    text = m.read_text()
    old = read_json(m)
    m.write_text(json.dumps(old | dict(schema=99)))
    fails("schema 99")
    m.write_text(json.dumps(old | dict(complete=False)))
    fails("not finished")
    m.write_text(text[:20])
    fails("manifest.json")
    m.write_text(text)
    Pool({7: (1, 2, 3, 4), 8: (1, 3, 5, 2)}, POOL.recipe).save(d / old["pool"]["folder"])
    fails("fingerprint")
    shutil.rmtree(d / old["pool"]["folder"])
    fails("pool", FileNotFoundError)

def test_foreign_columns(tmp_path):
    import pyarrow.parquet as pq
    pq.write_table(pack(as_record(tried())).append_column("extra", [[1, 2, 3, 4]]), tmp_path/"x.parquet")
    with pytest.raises(ValueError, match="unknown \\['extra'\\]"): read_part(tmp_path/"x.parquet")
    assert len(read_part(tmp_path/"x.parquet", ignore=("extra",))) == 4

def test_parts_of_earlier_versions_have_no_kappa(tmp_path):
    import pyarrow.parquet as pq
    d = tmp_path / "d"
    rows = tried().assign(kappa=[-1.0, -np.inf, np.nan, np.nan], logprob_score=-2.0)
    RLData.from_frame(rows, POOL).save(d)
    assert RLData.load(d).rows.kappa.equals(as_record(rows).kappa)
    part = next(d.glob("part-*.parquet"))
    pq.write_table(pq.read_table(part).drop_columns(["kappa"]), part)
    old = RLData.load(d).rows
    assert list(old) == list(RECORD)
    assert old.kappa.isna().all()
    assert old.kappa.dtype == "float64"

def test_parts_of_earlier_versions_have_no_content(tmp_path):
    "Nobody knows what their facts were about: 0; a hash is kept to its last bit"
    import pyarrow.parquet as pq
    d = tmp_path / "d"
    large = [2**62 + 1, 2**53 + 1, 0, 3]
    RLData.from_frame(tried().assign(content=large), POOL).save(d)
    assert RLData.load(d).rows.content.tolist() == large
    part = next(d.glob("part-*.parquet"))
    pq.write_table(pq.read_table(part).drop_columns(["content"]), part)
    old = RLData.load(d).rows
    assert old.content.tolist() == [0]*4
    assert old.content.dtype == "int64"

def test_a_hash_that_became_a_float_is_refused():
    "A gap turns integers into floats, and 2**62 + 1 into 2**62: nobody would see it"
    known = pd.DataFrame(dict(content=[2**62 + 1]))
    joined = tried().join(known)                                  # three rows have none
    with pytest.raises(ValueError, match="'content' has missing values"): as_record(joined)
    with pytest.raises(ValueError, match="'content' holds floats above"): as_record(joined.fillna({"content": 0}))
    assert as_record(tried().assign(content=[1., 2., 3., 4.])).content.tolist() == [1, 2, 3, 4]

@pytest.mark.parametrize(
    "odd", [dict(kappa=np.inf, logprob_score=-2.0), dict(kappa=-1.0, logprob_score=np.nan)]
)
def test_a_threshold_belongs_to_a_draw(odd):
    with pytest.raises(ValueError, match="question_id 7: kappa .* belongs to a draw of known probability"):
        RLData.from_frame(tried().assign(**odd), POOL)

def test_groups_and_repr():
    data = RLData.from_frame(tried(), POOL)
    assert [(q, len(f)) for q, f in data.groups()] == [(7, 3), (8, 1)]
    assert data.shots == (1, 2)
    assert data.queries == [7, 8]
    texts = dict(question=[f"Q{i} <b>?" for i in range(9)], answer=[f"A{i}" for i in range(9)])
    items = pd.DataFrame(dict(question_id=range(9)) | texts)
    g = data.group(7, items)
    assert g.frame().gt_prob.tolist() == [0.8, 0.5, 0.1]
    assert "Q1 <b>? [A1] > 2: Q2 <b>? [A2]" in repr(g)
    assert "<b>" not in g._repr_html_()
    assert "image truncated" in repr(data.group(8))
    assert "beam: 1" in repr(data)
    assert "<table" in data._repr_html_()
    with pytest.raises(KeyError, match="question_id 99"): data.group(99)

def test_fingerprint_follows_facts_and_order():
    def f(**o): return RLData(tried(**o), POOL).fingerprint
    assert f() == f()
    assert (len(
            {
                f(),
                f(vqa_gt_prob=[0.8, 0.5, 0.2, None]),
                f(pointer=[(2, 1), (1, 2), (3,), (1, 3)]),
                f(eval_failed=[True] * 4),
            }
        )
        == 4)

def other_value(x, kind):
    "A value of the same kind that is another one"
    if kind == "str": return "other" if pd.isna(x) else f"{x} "
    if kind == "ints": return tuple(reversed(x))
    if kind == "floats": return (-.5,) if x is None else (*x, -.5)
    if kind == "bool": return not x
    return 1. if pd.isna(x) else x + 1

@pytest.mark.parametrize("column", [c for c in RECORD if c != "error"])
def test_fingerprint_follows_every_column_a_reader_may_read(column):
    "A reward, a filter or a merge may read any of them; the words of an error none does"
    data = RLData(tried(), POOL)
    before = data.fingerprint
    values = list(data.rows[column])
    values[1] = other_value(values[1], RECORD[column])
    data.rows[column] = pd.Series(values, dtype=data.rows[column].dtype)
    assert data.fingerprint != before

def test_fingerprint_of_what_is_missing_and_of_what_is_none():
    def f(rows): return RLData(rows, POOL).fingerprint
    rows = RLData(tried(), POOL).rows
    assert f(rows) == f(rows.assign(error="other words"))
    assert f(rows.assign(vqa_pred_answer="")) != f(rows.assign(vqa_pred_answer=np.nan))
    assert f(rows.assign(logprob_score=0.)) == f(rows.assign(logprob_score=-0.))
    assert f(rows.assign(vqa_gt_logprobs=[()] * 4)) != f(rows.assign(vqa_gt_logprobs=None))
    added = RLData(rows, POOL)
    added.rows = rows.assign(info_score=[.1, .2, .3, .4])   # what a reward reads though a record has no room for it
    assert added.fingerprint != f(rows)

def test_to_frame_is_a_copy():
    data = RLData(tried(), POOL)
    frame = data.to_frame()
    frame.loc[0, "vqa_acc_score"] = 9
    assert data.rows.vqa_acc_score[0] == 1
    assert set(FACT_COLUMNS) < set(data.to_frame())

# ---- shards (made by `generate`: tests/test_generate.py) ---------------------------------------------------

def shard(path, i, n, rows, pool=POOL, settings=dict(seed=0)):
    part = write_part(path / f"part{shard_tag((i, n))}-00000.parquet", as_record(rows))
    return finish_manifest(
        path,
        dict(settings=settings, shard=[i, n]),
        [dict(file=part.name, rows=len(rows))],
        rows,
        pool,
        (i, n),
    )

@given(st.integers(0, 2000), st.integers(1, 2000))
def test_shard_names_are_told_apart_and_read_back(i, k):
    import tempfile
    from pathlib import Path
    n = i + k
    assert check_shard([i, n]) == (i, n)
    with tempfile.TemporaryDirectory() as d:
        for s in ((i, n), (n - 1, n)): (Path(d)/f"manifest{shard_tag(s)}.json").touch()
        (Path(d) / "manifest.json").touch()
        assert set(shard_files(d)) == {(i, n), (n - 1, n)}

def test_a_shard_cleans_up_behind_itself_only(tmp_path):
    rec = as_record(tried())
    for name in ("part-00000.parquet", "part-000of002-00007.parquet", "part-001of002-00007.parquet"):
        write_part(tmp_path / name, rec)
    shard(tmp_path, 0, 2, rec[:3])
    assert {p.name for p in tmp_path.glob("part-*")} == {
        "part-000of002-00000.parquet",
        "part-00000.parquet",
        "part-001of002-00007.parquet",
    }
    finish_manifest(tmp_path, {}, [], rec, POOL)
    assert {p.name for p in tmp_path.glob("part-*")} == {
        "part-000of002-00000.parquet",
        "part-001of002-00007.parquet",
    }

def test_a_union_by_hand(tmp_path):
    rows = as_record(tried())
    shard(tmp_path, 1, 2, rows[:3])
    shard(tmp_path, 0, 2, rows[3:])
    data = RLData.load(tmp_path)
    want = RLData.from_frame(rows, POOL)
    pd.testing.assert_frame_equal(data.rows, want.rows)
    assert data.fingerprint == want.fingerprint
    assert data.manifest["counts"]["queries"] == 2
    assert data.manifest["scorers"] == ["a1b2"]
    back = Pool({8: POOL[8], 7: POOL[7]}, POOL.recipe)
    other = tmp_path / "other"
    shard(other, 1, 2, rows[:3], back)
    shard(other, 0, 2, rows[3:], back)
    assert RLData.load(other).rows.question_id.tolist() == [8, 7, 7, 7] # the order of the pool's queries
    assert RLData.load(tmp_path, shard=(0, 2)).queries == [8]
    whole = data.save(tmp_path / "whole")
    assert sorted(p.name for p in whole.glob("manifest*")) == ["manifest.json"]

def test_many_shards_write_one_pool(tmp_path):
    from concurrent.futures import ThreadPoolExecutor
    rows = as_record(tried())[:0]
    with ThreadPoolExecutor(8) as ex: list(ex.map(lambda i: shard(tmp_path, i, 40, rows), range(40)))
    assert [p.name for p in tmp_path.glob("pool-*")] == [f"pool-{POOL.fingerprint}"]
    assert Pool.load(tmp_path / f"pool-{POOL.fingerprint}") == POOL
    assert not list(tmp_path.glob(".pool-*"))

def test_differing_names_both_sides():
    assert differing(dict(a=1, b=2), dict(b=3, c=None)) == "a: there 1, here None; b: there 2, here 3"
    assert differing(dict(a=[1]), dict(a=[1])) == ""
