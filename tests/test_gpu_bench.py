"""The GPU bench, on a CPU: the whole of it runs on the embedded model, with no more packages than it promises,
and says so when something is wrong
"""
import gc, importlib.util, json, os, subprocess, sys
from pathlib import Path
import pytest, torch

ROOT = Path(__file__).resolve().parent.parent
# what a GPU machine may lack
BLOCKED = "fastai", "fastcore", "pandas", "pyarrow", "matplotlib", "nbdev", "qwen_vl_utils"

@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("gpu_scoring", ROOT / "bench" / "gpu_scoring.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    gc.collect()
    # the bench collects garbage before each row: what other tests left in this process is none of its
    # business
    gc.freeze()
    yield module
    gc.unfreeze()

@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The bench in a process of its own, from another folder, without the blocked packages: (what it saved,
    what it printed)
    """
    d = tmp_path_factory.mktemp("bench")
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({BLOCKED!r})); sys.argv = ['gpu_scoring.py',"
        f" '--tiny', '--out', 'gpu.json']; runpy.run_path({str(ROOT/'bench'/'gpu_scoring.py')!r},"
        " run_name='__main__')"
    )
    r = subprocess.run(
        [sys.executable, "-c", code],
        cwd=d,
        capture_output=True,
        text=True,
        timeout=300,
        env=dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
    )
    assert r.returncode == 0, r.stdout + r.stderr
    return json.loads((d/"gpu.json").read_text()), r.stdout

def test_every_row_is_there(table):
    data, printed = table
    ways = [r["way"] for r in data["rows"]]
    for part in (
        "naive, one row",
        "naive, 8 rows",
        "images once per prompt",
        "batches of 256",
        "batches of 1024",
        "lengths mixed",
        "(global), cold",
        "(global), warm",
        "two demonstrations",
        "222 tokens, mask",
        "222 tokens, no mask",
        "loop over windows",
        "grouped windows",
    ):
        assert sum(part in w for w in ways) == 1, (part, ways)
    assert all(w in printed for w in ways)
    assert data["failed"] == []
    assert not any("FAILED" in n or "not run" in n for n in data["notes"])
    assert any("qwen_vl_utils is absent" in n for n in data["notes"])
    assert data["about"]["size"] == "tiny"

def test_numbers_hang_together(table):
    rows = {r["way"].strip(): r for r in table[0]["rows"]}
    matmul = table[0]["about"]["matmul"]
    naive = rows["naive, one row at a time"]["per_second"]
    for w, r in rows.items():
        assert min(r["per_second"], r["flops"], r["rate"]) > 0
        assert r["spread"] >= 1
        assert r["mfu"] is None
        assert r["of_matmul"] == pytest.approx(r["rate"] / matmul)
        assert r["rate"] == pytest.approx(r["flops"] * r["per_second"])
        assert r["ratio"] is None if "alone" in w else r["ratio"] == pytest.approx(r["per_second"]/naive)
    flops = lambda part: next(r["flops"] for w, r in rows.items() if part in w)
    order = [
        flops(p)
        for p in (
            "one row",
            "needed logits",
            "images once",
            "batches of 1024",
            "(global), cold",
            "(global), warm",
            "two demonstrations",
        )
    ]
    assert order == sorted(order, reverse=True)
    assert order[0] > 8*order[3]
    known = [
        next(r["known_tokens"] for w, r in rows.items() if p in w)
        for p in ("batches of 1024", "(global), cold", "(global), warm", "two demonstrations")
    ]
    assert known[0] == 0
    assert known == sorted(known)
    assert .3 < known[2] < .5 < known[3]

def test_agreement_is_reported_for_every_way(table):
    "Every whole way but the first is held against the first"
    whole = [r for r in table[0]["rows"] if "alone" not in r["way"]]
    assert sum(n.startswith("against naive") for n in table[0]["notes"]) == len(whole) - 1 == 8

def quick(*more):
    return [
        "--tiny",
        "--prompts",
        "2",
        "--naive",
        "2",
        "--cold",
        "2",
        "--images",
        "2",
        "--batch-tokens",
        "512",
        *more,
    ]

def test_a_wrong_scorer_is_noticed(bench, tmp_path, monkeypatch, capsys):
    "Answers read one prompt off: every shared row fails its check, the others stand, and the run says so"
    class Wrong(bench.SharedScorer):
        def run(self, prompts, targets):
            r = super().run(prompts, targets)
            return r[1:] + r[:1]
    monkeypatch.setattr(bench, "SharedScorer", Wrong)
    assert bench.main(quick("--out", str(tmp_path/"o.json"))) == 1
    data = json.loads((tmp_path/"o.json").read_text())
    assert len(data["failed"]) == 6
    assert all("|d log P|" in f["error"] for f in data["failed"])
    assert "FAILED" in capsys.readouterr().out
    assert {"naive, one row at a time", "vision alone, 2 images, grouped windows"} <= {
        r["way"] for r in data["rows"]
    }

def test_a_failing_part_leaves_the_others(bench, tmp_path, monkeypatch):
    "Out of memory in the naive rows: nothing to compare with, but the rest is measured"
    def no_room(*_): raise torch.OutOfMemoryError("CUDA out of memory (injected)")
    monkeypatch.setattr(bench.Naive, "logprobs", no_room)
    assert bench.main(quick("--out", str(tmp_path/"o.json"))) == 1
    data = json.loads((tmp_path/"o.json").read_text())
    assert [f["way"] for f in data["failed"]] == [
        "naive, one row at a time",
        "naive, 8 rows at a time, needed logits",
    ]
    assert "injected" in data["failed"][0]["error"]
    assert len(data["rows"]) == 10
    assert all(r["ratio"] is None for r in data["rows"])

def test_failed_prompts_are_no_fast_prompts(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(
        bench.vision, "open_resized", lambda *a, **k: (_ for _ in ()).throw(OSError("no such picture"))
    )
    assert bench.main(quick("--out", str(tmp_path/"o.json"))) == 1
    data = json.loads((tmp_path/"o.json").read_text())
    assert not any("shared" in r["way"] or "known" in r["way"] for r in data["rows"])
    assert any("no such picture" in f["error"] for f in data["failed"])

def test_when_time_is_up_what_is_there_stays(bench, tmp_path):
    assert bench.main(quick("--minutes", "0", "--out", str(tmp_path/"o.json"))) == 0
    data = json.loads((tmp_path/"o.json").read_text())
    assert data["rows"] == []
    assert sum("time was up" in n for n in data["notes"]) == 5
    assert not list(tmp_path.glob("*.tmp"))

def test_full_size_model_is_built_sound(bench, monkeypatch):
    """The 3B recipe at two narrow layers: bfloat16 weights, float32 rotations, tied head, activations of order
    1, and the likeliest token in the tokenizer
    """
    from leverplus import cost
    monkeypatch.setitem(
        cost.QWEN_SIZES,
        "3b",
        dict(
            cost.QWEN_SIZES["3b"],
            text=dict(
                cost.QWEN_SIZES["3b"]["text"],
                hidden_size=256,
                intermediate_size=512,
                num_attention_heads=2,
                num_key_value_heads=1,
                vocab_size=2048,
            ),
        ),
    )
    monkeypatch.setattr(
        cost,
        "_VISION",
        dict(
            cost._VISION,
            depth=2,
            hidden_size=64,
            intermediate_size=128,
            num_heads=4,
            fullatt_block_indexes=[1],
        ),
    )
    lv = bench.build("3b", torch.device("cpu"), layers=2)
    m = lv.model
    assert {p.dtype for p in m.parameters()} == {torch.bfloat16}
    rotations = m.model.language_model.rotary_emb, m.model.visual.rotary_pos_emb
    assert {r.inv_freq.dtype for r in rotations} == {torch.float32}
    assert m.lm_head.weight is m.model.language_model.embed_tokens.weight
    assert m.config.text_config.num_hidden_layers == 2
    assert lv.image_id == lv.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    with torch.no_grad():
        h = m.model.language_model(input_ids=torch.randint(0, 400, (2, 50))).last_hidden_state
        logits = m.lm_head(h).float()
    assert logits.isfinite().all()
    assert 1 < logits[..., : len(lv.tokenizer)].std() < 10
    assert (logits.argmax(-1) < len(lv.tokenizer)).all()
