"Tasks for lmms-eval: what it is handed, what it logs, and where it is installed, it itself"
import importlib.util, json, shutil
from dataclasses import asdict, replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch, yaml
from PIL import Image, ImageFile, ImageOps
from leverplus.bank import DemoBank, asked_items
from leverplus.core import Damaged, repo_path
from leverplus.data import read_okvqa
from leverplus.embed import load_clip
from leverplus.items import as_id
from leverplus.lmms import (
    BENCHMARKS, FewShot, doc_to_messages, doc_to_target, doc_to_text, doc_to_visual, few_shot, lmms_messages,
    read_samples, read_task, score, scoring_of, write_docs, write_task,
)
from leverplus.picker import Picker
from leverplus.pictures import open_image
from leverplus.prompt import Demo, Prompt, messages
from leverplus.selector import PointerSelector
from leverplus.vqa import vqa_accuracy

ISLANDS = repo_path("data", "islands")
WHOLE = importlib.util.find_spec("lmms_eval") is not None
needs_lmms_eval = pytest.mark.skipif(not WHOLE, reason="lmms-eval is not installed")

def some(split, n): return read_okvqa(ISLANDS, split, images=ISLANDS/"images").iloc[:n]

def as_doc(item, **more):
    told = dict(question_id=item.question_id, question=item.question, answers=list(item.answers))
    return told | dict(image=open_image(item.image_path)) | more

@pytest.fixture(autouse=True)
def its_switch_is_turned_back():
    "lmms-eval turns a switch of Pillow for the whole process when it is loaded"
    was = ImageFile.LOAD_TRUNCATED_IMAGES
    yield
    ImageFile.LOAD_TRUNCATED_IMAGES = was

@pytest.fixture(scope="module")
def train(): return some("train", 120)

@pytest.fixture(scope="module")
def dev(): return some("dev", 8)

@pytest.fixture(scope="module")
def home(train, tmp_path_factory):
    "A folder with a bank and a selector"
    folder = tmp_path_factory.mktemp("lmms")
    bank = DemoBank.build(train, folder=folder/"bank", progress=False)
    torch.manual_seed(0)
    model = PointerSelector(bank.store.dim("mixed"), d_hidden=16).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(.3*torch.randn_like(p))
    model.save_pretrained(folder/"selector", info=dict(kind="mixed", encoder=load_clip().fingerprint))
    return folder

@pytest.fixture
def few(home): return FewShot("picked", str(home/"bank"), str(home/"selector"), metric="lmms")

def pictures(said): return [part["url"] for turn in said for part in turn["content"] if part["type"] == "image"]
def texts(said): return [part["text"] for turn in said for part in turn["content"] if part["type"] == "text"]

# ---- messages ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("style", ["interleaved", "chat"])
def test_ours_are_the_messages_of_the_prompt_page(style, few, home, dev):
    few = replace(few, prompt="ours", style=style)
    said = doc_to_messages(as_doc(dev.iloc[0]), asdict(few))
    pick = Picker.from_pretrained(home/"selector", style=style)
    want = pick.batch(dev.iloc[[0]][["question_id", "question", "image_path"]], DemoBank.open(home/"bank"))[0]
    assert texts(said) == texts(want.messages()) and [turn["role"] for turn in said] == [
        turn["role"] for turn in want.messages()]
    for seen, path in zip(pictures(said), want.prompt.images, strict=True):
        assert isinstance(seen, Image.Image) and seen.tobytes() == open_image(path).tobytes()

def test_theirs_say_what_their_tasks_say(few, dev):
    after = BENCHMARKS["ok_vqa"].after
    said = doc_to_messages(as_doc(dev.iloc[0]), asdict(replace(few, after=after, style="chat", shots=3)))
    assert [turn["role"] for turn in said] == ["user", "assistant"]*3 + ["user"]
    assert "'Unanswerable'" in after and texts(said)[-1] == dev.question.iloc[0] + after
    assert doc_to_text(as_doc(dev.iloc[0]), asdict(replace(few, after=after))) == texts(said)[-1]

