"Sweeps: every combination once, whatever dies on the way; and tables that claim no more than seeds and questions show"
import copy, itertools, json, math
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from leverplus.core import fingerprint
from leverplus.groups import OtherContents, RLData
from leverplus.runs import Busy
from leverplus.rldata_generate import generate, run_lock
from leverplus.rldata_ask import FactCache, facts_fingerprint
from leverplus.runs import plain
from leverplus.statistics import Bootstrap
from leverplus.settings import Asking, Guarding, Proposing
from leverplus.sweep import (
    FIXED, GRIDS, append_row, cell_id, data_fingerprint, expand_grid, plot_sweep, read_rows, sweep,
    sweep_scores, sweep_table, sweep_text,
)
from test_loops import Scripted, make_world

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "(world, groups) of 10 questions each"
    w = make_world()
    d = tmp_path_factory.mktemp("groups")
    kw = dict(proposing=Proposing(counts=dict(beam=2, random=3)), guarding=Guarding(test=0), progress=False)
    return w, {
        s: generate(
            d / s, list(w.pools[s])[:10], w.items, w.pools[s].only(list(w.pools[s])[:10]), w.scorer, w.store,
            **kw
        )
        for s in ("train", "dev")
    }

BASE = {"model.d_hidden": 8, "bs": 10, "rce.n_epoch": 1, "rce.watch": None, "rce.lr": 1e-2}
GRID = {"reward": ["hard_only", "gtprob"], "rce.norm": ["raw", "zscore"]}
same = lambda a, b: pd.testing.assert_frame_equal(a.drop(columns="seconds"), b.drop(columns="seconds"))

# ---- grids -------------------------------------------------------------------------------------------------

VALUES = {
    "objective": ["rce", "sft", "listwise", ("rce", "grpo")],
    "reward": ["hard_only", "legacy", "gtprob", ("hybrid", dict(alpha=0.3))],
    "reward.hard_weight": [1.0, 2.0], "rce.norm": ["raw", "zscore"], "grpo.baseline": ["rank", "zscore"],
    "kind": ["mixed", "text"], "model.d_hidden": [8, 16]
}

@settings(max_examples=40)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            k: st.lists(st.sampled_from(v), min_size=1, max_size=3, unique_by=str) for k, v in VALUES.items()
        },
    )
)
def test_a_grid_holds_every_combination_that_differs_once(grid):
    try: got = expand_grid(grid)
    except ValueError as e: # only because a name is idle in every combination
        idle = [k for k in grid if "." in k and f"'{k}'" in str(e)]
        assert idle
        grid = {k: v for k, v in grid.items() if k not in idle}
        got = expand_grid(grid)
    keys = [json.dumps(plain(c), sort_keys=True) for c in got]
    assert len(set(keys)) == len(keys) <= math.prod(map(len, grid.values()))
    first = FIXED | {k: v[0] for k, v in grid.items()}
    assert all(first[k] == v for k, v in got[0].items())
    # every combination is there, short of what it does not use
    for values in itertools.product(*grid.values()):
        full = FIXED | dict(zip(grid, values))
        assert sum(all(full[k] == v for k, v in c.items()) and set(FIXED) <= set(c) for c in got) >= 1
    for c in got:
        assert ("rce.norm" not in c) or "rce" in c["objective"]
        assert ("grpo.baseline" not in c) or "grpo" in c["objective"]

@pytest.mark.parametrize(
    "grid, base, what",
    [
        ({"rce.nrom": ["raw"]}, {}, "rce.nrom"), ({"objective": ["rec"]}, {}, "fit_rec"),
        ({"rce.norm": "raw"}, {}, "wanted a list"), ({"kind": ["text"]}, {"kind": "image"}, "grid and base"),
        ({"reward": ["hard_onyl"]}, {}, "hard_onyl"), ({"rce.resume": ["x"]}, {}, "rce.resume"),
        ({"grpo.baseline": ["rank"]}, {}, "grpo.baseline"), ({"kind": []}, {}, "wanted a list")
    ],
)
def test_wrong_grids_are_refused_before_anything_is_trained(grid, base, what):
    with pytest.raises(ValueError, match=what): expand_grid(grid, base)

@pytest.mark.parametrize("name", ["grpo.clip_low", "grpo.refresh", "grpo.baseline", "grpo.min_live", "grpo.beta"])
def test_all_arguments_of_an_objective_can_be_tried(name):
    values = [.1, .2] if name == "grpo.min_live" else [1, 2]
    assert len(expand_grid({"objective": [("rce", "grpo")], name: values})) == 2

