"End to end on the embedded world: the demo's files, its rows, and that a second run changes nothing"
import pandas as pd, pytest
from leverplus.core import read_json
from leverplus.demo import demo_text, run_demo
from leverplus.groups import RLData
from leverplus.learner import load_selector
from leverplus.world import all_pointers, world

SMALL = dict(
    train_queries=24,
    dev_queries=16,
    fixed=2,
    cases=4,
    table_shots=(2,),
    recipes=dict(
        sft=dict(sft=dict(n_epoch=1)), ours=dict(warmup=dict(n_epoch=1, steps=14), listwise=dict(n_epoch=1))
    ),
    free=dict(warmup=dict(n_epoch=1, steps=14), listwise=dict(n_epoch=1)),
)

@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")/"demo"
    return path, run_demo(path, progress=False, **SMALL)

def test_files_and_rows(demo):
    path, table = demo
    for name in ("results.csv", "settings.json", "history.csv", "curves.png", "examples.png", "report.html"):
        assert (path / name).stat().st_size > 0, name
    on_disk = pd.read_csv(path/"results.csv")
    assert list(on_disk) == ["selector", "shots", "n", "acc", "lo", "hi", "gap_closed", "changed"]
    assert {
        "zero_shot", "random", "similar_image", "similar_text", "similar_mixed", "similar_mixed_first", "mmr",
        "vote", "majority_vote",
        "fixed", "sft", "ours", "ours_free", "oracle", "oracle_free"
    } == set(on_disk.selector)
    assert set(on_disk.shots) == {0, 2} and (on_disk.n == 1000).all()
    assert (
        (on_disk.lo <= on_disk.acc) & (on_disk.acc <= on_disk.hi) & (on_disk.lo >= 0) & (on_disk.hi <= 1)
    ).all()
    two = on_disk[on_disk.shots == 2].set_index("selector")
    assert two.gap_closed["oracle"] == 1 and two.gap_closed["random"] == 0 and two.acc.idxmax() == "oracle_free"
    assert two.acc["oracle_free"] >= max(two.acc["oracle"], on_disk.acc[on_disk.selector == "zero_shot"].item())

def test_a_free_number_of_demonstrations_has_its_table(demo):
    "Never, always and as many as it likes, with tokens; what was chosen adds up to all questions; the page tells it"
    path, table = demo
    counts = pd.read_csv(path/"counts.csv").set_index("selector")
    assert set(counts.index) == {"zero_shot", "random", "ours", "ours_free", "oracle_free"}
    assert counts.verdict.notna()["ours_free"]
    assert counts.cost["zero_shot"] < counts.cost["ours"] # tokens
    assert (counts.acc_per_cost - counts.acc/counts.cost*1000).abs().max() < 1e-9
    picks = pd.read_parquet(path/"predictions.parquet")
    shown = picks[picks.selector == "ours_free"].pointer.map(len)
    assert len(shown) == 1000 and set(shown) <= {0, 1, 2}
    told = demo_text(path, table)
    assert "how many demonstrations" in told and "ours_free" in told
    page = (path/"report.html").read_text()
    assert "How many demonstrations" in page and "the better of always and never" in page
    train = RLData.load(path/"groups-free"/"train")
    assert set(train.rows.pointer.map(len)) == {0, 1} and len(train) == 24*(1 + 3 + 4)

def test_run_explains_itself(demo):
    path, table = demo
    settings = read_json(path / "settings.json")
    assert settings["settings"]["train_queries"] == 24
    assert settings["fingerprints"]["lvlm"]
    assert settings["finished"]
    assert load_selector(path / "checkpoint").info["pool"]["K"] == 16
    assert load_selector(path / "checkpoint").info["recipe"] == "ours"
    says = load_selector(path).passport
    mine = table[table.selector == "ours"].set_index("shots")
    known = says["metrics"]["accuracy, 2 shown"]
    assert (known["value"], known["low"], known["high"]) == tuple(mine.loc[2, ["acc", "lo", "hi"]])
    assert says["metrics"]["regret"]["n"] == len(RLData.load(path/"groups"/"dev").queries)
    assert says["lvlm"] == "tiny-qwen2.5-vl" and says["lvlm_fingerprint"] and says["dtype"] == "float32"
    assert len(read_json(path/"looks.json")) == 1

def test_second_run_changes_nothing(demo):
    path, table = demo
    pd.testing.assert_frame_equal(run_demo(path, progress=False, **SMALL), table)

def test_other_settings_are_refused(demo):
    with pytest.raises(ValueError, match="best 'theirs' is not among"):
        run_demo(demo[0], progress=False, **SMALL, best="theirs")
    with pytest.raises(ValueError, match="train_queries"):
        run_demo(demo[0], progress=False, **SMALL | dict(train_queries=25))

def test_stored_facts_are_what_the_model_says():
    "A sample of the exhaustive facts, asked again"
    from leverplus.rldata_ask import FactCache, ask
    w = world("islands")
    facts = w.facts()
    sample = facts.sample(64, random_state=0)
    assert len(facts) == len(all_pointers(w.pools["test"]))
    again = ask(sample[["question_id", "pointer"]], w.scorer, w.items, FactCache())
    assert again.vqa_pred_answer.tolist() == sample.vqa_pred_answer.tolist()
    assert (again.vqa_gt_prob.to_numpy() - sample.vqa_gt_prob.to_numpy()).__abs__().max() < 1e-4
