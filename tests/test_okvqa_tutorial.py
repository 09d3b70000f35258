"""The steps of the OKVQA tutorial on OKVQA's own questions and answers, with small made-up pictures and the
tiny models; and the numbers of OKVQA that the page names
"""
import ast, json
from types import SimpleNamespace
import numpy as np, pytest
from PIL import Image
from leverplus.core import repo_path
from leverplus.data import check_splits, read_soft_labels
from leverplus.infer import check_results

STEPS = "read embed draw load count tell look_at enrich train_both choose_on_dev answer compare page".split()

def is_step_or_setting(n):
    "Is a statement an import, a function, or one of the two worlds' settings?"
    if isinstance(n, ast.Assign): return ast.unparse(n.targets[0]) in ("islands", "okvqa")
    return isinstance(n, (ast.Import, ast.ImportFrom, ast.FunctionDef))

def tutorial():
    "Imports, settings and functions of the page: none of its work"
    cells = json.loads(repo_path("nbs", "tutorials", "03_okvqa.ipynb").read_text(encoding="utf8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    keep = [n for source in sources for n in ast.parse(source).body if is_step_or_setting(n)]
    space = {}
    exec(compile(ast.Module(keep, []), "03_okvqa", "exec"), space)
    return space

def some_okvqa(okvqa, folder, n):
    "The first `n` questions of each split, with a picture of noise for each image"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        q = json.loads((okvqa / f"OpenEnded_mscoco_{split}2014_questions.json").read_text(encoding="utf8"))
        q["questions"] = q["questions"][:n]
        ids = {x["question_id"] for x in q["questions"]}
        a = json.loads((okvqa / f"{split}_soft_labels.json").read_text(encoding="utf8"))
        a = [x for x in a if x["question_id"] in ids]
        (folder / f"OpenEnded_mscoco_{split}2014_questions.json").write_text(json.dumps(q), encoding="utf8")
        (folder / f"{split}_soft_labels.json").write_text(json.dumps(a), encoding="utf8")
        for i in {x["image_id"] for x in q["questions"]}:
            noise = rng.integers(255, size=(56, 56, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"COCO_{split}2014_{i:012d}.jpg")
    return folder

def test_the_steps_run_on_okvqa(okvqa, tmp_path):
    page = tutorial()
    assert set(STEPS) <= set(page)
    frames = {s: read_soft_labels(okvqa, s) for s in ("train", "val")}
    assert check_splits(**frames).values.tolist() == [[9009, 8998], [5046, 5033]] # as the page says
    assert 2.9 < np.mean([len(set(a)) for a in frames["train"].answers]) < 3.2
    data = some_okvqa(okvqa, tmp_path/"okvqa", 30)
    own = dict(
        data=data,
        images=data,
        reader=read_soft_labels,
        folder=tmp_path / "run",
        n=(14, 6),
        two_stage=dict(top=2, low=1, random=1),
        mine=dict(tries=1, top=1, rounds=1),
        verify=1,
        counts=dict(beam=3, random=3, retrieval=2),
        # a model that knows nothing is never right: only probabilities of 1e-22 tell sequences apart
        changes=dict(
            data=dict(reward="hard01_plus_gtprob", weights=dict(soft_weight=1e22)),
            warmup=dict(n_epoch=1, steps=2, bs=8), listwise=dict(n_epoch=1),
        ),
        bars=False,
    )
    tiny = {k: page["islands"][k] for k in ("clip", "lvlm", "asking", "K")}
    w = SimpleNamespace(**page["okvqa"] | tiny | own) # mixed pools, as in the real run
    out = {}
    for s in STEPS: out[s] = page[s](w, 14, 6) if s == "count" else page[s](w)
    assert out["tell"]["rows"] == 14 * 8
    assert out["tell"]["failed"] == 0
    assert out["count"].prompts["generate"] == 14 * (8 + 4)
    assert check_results(out["answer"], w.test)
    assert w.pools["test"].recipe["parts"] == dict(text=4, image=4, random=8)
    assert {"chosen", "oracle", "random", "zero_shot"} <= set(w.table.selector)
    assert (w.eval.path / "report.html").stat().st_size > 20_000
    other = SimpleNamespace(**vars(w) | dict(sampler="random"))
    page["draw"](other)
    with pytest.raises(ValueError, match="trained on another kind of pool"): # what a checkpoint is for
        page["answer"](other)