@pytest.mark.parametrize(
    "grid, what", [
        ({"rce.lr": [1e-3, -.1]}, "grid, rce: lr -0.1: wanted"),
        ({"rce.temp": [math.nan]}, "grid 'rce.temp': nan: wanted finite"),
        ({"rce.n_epoch": [2, -1]}, "grid, rce: n_epoch -1: wanted"),
        ({"objective": [("rce", "grpo")], "grpo.min_live": [2]}, "grid, grpo: min_live 2: wanted"),
        ({"bs": [32, 0]}, "grid: bs 0: wanted"), ({"model.dropout": [2]}, "grid, model: dropout 2: wanted"),
        ({"reward.hard_weight": [math.nan]}, "grid 'reward.hard_weight': nan: wanted finite"),
        ({"lvlm.min_pixels": [-1]}, "grid, lvlm: min_pixels -1: wanted"),
    ],
)
def test_numbers_of_a_grid_are_refused_before_anything_is_trained(grid, what):
    with pytest.raises(ValueError, match=what): expand_grid(grid)

def test_the_reports_grids_can_be_read():
    assert [len(expand_grid(g)) for g in GRIDS.values()] == [34, 4, 2, 4]

# ---- the file ----------------------------------------------------------------------------------------------

@settings(max_examples=15)
@given(
    st.lists(
        st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.none(), max_size=2), min_size=1,
        max_size=4
    ),
    st.integers(0, 60),
)
def test_a_line_is_there_or_not(tmp_path_factory, rows, cut):
    f = tmp_path_factory.mktemp("rows")/"cells.jsonl"
    for r in rows: append_row(f, r)
    assert read_rows(f) == rows
    whole = f.read_bytes()
    last = json.dumps(rows[-1], ensure_ascii=False).encode() + b"\n"
    cut = cut % len(last)
    # killed in the middle of the last line
    f.write_bytes(whole[: len(whole) - len(last) + cut])
    assert read_rows(f) == rows[:-1]
    append_row(f, rows[-1])
    assert f.read_bytes() == whole
    f.write_bytes(b'{"a"\n' + whole)
    with pytest.raises(ValueError, match="line 1"): read_rows(f)

# ---- cells -------------------------------------------------------------------------------------------------

CALLS = []
def counted(learn, lr=1e-2, spoil=False):
    CALLS.append(lr)
    if spoil: raise RuntimeError("spoilt")
    return learn.fit_rce(1, lr, watch=None)
STAGES = {"mine": counted}
MINE = {"objective": "mine", "model.d_hidden": 8, "bs": 10}

def test_same_settings_same_rows_and_a_changed_grid_reuses_what_is_there(data, tmp_path):
    w, groups = data
    CALLS.clear()
    a = sweep(tmp_path / "a", {"mine.lr": [1e-2, 3e-2]}, groups, w, range(2), MINE, STAGES)
    assert len(CALLS) == 4 and (a.status == "done").all() and a.cell.is_unique
    same(sweep(tmp_path / "a", {"mine.lr": [1e-2, 3e-2]}, groups, w, range(2), MINE, STAGES), a)
    assert len(CALLS) == 4
    # only 3e-2, hard_plus_soft, seed 1 was there
    b = sweep(
        tmp_path / "a", {"mine.lr": [3e-2, 5e-2], "reward": ["hard_plus_soft", "gtprob"]}, groups, w, [1],
        MINE, STAGES
    )
    assert len(CALLS) == 4 + 3
    shared = b[(b["mine.lr"] == 3e-2) & (b.reward == "hard_plus_soft") & (b.seed == 1)]
    assert set(shared.cell) <= set(a.cell)
    # another folder: trained anew, and the same
    CALLS.clear()
    same(
        sweep(tmp_path / "b", {"mine.lr": [1e-2, 3e-2]}, groups, w, [0], MINE, STAGES),
        a[a.seed == 0].reset_index(drop=True),
    )
    assert len(CALLS) == 2
    def other(learn, lr=1e-2, spoil=False): return learn.fit_rce(2, lr, watch=None)
    # other code, other cells
    assert not set(
        sweep(tmp_path / "a", {"mine.lr": [1e-2]}, groups, w, [0], MINE, {"mine": other}).cell
    ) & set(a.cell)
    less = groups | dict(train=RLData(groups["train"].rows[:-1], groups["train"].pool))
    assert data_fingerprint(less, w) != data_fingerprint(groups, w)
    q = groups["dev"].queries[0]
    said = copy.copy(w)
    said.items = w.items.assign(question=w.items.question.where(w.items.index != q, "something else?"))
    assert data_fingerprint(groups, said) != data_fingerprint(groups, w)
    ids = [cell_id(dict(FIXED, **MINE), s, d) for s in (0, 1) for d in "xy"]
    assert len(set(ids)) == 4

