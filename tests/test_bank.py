"""A bank of answered questions at the doors of the shell: questions without pictures, whose answers do not
repeat, so that no warm-up can teach and the default recipe reads evidence
"""
import contextlib, io, json, os, subprocess, sys, warnings
from pathlib import Path
import pandas as pd, pytest, torch
from leverplus import cli
from leverplus.dls import group_dls
from leverplus.evidence import BankStore
from leverplus.groups import RLData
from leverplus.infer import pick_model, predict
from leverplus.learner import load_selector, selector_learner
from leverplus.lvlm import MockScorer
from leverplus.recipes import recipe_learner
from leverplus.rldata_propose import propose
from leverplus.runs import Run
from leverplus.settings import Choosing, Job, Picking, Proposing, Rows, Teaching, settings_of
from leverplus.sweep import read_rows
from leverplus.table import Asked, full_table
from leverplus.training import training_data

ROOT = Path(__file__).resolve().parent.parent
SHORT = dict(regress=dict(n_epoch=2))
DATA = "--data texts --images none"
TEXTS = f"{DATA} --K 8"
TRAIN = f"train groups/train --dev groups/dev {DATA} --quiet"

def write_texts(folder):
    "A data set in OKVQA's format; two questions about each picture, no answer twice, and no picture anywhere"
    folder.mkdir()
    verbs = "eat wear carry hold paint drive".split()
    things = "boat dog cake hat wheel bird lamp".split()
    first = 0
    for split, n in dict(train=120, dev=24).items():
        ids = range(first, first + n)
        first += n
        asked = {i: f"who would {verbs[i % 6]} a {things[i % 7]} number {i}?" for i in ids}
        questions = [dict(question_id=i, image_id=10_000 + i//2, question=text) for i, text in asked.items()]
        answers = [
            dict(question_id=i, image_id=10_000 + i//2, question_type="who", answer_type="other",
                 answers=[dict(answer=f"{things[i % 5]}{i}", answer_id=k) for k in range(1, 11)])
            for i in ids
        ]
        named = {f"OpenEnded_mscoco_{split}2014_questions.json": dict(questions=questions),
                 f"mscoco_{split}2014_annotations.json": dict(annotations=answers)}
        for name, content in named.items(): (folder/name).write_text(json.dumps(content))

def go(line):
    "What a command says, which must end well"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = cli.main(line.split())
    assert code == 0, err.getvalue()
    return out.getvalue() + err.getvalue()

def elsewhere(line):
    "The same in another process"
    code = "import sys; from leverplus.cli import main; sys.exit(main())"
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    words = [sys.executable, "-c", code, *line.split()]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "(folder with the data set, its groups, and a selector trained from the shell; what training said)"
    folder = tmp_path_factory.mktemp("bank")
    was = os.getcwd()
    os.chdir(folder)
    try:
        write_texts(folder/"texts")
        for split, n in dict(train=40, dev=12).items():
            some = f"--split {split} --limit {n} --test 0"
            go(f"generate {TEXTS} {some} --lvlm mock --quiet --out groups/{split}")
        short = json.dumps(SHORT).replace(" ", "")
        said = go(f"{TRAIN} --set {short} --out runs/ours")
    finally: os.chdir(was)
    return folder, said

@pytest.fixture
def there(home, monkeypatch):
    monkeypatch.chdir(home[0])
    return home[0]

def job(split="dev"):
    return settings_of(Job, data="texts", images="none", K=8, split=split, store="runs/store", lvlm="mock")

def opened(split="dev", n=12):
    "(items, plain store, pool of the first questions)"
    items, store, pool = job(split).inputs()
    return items, store, pool.only(items.index[items.split == split][:n])

def greedy(path, items, store, pool):
    "{question: what a selector of a run picks} with a bank of the training questions"
    bank = BankStore(store, items, items.index[items.split == "train"])
    picks = pick_model(load_selector(f"{path}/checkpoint"), pool, bank, 2)
    return dict(zip(picks.question_id, picks.pointer))

def test_the_default_recipe_reads_evidence_from_the_shell(there, home):
    plan = json.loads(Path("runs/ours/plan.json").read_text())
    assert plan[0].startswith("warmup left out: ") and plan[1].startswith("regress runs: ")
    assert "warmup left out" in home[1] and "shadowing" not in home[1]
    model = load_selector("runs/ours/checkpoint")
    assert model.n_evidence == 14 and model.info["kind"] == "text+answers"
    assert Run("runs/ours").fingerprints["bank"]

def test_it_trains_what_fit_recipe_trains_with_a_bank(there):
    asked = training_data(["groups/train"], job(), Teaching(set=SHORT), Choosing(dev="groups/dev"))
    asked.open(bank=False)
    assert not isinstance(asked.store, BankStore)
    bank = BankStore(asked.store, asked.items)
    learn = recipe_learner(asked.train, asked.dev, bank, "ours", items=asked.warmup_items())
    with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
        warnings.simplefilter("ignore")
        learn.fit_recipe(**SHORT)
    made = load_selector("runs/ours/checkpoint").state_dict()
    for name, weight in learn.model.state_dict().items(): assert torch.equal(weight, made[name]), name
    assert learn.model.info["kind"] == "text+answers"   # a selector that was never saved says so, too

def test_no_answer_of_an_evaluated_question_is_in_the_bank(there):
    items, bank, pool = job().inputs(bank=True)
    assert set(items.split[bank.evidence.ids]) == {"train"} and len(bank.evidence) == 120
    assert {c for q in pool for c in pool[q]} <= set(bank.evidence.ids)
    assert not isinstance(job().inputs()[1], BankStore)

def test_another_process_predicts_with_it(there):
    line = f"infer --selector runs/ours {TEXTS} --lvlm mock --limit 12 --quiet --out runs/answers"
    elsewhere(line)
    rows = pd.read_parquet("runs/answers/predictions.parquet")
    assert dict(zip(rows.question_id, map(tuple, rows.pointer))) == greedy("runs/ours", *opened())
    run = Run("runs/answers")
    assert run.settings["kind"] == "text+answers" and run.fingerprints["bank"]
    assert "questions 12, failed 0" in go(line)   # goes on here

def test_the_table_has_its_row(there):
    rows = "--fixed 0 --draws 1"
    said = go(f"eval --selector runs/ours {TEXTS} --lvlm mock --limit 12 {rows} --quiet --out runs/eval")
    rows = pd.read_parquet("runs/eval/predictions.parquet").query("selector == 'ours'")
    assert dict(zip(rows.question_id, map(tuple, rows.pointer))) == greedy("runs/ours", *opened())
    assert Run("runs/eval").settings["kinds"] == dict(ours="text+answers") and "ours" in said
    assert go("report runs/eval --cases 2").splitlines()[0].endswith("runs/eval/report.html")

def test_it_proposes_and_is_judged(there):
    how = '--split train --limit 8 --test 0 --counts {"beam":4}'
    go(f"generate --selector runs/ours {TEXTS} {how} --lvlm mock --quiet --out groups/second")
    second = RLData.load("groups/second")
    items, store, pool = opened("train", 8)
    model = load_selector("runs/ours/checkpoint")
    want = propose(pool, BankStore(store, items), list(pool), 2, model, Proposing(counts=dict(beam=4)))
    assert second.rows.pointer.tolist() == want.pointer.tolist()
    assert second.manifest["settings"]["bank"] == Run("runs/ours").fingerprints["bank"]
    said = go(f"check groups/dev --selector runs/ours --split dev {DATA}")
    assert "groups/dev, judging ours" in said

def test_training_goes_on_with_it(there):
    "A single objective, which trains on embeddings alone by itself, shows a selector what it was trained on"
    line = f"{TRAIN} --objective rce --epochs 1"
    go(f"{line} --start runs/ours --out runs/next")
    after = load_selector("runs/next/checkpoint")
    assert after.n_evidence == 14 and after.info["kind"] == "text+answers"
    go(f"{line} --out runs/rce")
    alone = load_selector("runs/rce/checkpoint")
    assert alone.n_evidence == 0 and alone.info["kind"] == "text"
    assert "bank" not in Run("runs/rce").fingerprints
    changes = '{"listwise":{"n_epoch":1}}'
    go(f"{TRAIN} --recipe listwise --set {changes} --start runs/rce --out runs/on")
    assert load_selector("runs/on/checkpoint").n_evidence == 0

def test_an_epoch_is_chosen_by_what_it_picks(there):
    changes = '{"listwise":{"n_epoch":1}}'
    go(f"{TRAIN} --recipe listwise --set {changes} --lvlm mock --choose accuracy --out runs/chosen")
    picks = greedy("runs/chosen", *opened())
    dev = RLData.load("groups/dev").rows
    said = dict(zip(zip(dev.question_id, dev.pointer), dev.vqa_acc_score))
    asked = pd.concat(map(pd.read_parquet, Path("runs/chosen/facts").glob("*.parquet")), ignore_index=True)
    said |= dict(zip(zip(asked.question_id, map(tuple, asked.pointer)), asked.vqa_acc_score))
    accuracy = sum(said[pair] for pair in picks.items())/12
    assert accuracy == pytest.approx(Run("runs/chosen").metrics["dev_accuracy"])

def test_who_reads_no_evidence_is_shown_what_it_was(there):
    "A single objective from the shell is the one that embeddings alone give, bit by bit"
    go(f"{TRAIN} --objective rce --epochs 1 --out runs/alone")
    asked = training_data(["groups/train"], job(), Teaching(objective="rce"), Choosing(dev="groups/dev"))
    _, store, _ = job().inputs()
    learn = selector_learner(group_dls(asked.train, asked.dev, store))
    with warnings.catch_warnings(), learn.no_bar(), learn.no_logging():
        warnings.simplefilter("ignore")
        learn.fit_rce(1)
    made = load_selector("runs/alone/checkpoint").state_dict()
    for name, weight in learn.model.state_dict().items(): assert torch.equal(weight, made[name]), name

def test_a_sweep_reads_evidence_where_a_combination_says_so(there):
    line = f"sweep groups/train --dev groups/dev {DATA} --lvlm mock --seeds 0 --quiet"
    base = "--base objective=sft sft.n_epoch=1"
    def kinds(folder):
        return [row["kind"] for file in Path(folder).glob("cells*.jsonl") for row in read_rows(file)]
    go(f"{line} --grid kind=text,text+answers {base} --out runs/sweep")
    assert kinds("runs/sweep") == ["text", "text+answers"]
    go(f"{line} --grid sft.lr=0.001 {base} --out runs/swept")
    assert kinds("runs/swept") == ["text"]

def test_another_bank_is_another_run(there, tmp_path):
    "An answer that changed, of a question in no pool: picks may change, so no run goes on with it"
    items, store, pool = opened(n=4)
    model = load_selector("runs/ours/checkpoint")
    unseen = next(i for i in items.index[items.split == "train"] if i not in pool.item_ids)
    other = items.copy()
    other.at[unseen, "answers"] = ["a boat"]*10
    def predicted(items, model, **picking):
        bank = BankStore(store, items)
        how = dict(model=model, picking=Picking(**picking), progress=False)
        return predict(tmp_path/picking.get("picker", "ours"), pool, items, MockScorer(), bank, **how)
    def tabled(items):
        asked = Asked(items, BankStore(store, items), pool, MockScorer())
        few = settings_of(Rows, fixed=0, draws=1)
        return full_table(tmp_path/"table", asked, dict(ours=model), few, progress=False)
    predicted(items, model)
    tabled(items)
    for again in (lambda: predicted(other, model), lambda: tabled(other)):
        with pytest.raises(ValueError, match="fingerprint of bank"): again()
    predicted(items, None, picker="similar_text")
    predicted(other, None, picker="similar_text")   # who asks no bank goes on