def test_a_document_is_never_its_own_demonstration(few, home, train):
    "Under its own id or another, with the bank's file or the same pixels, with 2 candidates or all"
    for K in (2, 16, "all"):
        for i in (0, 1, 40):
            item = train.iloc[i]
            for doc in (as_doc(item), as_doc(item, question_id=f"new {i}"),
                        as_doc(item, question_id="again", image=item.image_path)):
                at = replace(few, task=f"own-{K}", K=K, shots=1)
                shown = pictures(doc_to_messages(doc, asdict(at)))
                assert len(shown) == 2 and shown[0].tobytes() != shown[1].tobytes()
                ids = score(doc, ["x"], at)["leverplus"]["pointer"]
                assert not set(train.image_id.loc[ids]) & {item.image_id}

def test_a_photograph_out_of_memory_is_known_by_its_pixels(tmp_path):
    "A JPEG file of the bank that lies on its side, as `datasets` hands it on: decoded, turned upright or not"
    noise = np.random.default_rng(0).integers(255, size=(5, 40, 64, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for i, pixels in enumerate(noise): Image.fromarray(pixels).save(tmp_path/f"{i}.jpg", exif=exif)
    known = pd.DataFrame(dict(image=[str(tmp_path/f"{i}.jpg") for i in range(5)], question="What?", answer="it"))
    bank = DemoBank.build(known, progress=False)
    as_it_lies = Image.open(tmp_path/"3.jpg")
    for image in (as_it_lies, ImageOps.exif_transpose(as_it_lies), (tmp_path/"3.jpg").read_bytes()):
        asked = asked_items([dict(question_id="new", image=image, question="Which?")], keep=tmp_path/"kept")
        assert bank.same_picture(asked, bank.embed(asked)).tolist() == [[False, False, False, True, False]]

def test_other_pictures_that_look_nearly_the_same_may_be_shown(home, train):
    "The rule is about the same picture, not about a similar one"
    bank = DemoBank.open(home/"bank")
    pixels = np.asarray(open_image(train.image_path.iloc[0])).copy()
    asked = [dict(question_id="same", image=Image.fromarray(pixels), question="What is it?")]
    pixels[0, 0] = 255 - pixels[0, 0]
    asked.append(dict(question_id="near", image=Image.fromarray(pixels), question="What is it?"))
    asked = asked_items(asked, keep=home/"kept")
    same = bank.same_picture(asked, bank.embed(asked))
    assert same.sum(1).tolist() == [2, 0]                            # two questions of the islands share a picture

def test_documents_without_a_picture(home):
    "In a bank of texts, too, where the same words are the same question"
    sums = [dict(question=f"What is {i} and {i}?", answer=str(2*i)) for i in range(12)]
    known = pd.DataFrame(sums)
    bank = DemoBank.build(known, folder=home/"texts", progress=False)
    model = PointerSelector(bank.store.dim("text"), d_hidden=16)
    model.save_pretrained(home/"reader", info=dict(kind="text", encoder=load_clip().fingerprint))
    few = FewShot("texts", str(home/"texts"), str(home/"reader"), K="all", shots=2)
    said = doc_to_messages(dict(question_id=3, question="What is 3 and 3?", image=None), asdict(few))
    assert pictures(said) == [] and "What is 3 and 3?\n6\n" not in texts(said)
    assert texts(said)[-1] == "What is 3 and 3?"

def test_a_document_without_a_picture_before_a_bank_with(few):
    said = doc_to_messages(dict(question_id=1, question="What is it?"), asdict(few))
    assert len(pictures(said)) == 2 and [part["type"] for part in said[0]["content"]][-1] == "text"

def test_files_that_were_cut_short_pass_there_and_not_here(few, train, dev, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert len(pictures(doc_to_messages(as_cut(dev.iloc[0]), asdict(few)))) == 3
    assert ImageFile.LOAD_TRUNCATED_IMAGES
    place = tmp_path/"pictures"
    place.mkdir()
    moved = [shutil.copy(path, place) for path in train.image_path[:40]]
    with monkeypatch.context() as strict:
        strict.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
        DemoBank.build(train[:40].assign(image_path=moved), folder=tmp_path/"bank", progress=False)
    for path in set(moved): Path(path).write_bytes(Path(path).read_bytes()[:-40])
    spoilt = replace(few, bank=str(tmp_path/"bank"))
    with pytest.raises(Damaged, match="is not the picture that was embedded"):
        doc_to_messages(as_cut(dev.iloc[0]), asdict(spoilt))
    assert ImageFile.LOAD_TRUNCATED_IMAGES

def as_cut(item):
    "A document whose picture another library has read already"
    return dict(question_id=item.question_id, question=item.question, image=Image.new("RGB", (20, 20), "red"))

def test_no_demonstrations(few, dev):
    said = doc_to_messages(as_doc(dev.iloc[0]), asdict(replace(few, shots=0)))
    assert len(pictures(said)) == 1 and len(texts(said)) == 1

@pytest.mark.parametrize("settings,words", [
    (None, "has no task"), (dict(task="x", bank="b"), "has no selector"),
    (dict(task="x", bank="b", selector="s", k=3), "'k' is none of task"),
    (dict(task="x", bank="b", selector="s", prompt="y"), "prompt 'y'"),
])
def test_settings_that_will_not_do(settings, words, dev):
    with pytest.raises(ValueError, match=words): doc_to_messages(as_doc(dev.iloc[0]), settings)

def test_settings_of_single_models_lie_beside(few):
    "As lmms-eval merges them: the default's on top, and the tables stay"
    merged = {"default": asdict(few), "qwen": dict(after="x"), **asdict(few)}
    assert few_shot(merged) == few

def test_documents_that_will_not_do(few, dev):
    with pytest.raises(ValueError, match="a document without question_id, of question"):
        doc_to_messages(dict(question="What?"), asdict(few))
    with pytest.raises(ValueError, match="take a chat model"): doc_to_visual(as_doc(dev.iloc[0]))

# ---- the task ------------------------------------------------------------------------------------------------

def test_a_task_says_all_of_its_settings(few, tmp_path):
    path = write_task(tmp_path/"tasks", few, "vqav2")
    assert sorted(p.name for p in path.parent.iterdir()) == ["picked.py", "picked.yaml"]
    read = read_task(path)
    assert read == replace(few, before="", after=BENCHMARKS["vqav2"].after, style="interleaved", made_of=read.made_of)
    task = yaml.safe_load(path.read_text().replace("!function ", ""))
    assert task["dataset_path"] == "lmms-lab-encoder/VQAv2" and task["test_split"] == "validation"
    assert task["doc_to_messages"] == "picked.doc_to_messages"
    names = {}
    module = path.with_suffix(".py")
    exec(compile(module.read_text(), module, "exec"), dict(__file__=module), names)
    named = [value for value in task.values() if isinstance(value, str) and value.startswith("picked.")]
    assert len(named) == 5 and {name.split(".")[1] for name in named} <= set(names)
    with pytest.raises(FileExistsError, match="picked.yaml is there"): write_task(tmp_path/"tasks", few)
    write_task(tmp_path/"tasks", replace(few, shots=3), overwrite=True)
    assert read_task(path).shots == 3

def test_what_cannot_run_is_not_written(few, home, tmp_path):
    for wrong, words in [
        (replace(few, bank=str(tmp_path/"nowhere")), "bank.json: no such file"),
        (replace(few, task="two words"), "letters, digits"),
        (replace(few, shots=9), "9"), (replace(few, shots=None), "no STOP"),
    ]:
        with pytest.raises((ValueError, OSError), match=words): write_task(tmp_path/"tasks", wrong)
    with pytest.raises(ValueError, match="K 0: wanted a whole number >= 1, 'all' or None"): replace(few, K=0)
    with pytest.raises(ValueError, match="benchmark 'gqa'"): write_task(tmp_path/"tasks", few, "gqa")
    assert not (tmp_path/"tasks").exists()

def test_a_bank_that_has_changed_is_another_task(few, train, tmp_path):
    DemoBank.build(train.iloc[:40], folder=tmp_path/"bank", progress=False)
    path = write_task(tmp_path/"tasks", replace(few, bank=str(tmp_path/"bank")))
    DemoBank.open(tmp_path/"bank").append(train.iloc[40:44], progress=False)
    from leverplus.lmms import _tools
    _tools.cache_clear()
    with pytest.raises(ValueError, match="is not what it was made for"):
        doc_to_messages(dict(question_id=1, question="What is it?"), asdict(read_task(path)))

# ---- scores and logs -----------------------------------------------------------------------------------------

def test_scores_are_theirs_and_ours(few, dev):
    doc = as_doc(dev.iloc[0])
    right = dev.answer.iloc[0]
    said = score(doc, [f"Answer: {right}"], few)
    assert said["vqa_accuracy"] == vqa_accuracy(right, doc["answers"]) > said["exact_match"] == 0
    assert score(doc, [right], few)["exact_match"] == vqa_accuracy(right, doc["answers"], "lmms") > 0
    people = [dict(answer=a, answer_id=i+1, answer_confidence="yes") for i, a in enumerate(doc["answers"])]
    vqav2 = score(doc | dict(answers=people), [right], replace(few, metric="lmms_vqav2"))
    assert vqav2["exact_match"] == vqa_accuracy(right, people, "lmms_vqav2")
    assert vqav2["leverplus"]["answers"] == doc["answers"] == doc_to_target(doc | dict(answers=people))

def log_of(docs, few, answers, path, **more):
    lines = [dict(doc_id=i, target=str(doc_to_target(doc)), filtered_resps=a, **score(doc, [a], few)) | more
             for i, (doc, a) in enumerate(zip(docs, answers))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path

def test_a_log_is_a_table_of_predictions(few, dev, train, tmp_path):
    from leverplus.evaluate import paired_tests
    from leverplus.infer import check_results, write_results
    docs = [as_doc(item) for _, item in dev.iterrows()]
    frames = []
    for shots in (1, 2):
        at = replace(few, task=f"shots{shots}", shots=shots)
        said = [item.answer if i % shots == 0 else "nobody says this" for i, (_, item) in enumerate(dev.iterrows())]
        frames.append(read_samples(log_of(docs, at, said, tmp_path/f"x_samples_{shots}.jsonl")))
        assert frames[-1].question_id.tolist() == dev.index.tolist()
        assert frames[-1].pointer.map(len).eq(shots).all() and frames[-1].shots.eq(shots).all()
        assert frames[-1].demo_answers.tolist() == [train.answer.loc[list(p)].tolist() for p in frames[-1].pointer]
        assert frames[-1].vqa_acc_score.tolist() == [vqa_accuracy(a, d["answers"]) for a, d in zip(said, docs)]
    tests = paired_tests(pd.concat(frames).assign(shots=1), dev, [("shots1", "shots2")])
    assert tests.delta[0] > 0
    answers = dict(zip(frames[0].question_id, frames[0].vqa_pred_answer))
    check_results(write_results(tmp_path/"r.json", answers, dev.index), dev.index)

def test_questions_that_nobody_has_answered_have_no_score(few, dev, tmp_path):
    docs = [as_doc(item) for _, item in dev.iterrows()]
    docs[2]["answers"] = None
    docs[3].pop("answers")
    table = read_samples(log_of(docs, few, ["red"]*len(docs), tmp_path/"log_samples_x.jsonl"))
    for column in ("vqa_acc_score", "lmms_acc_score"):
        assert np.flatnonzero(table[column].isna()).tolist() == [2, 3]
    assert [len(said) for said in table.answers][1:5] == [10, 0, 0, 10]

def test_text_ids_come_back(few, dev, tmp_path):
    docs = [as_doc(item, question_id=f"q-{i}") for i, (_, item) in enumerate(dev.iterrows())]
    table = read_samples(log_of(docs, few, ["red"]*len(docs), tmp_path/"log_samples_x.jsonl"))
    assert table.given_id.tolist() == [f"q-{i}" for i in range(len(docs))]
    assert table.question_id.tolist() == [as_id(f"q-{i}") for i in range(len(docs))]

def test_a_pick_that_another_process_made_is_made_again(few, dev):
    from leverplus.lmms import _SHOWN
    doc = as_doc(dev.iloc[3])
    doc_to_messages(doc, asdict(few))
    first = score(doc, ["x"], few)
    _SHOWN.clear()
    assert score(doc, ["x"], few) == first

def test_logs_of_others_are_refused(tmp_path):
    (tmp_path/"a_samples_x.jsonl").write_text('{"doc_id": 0, "filtered_resps": "x"}\n')
    with pytest.raises(ValueError, match="line 1: nothing of leverplus"): read_samples(tmp_path)
    (tmp_path/"b_samples_x.jsonl").write_text("{")
    with pytest.raises(FileNotFoundError, match="found a_samples_x.jsonl, b_samples_x.jsonl"): read_samples(tmp_path)
    with pytest.raises(ValueError, match="b_samples_x.jsonl, line 1"): read_samples(tmp_path/"b_samples_x.jsonl")
    with pytest.raises(FileNotFoundError, match="found none"): read_samples(tmp_path/"nowhere")

def test_items_become_documents(dev, tmp_path):
    named = dev.assign(question_id=[f"q {i}" for i in range(len(dev))], image_path=[None, *dev.image_path[1:]],
                       answers=[[], *dev.answers[1:]]).reset_index(drop=True)
    place = write_docs(tmp_path/"docs.parquet", named)
    docs = pd.read_parquet(place["dataset_kwargs"]["data_files"]["test"])
    assert docs.question_id.tolist() == named.question_id.tolist()
    assert docs.image[0] is None and docs.answers[0] is None
    assert docs.image[1]["bytes"] == Path(dev.image_path.iloc[1]).read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"): write_docs(tmp_path/"docs.parquet", named)
    with pytest.raises(ValueError, match="ends in .parquet"): write_docs(tmp_path/"docs.csv", named)

# ---- the other side ------------------------------------------------------------------------------------------

@pytest.fixture
def task_folder(few, dev, tmp_path, monkeypatch):
    "Tasks about the documents of the development split, and where lmms-eval may write"
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path/"cache"))
    bare = dev.assign(answers=[[], *dev.answers[1:]])
    place = write_docs(tmp_path/"docs.parquet", bare)
    write_task(tmp_path/"tasks", replace(few, task="picked_theirs", style="chat"), "ok_vqa", place)
    write_task(tmp_path/"tasks", replace(few, task="picked_ours", prompt="ours"), "vqav2", place)
    return tmp_path/"tasks"

@needs_lmms_eval
def test_the_real_loader_takes_the_task(task_folder, few, dev):
    from lmms_eval.protocol import ChatMessages
    from lmms_eval.tasks import TaskManager, get_task_dict
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    assert manager.all_tasks == ["picked_ours", "picked_theirs"]
    tasks = get_task_dict(["picked_theirs", "picked_ours"], manager, "chat")
    for name, task in tasks.items():
        docs = task.test_docs()
        said = task.doc_to_messages(docs[1])
        assert isinstance(docs[1]["image"], Image.Image) and len(pictures(said)) == 3
        chat = ChatMessages(messages=said)
        images, _, _ = chat.extract_media()
        assert [i.tobytes() for i in images] == [i.tobytes() for i in pictures(said)]
        assert texts(chat.to_hf_messages()) == texts(said)
        urls = [part["image_url"]["url"] for turn in chat.to_openai_messages() for part in turn["content"]
                if part["type"] == "image_url"]
        assert len(urls) == 3 and all(url.startswith("data:image/png;base64,") for url in urls)
    simple = get_task_dict(["picked_ours"], manager, "simple")["picked_ours"]
    with pytest.raises(ValueError, match="take a chat model"): simple.doc_to_visual(simple.test_docs()[1])

@needs_lmms_eval
def test_our_reading_of_their_scores_is_theirs(dev):
    from copy import deepcopy
    from lmms_eval.tasks.ok_vqa.utils import ok_vqa_process_results
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val
    few = FewShot("x", "b", "s")
    said = ["The 2 dogs!", "dog, cat", "isnt", "10,000", "a  cat's", "Two", "", "yes."]
    people = [["2 dogs"]*3 + ["dogs"]*7, ["dog cat"]*10, ["isn't"]*2 + ["is not"]*8, ["10000"]*4 + ["1"]*6,
              ["cat 's"]*10, ["2"]*1 + ["two"]*9, [""]*10, ["yes"]*9 + ["no"]]
    for answer, answers in zip(said, people):
        theirs = ok_vqa_process_results(dict(question_id=1, answers=deepcopy(answers)), [answer])["exact_match"]
        assert theirs == pytest.approx(vqa_accuracy(answer, answers, BENCHMARKS["ok_vqa"].metric))
        named = [dict(answer=a, answer_id=i, answer_confidence="yes") for i, a in enumerate(answers)]
        theirs = vqav2_process_results_val(dict(question_id=1, answers=deepcopy(named)), [answer])["exact_match"]
        assert theirs == pytest.approx(vqa_accuracy(answer, named, BENCHMARKS["vqav2"].metric))

@needs_lmms_eval
def test_their_prompt_and_places_are_those_of_their_tasks():
    from lmms_eval.tasks import TaskManager
    manager = TaskManager()
    for ours, theirs in dict(ok_vqa="ok_vqa_val2014", vqav2="vqav2_val").items():
        task = manager._get_config(theirs)
        assert BENCHMARKS[ours].after == task["lmms_eval_specific_kwargs"]["default"]["post_prompt"]
        where = ("dataset_path", "dataset_name", "dataset_kwargs", "test_split")
        assert BENCHMARKS[ours].dataset == {name: task[name] for name in where if name in task}

def evaluated(folder, names, out):
    "(results, {task: table read from its log}, [(task, pictures shown)]), with a model that says the last answer shown"
    pytest.importorskip("filelock._api", reason="lmms-eval 0.7.3 wants a filelock that has this part")
    from lmms_eval.api.model import lmms
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.loggers import EvaluationTracker
    from lmms_eval.tasks import TaskManager
    seen = []
    class Echo(lmms):
        is_simple = False
        def loglikelihood(self, requests): raise NotImplementedError
        def generate_until_multi_round(self, requests): raise NotImplementedError
        def generate_until(self, requests): return [self.said(*request.args) for request in requests]
        def said(self, _, to_messages, how, doc_id, task, split):
            said = to_messages(self.task_dict[task][split][doc_id])
            seen.append((task, len(pictures(said)), how["max_new_tokens"]))
            return texts(said)[-2].strip().splitlines()[-1].split("Short answer:")[-1].strip()
    tracker = EvaluationTracker(output_path=str(out))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = simple_evaluate(
        Echo(), tasks=names, task_manager=manager, evaluation_tracker=tracker, batch_size=1, bootstrap_iters=0)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results, samples, "20260101_000000")
    for name in names: tracker.save_results_samples(name, samples[name])
    tables = {name: read_samples(next(out.rglob(f"*_samples_{name}.jsonl"))) for name in names}
    return results["results"], tables, seen

@needs_lmms_eval
def test_a_whole_evaluation(task_folder, dev, tmp_path):
    names = ["picked_theirs", "picked_ours"]
    results, tables, seen = evaluated(task_folder, names, tmp_path/"out")
    assert set(seen) == {("picked_theirs", 3, 10), ("picked_ours", 3, 10)}
    for name, table in tables.items():
        assert table.question_id.tolist() == dev.index.tolist()
        assert table.vqa_pred_answer.tolist() == [said[-1] for said in table.demo_answers]
        assert table.vqa_acc_score.isna().tolist() == [True] + [False]*(len(dev) - 1)
        assert results[name]["exact_match,none"] == pytest.approx(table.lmms_acc_score.mean())
        assert results[name]["vqa_accuracy,none"] == pytest.approx(table.vqa_acc_score.mean())
        assert table.prompt.unique().tolist() == [name.removeprefix("picked_")]

@needs_lmms_eval
def test_a_whole_split_that_nobody_has_answered(few, dev, tmp_path, monkeypatch):
    "From documents without answers to the official results, and no accuracy anywhere"
    from leverplus.infer import check_results, write_results
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path/"cache"))
    place = write_docs(tmp_path/"docs.parquet", dev.drop(columns=["answers", "answer"]))
    write_task(tmp_path/"tasks", replace(few, task="secret"), "vqav2", place)
    results, tables, _ = evaluated(tmp_path/"tasks", ["secret"], tmp_path/"out")
    assert not {"exact_match,none", "vqa_accuracy,none"} & set(results["secret"])
    table = tables["secret"]
    assert table.vqa_acc_score.isna().all() and table.lmms_acc_score.isna().all()
    said = dict(zip(table.question_id, table.vqa_pred_answer))
    assert len(check_results(write_results(tmp_path/"r.json", said, dev.index), dev.index)) == len(dev)