def test_numbers_are_those_of_the_facts_and_no_test_question_is_asked(data, tmp_path):
    w, groups = data
    s = Scripted()
    w = make_world(s)
    frame = sweep(tmp_path / "s", GRID, groups, w, [0], BASE)
    scored = sweep_scores(tmp_path / "s", frame.cell)
    assert frame.set_index("cell").acc.to_dict() == pytest.approx(
        scored.groupby("selector").vqa_acc_score.mean().to_dict()
    )
    assert set(scored.question_id) == set(groups["dev"].queries)
    # facts are shared among cells
    assert len(s.asked) == len(set(s.asked)) and {q for q, _ in s.asked} <= set(groups["dev"].queries)
    for r in scored.sample(5, random_state=0).itertuples():
        assert s.inner.fingerprint
        assert set(r.pointer) <= set(groups["dev"].pool[r.question_id])
        assert len(r.pointer) == 2

def test_facts_are_asked_in_the_style_that_was_asked_for(data, tmp_path):
    w, groups = data
    s = make_world(Scripted())
    cells = {
        style: sweep(
            tmp_path / "s", {"mine.lr": [1e-2]}, groups, s, [0], MINE, STAGES, asking=Asking(style=style),
        ).cell[0]
        for style in ("interleaved", "chat")
    }
    assert cells["interleaved"] != cells["chat"]
    assert set(FactCache(tmp_path / "s" / "facts").scorers) == {
        facts_fingerprint(s.scorer, Asking(style=style)) for style in cells
    }

def test_cells_judged_on_other_pictures_do_not_stand_beside_new_ones(data, tmp_path):
    _, groups = data
    groups = {k: RLData(d.rows.assign(content=0), d.pool) for k, d in groups.items()} # nobody knows of which pictures
    w = make_world()
    paths = [tmp_path/name for name in w.items.image_path]
    for p in paths: p.write_bytes(p.name.encode())
    w.items = w.items.assign(image_path=list(map(str, paths)))
    def go(**kw): return sweep(tmp_path/"s", {"mine.lr": [1e-2]}, groups, w, [0], MINE, STAGES, **kw)
    go()
    one = groups["dev"].queries[0]
    (tmp_path/f"{one//100}.png").write_bytes(b"another picture")
    for shard in (None, (0, 2)):
        with pytest.raises(OtherContents, match=f"the pictures of question_id {one} "): go(shard=shard)
    (tmp_path/f"{one//100}.png").write_bytes(f"{one//100}.png".encode())
    assert (go().status == "done").all()

def test_a_failed_cell_is_recorded_and_tried_again_and_a_kill_costs_one_cell(data, tmp_path, monkeypatch):
    w, groups = data
    CALLS.clear()
    grid = {"mine.spoil": [False, True], "mine.lr": [1e-2, 2e-2]}
    f = sweep(tmp_path / "s", grid, groups, w, [0], MINE, STAGES)
    bad = f[f["mine.spoil"] == True]
    assert (bad.status == "failed").all()
    assert bad.error.str.contains("RuntimeError: .*spoilt").all()
    assert bad.acc.isna().all()
    assert (f.status[f["mine.spoil"] == False] == "done").all()
    assert all(
        "counted" in r["traceback"]
        for r in read_rows(tmp_path / "s" / "cells.jsonl")
        if r["status"] == "failed"
    )
    t = sweep_table(f, "mine.spoil")
    assert t.verdict.tolist() == ["default", "failed"]
    assert t.failed.tolist() == [0, 2]
    assert "2 cells failed" in sweep_text(t)
    plot_sweep(f, "mine.spoil")
    # the failed ones, again
    CALLS.clear()
    sweep(tmp_path / "s", grid, groups, w, [0], MINE, STAGES)
    assert len(CALLS) == 2
    import leverplus.sweep as module
    # an interrupt is no failure of a cell
    monkeypatch.setattr(module, "train_cell", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): sweep(tmp_path/"t", GRID, groups, w, [0], BASE)
    monkeypatch.undo()
    assert not read_rows(tmp_path / "t" / "cells.jsonl")
    n = [0]
    real = module.run_cell
    def dies(*a):
        n[0] += 1
        if n[0] == 3: raise KeyboardInterrupt
        return real(*a)
    monkeypatch.setattr(module, "run_cell", dies)
    with pytest.raises(KeyboardInterrupt): sweep(tmp_path/"t", GRID, groups, w, [0], BASE)
    with open(tmp_path/"t"/"cells.jsonl", "ab") as file: file.write(b'{"cell": "half')
    monkeypatch.undo()
    whole = sweep(tmp_path / "u", GRID, groups, w, [0], BASE)
    n = len(read_rows(tmp_path / "t" / "cells.jsonl"))
    assert n == 2
    same(sweep(tmp_path / "t", GRID, groups, w, [0], BASE), whole)
    assert len(read_rows(tmp_path / "t" / "cells.jsonl")) == 4

def test_shards_do_their_part_and_find_each_others_cells(data, tmp_path):
    w, groups = data
    whole = sweep(tmp_path / "one", GRID, groups, w, [0], BASE)
    parts = [sweep(tmp_path / "two", GRID, groups, w, [0], BASE, shard=(i, 2)) for i in range(2)]
    mine = [set(r["cell"] for r in read_rows(tmp_path / "two" / f"cells-00{i}of002.jsonl")) for i in range(2)]
    assert not mine[0] & mine[1]
    assert mine[0] | mine[1] == set(whole.cell)
    assert set(parts[0].status[~parts[0].cell.isin(mine[0])]) <= {"not run"}
    same(parts[1], whole)
    same(sweep(tmp_path / "two", GRID, groups, w, [0], BASE), whole)
    assert not (tmp_path / "two" / "cells.jsonl").exists()
    with run_lock(tmp_path/"two"), pytest.raises(Busy): sweep(tmp_path/"two", GRID, groups, w, [0], BASE)

def test_info_score_and_stages_in_turn(data, tmp_path):
    w, groups = data
    f = sweep(
        tmp_path / "s",
        {"reward": ["hard_plus_soft", ("hybrid", dict(alpha=0.5))], "objective": [("rce", "grpo")]}, groups,
        w, [0], BASE | {"grpo.n_epoch": 1, "grpo.watch": None, "grpo.min_live": 0.0}
    )
    assert (f.status == "done").all(), f.error.tolist()
    assert f.reward.tolist() == ["hard_plus_soft", "hybrid(alpha=0.5)"]
    assert f.objective.tolist() == ["rce+grpo"] * 2
    assert (f.epochs == 2).all()

# ---- tables ------------------------------------------------------------------------------------------------

def planted(effect, seeds=5, n=120, cells=2, g=np.random.default_rng(0)):
    "(frame, scored) of a default and `cells - 1` others that gain `effect` on it"
    easy = g.random(n)
    rows = []
    out = []
    for c, s in itertools.product(range(cells), range(seeds)):
        acc = (easy + effect * (c > 0) + g.normal(0, 0.15, n) > 0.5) * 1.0
        cell = f"{c}-{s}"
        rows.append(dict(config=str(c), x=c, seed=s, status="done", acc=acc.mean(), error="", cell=cell))
        out.append(
            pd.DataFrame(
                dict(
                    selector=cell, shots=2, draw=s, question_id=range(n), pointer=[(1, 2)] * n,
                    vqa_acc_score=acc, vqa_gt_prob=acc, vqa_pred_answer="x", eval_failed=False
                )
            )
        )
    return pd.DataFrame(rows), pd.concat(out, ignore_index=True)

def test_no_effect_is_not_called_one_and_a_planted_one_is_found():
    worlds = [planted(0.0) for _ in range(50)]
    said = [sweep_table(f, "x", scored=s, bootstrap=Bootstrap(400)).verdict for f, s in worlds]
    assert np.mean([v[1] == "no difference shown" for v in said]) >= 0.94
    worlds = planted(0.3), planted(-0.3)
    up, down = (sweep_table(f, "x", scored=s, bootstrap=Bootstrap(1000)) for f, s in worlds)
    assert up.verdict[1] == "better" and down.verdict[1] == "worse"
    f, s = planted(0.3, cells=3)
    t = sweep_table(f, "x", scored=s, bootstrap=Bootstrap(1000))
    assert (t.p_holm[1:] <= 0.05).all() and "2 of 2 rows differ" in sweep_text(t)
    assert t.acc.tolist() == pytest.approx(f.groupby("x").acc.mean().tolist())
    assert t.sd_seeds.tolist() == pytest.approx(f.groupby("x").acc.std().tolist())
    assert t.delta[1:].tolist() == pytest.approx((t.acc[1:] - t.acc[0]).tolist())
    assert ((t.lo <= t.acc) & (t.acc <= t.hi)).all()
    other = sweep_table(f, "x", dict(x=2), s, bootstrap=Bootstrap(1000))
    assert other.verdict[2] == "default" and other.delta[0] == pytest.approx(-t.delta[2])

def test_one_seed_has_no_verdict_and_only_common_seeds_are_compared():
    f, s = planted(0.3, seeds=1)
    t = sweep_table(f, "x", scored=s, bootstrap=Bootstrap(500))
    assert t.verdict[1] == "no verdict: one seed" and "1 seed" in sweep_text(t)
    f, s = planted(0.3, seeds=4)
    f.loc[(f.x == 1) & (f.seed == 0), ["status", "acc"]] = "failed", np.nan
    s = s[s.selector.isin(f.cell[f.status == "done"])]
    t = sweep_table(f, "x", scored=s, bootstrap=Bootstrap(500))
    assert t.seeds.tolist() == [4, 3] and t.failed.tolist() == [0, 1]
    wide = f[f.seed > 0].groupby("x").acc.mean()
    assert t.delta[1] == pytest.approx(wide[1] - wide[0])

def test_other_settings_are_averaged_within_a_seed():
    f, s = planted(0.0, cells=4)
    f["y"] = f.x % 2
    f["x"] = f.x // 2
    t = sweep_table(f, "x", scored=s, bootstrap=Bootstrap(500))
    assert t.configs.tolist() == [2, 2] and t.seeds.tolist() == [5, 5]
    assert t.acc.tolist() == pytest.approx(f.groupby("x").acc.mean().tolist())
    assert t.sd_seeds.tolist() == pytest.approx(
        f.groupby(["x", "seed"]).acc.mean().groupby("x").std().tolist()
    )
    assert len(sweep_table(f, ["x", "y"], scored=s, bootstrap=Bootstrap(500))) == 4
    with pytest.raises(ValueError, match="scored=sweep_scores"): sweep_table(f, "x")
    with pytest.raises(ValueError, match="wanted columns"): sweep_table(f, "z", scored=s)
    with pytest.raises(ValueError, match="no cells of the default"): sweep_table(f, "x", dict(x=9), s)

# ---- image budgets -----------------------------------------------------------------------------------------

def test_picks_are_asked_at_each_image_budget(tmp_path):
    "Selectors are the same, facts are those of the budget, and stored groups keep theirs"
    from leverplus.lvlm import NaiveScorer, with_pixels
    from leverplus.rldata_ask import ask
    from leverplus.world import world
    islands = world("islands")
    few = {s: islands.items.index[islands.items.split == s][:6].tolist() for s in ("train", "dev")}
    how = dict(proposing=Proposing(counts=dict(beam=2, random=3)), guarding=Guarding(test=0), progress=False)
    groups = {
        s: generate(tmp_path/s, q, islands.items, islands.pools[s].only(q), islands.scorer, islands.store, **how)
        for s, q in few.items()
    }
    grid = {"lvlm.max_pixels": [50176, 784]}
    base = {"lvlm.min_pixels": 784, "model.d_hidden": 8, "bs": 6, "rce.n_epoch": 1, "rce.watch": None}
    cells = sweep(tmp_path/"sweep", grid, groups, islands, [0], base)
    assert cells.status.tolist() == ["done"]*2 and cells["lvlm.max_pixels"].tolist() == [50176, 784]
    usual, small = read_rows(tmp_path/"sweep"/"cells.jsonl")
    assert usual["regret"] == small["regret"] # on stored groups
    assert usual["scored"]["pointer"] == small["scored"]["pointer"]
    assert usual["scored"]["vqa_gt_prob"] != small["scored"]["vqa_gt_prob"]
    pairs = pd.DataFrame(dict(
        question_id=small["scored"]["question_id"], pointer=[tuple(p) for p in small["scored"]["pointer"]],
    ))
    tiny = NaiveScorer(with_pixels(islands.scorer.lvlm, 784, 784))
    facts = ask(pairs, tiny, islands.items, FactCache())
    np.testing.assert_allclose(facts.vqa_gt_prob, small["scored"]["vqa_gt_prob"], atol=1e-5)

def test_an_image_budget_wants_a_model(data, tmp_path):
    w, groups = data
    with pytest.raises(ValueError, match="lvlm.max_pixels: wanted a world with a vision-language model"):
        sweep(tmp_path/"sweep", {"lvlm.max_pixels": [784]}, groups, w, [0], BASE)
    assert not (tmp_path/"sweep").exists()
    with pytest.raises(ValueError, match="lvlm.pixels.*lvlm.max_pixels"): expand_grid({"lvlm.pixels": [784]})

