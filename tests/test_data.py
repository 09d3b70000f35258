"Readers: the two official formats, soft labels, the embedded world, and every kind of bad input."
import copy, json
from collections import Counter
from pathlib import Path
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from leverplus.core import repo_path
from leverplus.data import (
    BadItems, check_splits, expand_labels, image_fault, items_fingerprint, left_out, majority, read_okvqa,
    read_soft_labels, read_vqav2, show_items,
)
from leverplus.items import answered, as_id, as_image_id, as_items, given_ids
from leverplus.vqa import answer_targets

Q, A = "OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json"

def world(n=6):
    qs = [dict(question_id=10*i + 1, image_id=i, question=f"what is {i}?") for i in range(n)]
    said = [dict(answer_id=j + 1, answer="red" if j < 6 else "blue", raw_answer="reds") for j in range(10)]
    an = [
        dict(
            question_id=10 * i + 1,
            image_id=i,
            question_type="t",
            answer_type="other",
            answers=copy.deepcopy(said),
        )
        for i in range(n)
    ]
    return qs, an

def put(root, qs, an, prefix=""):
    root.mkdir(exist_ok=True, parents=True)
    (root/(prefix + Q)).write_text(json.dumps(dict(questions=qs)))
    (root/(prefix + A)).write_text(json.dumps(dict(annotations=an)))
    return root

def paint(folder, ids, ext="png"):
    folder.mkdir(exist_ok=True, parents=True)
    for i in ids:
        Image.fromarray(np.full((16, 16, 3), 20 * i % 255, dtype=np.uint8)).save(
            folder / f"COCO_train2014_{i:012d}.{ext}"
        )
    return folder

def test_okvqa(tmp_path):
    f = read_okvqa(put(tmp_path, *world()), "train")
    assert list(f.columns) == ["question_id", "image_id", "image_path", "question", "answers", "answer",
                               "question_type", "answer_type", "raw_answers", "split"]
    assert f.index.tolist() == f.question_id.tolist() == [1, 11, 21, 31, 41, 51] and f.index.name is None
    assert f.image_path.isna().all()
    assert set(f.answer) == {"red"}
    assert set(f.split) == {"train"}
    assert len(left_out(f)) == 0
    assert f.answers.loc[11] == ["red"]*6 + ["blue"]*4 and f.raw_answers.loc[1] == ["reds"]*10

def test_vqav2(tmp_path):
    qs, an = world()
    for a in an:
        a["multiple_choice_answer"] = "blue"
        for x in a["answers"]: del x["raw_answer"]
    f = read_vqav2(put(tmp_path, qs, an, "v2_"), "train")
    assert set(f.answer) == {"blue"} and "raw_answers" not in f
    del an[2]["multiple_choice_answer"]
    put(tmp_path, qs, an, "v2_")
    with pytest.raises(BadItems, match="question 21: multiple_choice_answer is None"):
        read_vqav2(tmp_path, "train")

def test_order_is_the_questions_files(tmp_path):
    qs, an = world()
    qs.reverse()
    assert read_okvqa(put(tmp_path, qs, an), "train").index.tolist() == [51, 41, 31, 21, 11, 1]

@pytest.mark.parametrize("sub,ext", [("", "jpg"), ("", "png"), ("train2014", "jpg"), ("train2014", "png")])
def test_images(tmp_path, sub, ext):
    put(tmp_path, *world())
    paint(tmp_path / "im" / sub, range(6), ext)
    f = read_okvqa(tmp_path, "train", images=tmp_path/"im")
    assert all(Path(p).is_file() for p in f.image_path)
    assert f.image_path.loc[21].endswith(f"COCO_train2014_000000000002.{ext}")

# ---- bad input: (change, what is left out, words of the error)
def twice(qs, an): qs.append(dict(qs[1]))
def no_annotation(qs, an): del an[1]
def no_question(qs, an): del qs[1]
def nine(qs, an): an[1]["answers"].pop()
def eleven(qs, an): an[1]["answers"].append(dict(answer="red"))
def no_answers(qs, an): del an[1]["answers"]
def number(qs, an): an[1]["answers"][0]["answer"] = 7
def blank(qs, an): [a.update(answer=" ") for a in an[1]["answers"]]
def true_id(qs, an): qs[1]["question_id"] = True
def no_image_id(qs, an): del qs[1]["image_id"]
def negative(qs, an): qs[1]["image_id"] = -1
def no_text(qs, an): qs[1]["question"] = "  "
def other_image(qs, an): an[1]["image_id"] = 5
def list_id(qs, an): qs[1]["question_id"] = [11]
def not_object(qs, an): qs.append("11")
def annotated_twice(qs, an): an.append(copy.deepcopy(an[1]))

@pytest.mark.parametrize(
    "change,lost,words",
    [
        (twice, 0, f"{Q}: question 11: question_id appears twice"),
        (annotated_twice, 0, f"{A}: question 11: question_id appears twice"),
        (no_annotation, 1, f"{A}: question 11: no annotation"),
        (no_question, 1, f"{Q}: question 11: no question"),
        (nine, 1, f"{A}: question 11: 9 answers"),
        (eleven, 1, f"{A}: question 11: 11 answers"),
        (no_answers, 1, f"{A}: question 11: answers is NoneType"),
        (number, 1, f"{A}: question 11: an answer without a text"),
        (blank, 1, f"{A}: question 11: all answers are blank"),
        (true_id, 1, f"{Q}: question True: question_id is True"),
        (list_id, 1, f"{Q}: question [11]: question_id is [11]"),
        (no_image_id, 1, f"{Q}: question 11: image_id is None"),
        (negative, 1, f"{Q}: question 11: image_id is -1"),
        (no_text, 1, f"{Q}: question 11: question is '  '"),
        (other_image, 1, f"{A}: question 11: image_id 5, but 1"),
        (not_object, 0, f"{Q}: question None: entry 6 is str"),
    ],
)
def test_bad_items(tmp_path, change, lost, words):
    qs, an = world()
    change(qs, an)
    put(tmp_path, qs, an)
    with pytest.raises(BadItems) as e: read_okvqa(tmp_path, "train")
    assert words in str(e.value) and "on_bad='skip'" in str(e.value)
    f = read_okvqa(tmp_path, "train", on_bad="skip")
    assert len(f) == 6 - lost and f.index.is_unique and 1 in f.index
    file, _, rest = words.partition(": question ")
    lost_rows = left_out(f)
    assert (lost_rows.file == file).any() and lost_rows.reason.str.startswith(rest.split(": ", 1)[1]).any()

def cut(p): p.write_bytes(p.read_bytes()[:60])
def empty(p): p.write_bytes(b"")
def words_(p): p.write_text("<html>404</html>")
def gone(p): p.unlink()

@pytest.mark.parametrize(
    "spoil,words",
    [
        (cut, "cannot be read"),
        (empty, "image file is empty"),
        (words_, "cannot be read"),
        (gone, "no such image"),
    ],
)
@pytest.mark.parametrize("ext", ["png", "jpg"])
def test_bad_images(tmp_path, spoil, words, ext):
    qs, an = world()
    qs.append(dict(question_id=99, image_id=2, question="again?"))
    an.append(dict(an[2], question_id=99))
    put(tmp_path, qs, an)
    im = paint(tmp_path / "im", range(6), ext)
    spoil(im/f"COCO_train2014_{2:012d}.{ext}")
    with pytest.raises(BadItems, match=rf"COCO_train2014_000000000002\S*: question 21: .*{words}"):
        read_okvqa(tmp_path, "train", images=im)
    f = read_okvqa(tmp_path, "train", images=im, on_bad="skip")
    assert set(f.index) == {1, 11, 31, 41, 51} and left_out(f).question_id.tolist() == [21, 99]
    assert len(read_okvqa(tmp_path, "train")) == 7 # images=None does not look

def test_how_hard_images_are_looked_at(tmp_path):
    p = tmp_path/"x.jpg"
    noise = np.random.default_rng(0).integers(255, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(p)
    p.write_bytes(p.read_bytes()[:1500])
    assert image_fault(p) and not image_fault(p, "header") and not image_fault(p, "exists")

def test_files_that_are_missing_or_broken(tmp_path):
    qs, an = world()
    with pytest.raises(FileNotFoundError, match=f"{Q}.*folder does not exist"):
        read_okvqa(tmp_path/"nowhere", "train", on_bad="skip")
    put(tmp_path, qs, an)
    with pytest.raises(
        FileNotFoundError, match="OpenEnded_mscoco_val2014_questions.json.*the folder holds.*train2014"
    ):
        read_okvqa(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match="no such folder of images"):
        read_okvqa(tmp_path, "train", images=tmp_path/"im", on_bad="skip")
    (tmp_path/A).write_text('{"annotations": [{"question')
    with pytest.raises(ValueError, match=f"{A}: not valid JSON"): read_okvqa(tmp_path, "train", on_bad="skip")
    (tmp_path/A).write_text('{"answers": []}')
    with pytest.raises(ValueError, match=f"{A}: wanted a list under 'annotations'"):
        read_okvqa(tmp_path, "train")
    (tmp_path/A).unlink()
    with pytest.raises(FileNotFoundError, match=f"{A}: no such file"): read_okvqa(tmp_path, "train")

def test_a_split_without_answers(tmp_path):
    "Questions alone, asked for; their file may be of 2015, and its pictures those of the whole test split"
    qs, an = world()
    for q in qs: q["question_id"] = f"q-{q['question_id']}"
    (tmp_path/"v2_OpenEnded_mscoco_test-dev2015_questions.json").write_text(json.dumps(dict(questions=qs)))
    (tmp_path/"test2015").mkdir()
    for i in range(len(qs)):
        Image.new("RGB", (8, 8), (20*i, 0, 0)).save(tmp_path/f"test2015/COCO_test2015_{i:012d}.jpg")
    with pytest.raises(FileNotFoundError, match="v2_mscoco_test-dev2015_annotations.json"):
        read_vqav2(tmp_path, "test-dev")
    for answers in (False, None):
        f = read_vqav2(tmp_path, "test-dev", images=tmp_path, answers=answers)
        assert list(f.columns) == ["question_id", "image_id", "image_path", "question", "split", "given_id"]
        assert f.given_id.tolist() == [q["question_id"] for q in qs] and Path(f.image_path.iloc[0]).is_file()
        assert as_items(f) is f and not answered(f).any() and len(left_out(f)) == 0
    put(tmp_path, *world())
    assert "answers" in read_okvqa(tmp_path, "train", answers=None)
    assert "answers" not in read_okvqa(tmp_path, "train", answers=False)
    with pytest.raises(FileNotFoundError, match="train_soft_labels.json"): read_soft_labels(tmp_path, "train")
    assert len(read_soft_labels(tmp_path, "train", answers=None)) == 6

def test_nothing_left_is_an_error_even_when_skipping(tmp_path):
    qs, _ = world()
    put(tmp_path, qs, [])
    with pytest.raises(BadItems, match="nothing would be left"): read_okvqa(tmp_path, "train", on_bad="skip")
    put(tmp_path, [], [])
    with pytest.raises(BadItems, match="no questions"): read_okvqa(tmp_path, "train")

@pytest.mark.parametrize("kw", [dict(on_bad="ignore"), dict(verify="maybe")])
def test_bad_arguments(tmp_path, kw):
    with pytest.raises(ValueError, match="pass"): read_okvqa(put(tmp_path, *world()), "train", **kw)

def test_report_survives_and_says_when_it_is_gone(tmp_path):
    qs, an = world()
    del an[1]
    f = read_okvqa(put(tmp_path, qs, an), "train", on_bad="skip")
    assert len(left_out(f[f.image_id > 2])) == 1 and len(left_out(f.copy())) == 1
    with pytest.raises(ValueError, match="no report"): left_out(pd.DataFrame({"question_id": [1]}))
    f.to_parquet(tmp_path / "f.parquet")
    g = pd.read_parquet(tmp_path / "f.parquet")
    assert items_fingerprint(g) == items_fingerprint(f) and g.index.tolist() == f.index.tolist()
    other = read_okvqa(put(tmp_path/"b", *world()), "train")
    assert len(pd.concat([f, other])) == 11 # reports that differ do not hinder concat

def test_ids_and_pictures_that_are_texts(tmp_path):
    "Numbers written as texts are numbers; other texts are mapped, kept, and name the picture's file"
    qs, an = world()
    qs[1]["question_id"] = "11"
    for entry in (qs[2], an[2]): entry.update(question_id="22MexNk", image_id="VizWiz_val_00000002.jpg")
    for entry in (qs[3], an[3]): entry["image_id"] = "COCO_train2014_000000000003"
    put(tmp_path, qs, an)
    im = paint(tmp_path/"im", range(6))
    (im/"COCO_train2014_000000000002.png").rename(im/"VizWiz_val_00000002.jpg")
    f = read_okvqa(tmp_path, "train", images=im)
    new = as_id("22MexNk")
    assert f.index.tolist() == f.question_id.tolist() == [1, 11, new, 31, 41, 51]
    assert f.given_id.tolist() == ["1", "11", "22MexNk", "31", "41", "51"]
    assert f.image_id.tolist() == [0, 1, as_image_id("VizWiz_val_00000002.jpg"), 3, 4, 5]
    assert Path(f.image_path[new]).name == "VizWiz_val_00000002.jpg"
    f.to_parquet(tmp_path/"f.parquet")
    assert given_ids(pd.read_parquet(tmp_path/"f.parquet"), [new, 31]) == ["22MexNk", "31"]

def test_a_text_id_that_one_file_lacks_is_named(tmp_path):
    qs, an = world()
    qs[1]["question_id"] = an[1]["question_id"] = "22MexNk"
    del an[1]
    with pytest.raises(BadItems, match="question 22MexNk: no annotation"): read_okvqa(put(tmp_path, qs, an), "train")

FORMS = [("cafe\u0301.PNG", "caf\u00e9.png"), ("Caf\u00e9.png", "cafe\u0301"), ("a b%20.png", "a b%20.png")]

@pytest.mark.parametrize("there, asked", FORMS)
def test_a_file_name_is_found_in_either_form(tmp_path, there, asked):
    "Some file systems decompose the names that archives and questions have composed"
    (tmp_path/"images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path/"images"/there)
    qs, an = world()
    for entry in (qs[0], an[0]): entry["image_id"] = asked
    found = read_okvqa(put(tmp_path, qs[:1], an[:1]), "train", images=tmp_path/"images")
    assert Path(found.image_path.iloc[0]).name == there

def test_splits_are_compared_by_what_ids_mean():
    "One picture under a number and under a COCO name is one picture"
    a = pd.DataFrame(dict(question_id=[1, 2], image_id=[42, 43]))
    b = pd.DataFrame(dict(question_id=["3", "x"], image_id=["COCO_val2014_000000000042", "other.jpg"]))
    with pytest.raises(ValueError, match=r"share 1 image_ids, e.g. \[42\]"): check_splits(train=a, val=b)
    assert check_splits(train=a, val=b[1:]).questions.tolist() == [2, 1]
    c = a.assign(question_id=["x", "y"], image_id=["other.jpg", "third.jpg"])
    with pytest.raises(ValueError, match=r"share 1 image_ids, e.g. \['other.jpg'\]"): check_splits(val=b, test=c)
    with pytest.raises(ValueError, match=r"share 1 question_ids, e.g. \['x'\]"):
        check_splits(val=b, test=c.assign(image_id=[1, 2]))
    with pytest.raises(ValueError, match="split 'train', question_id 2: image_id nan is missing"):
        check_splits(train=a.assign(image_id=[42, None]), val=b)

# ---- helpers

@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["red", "blue", "green", " red", ""]), min_size=1, max_size=10))
def test_majority(answers):
    said = [a.strip() for a in answers if a.strip()]
    if not said:
        with pytest.raises(ValueError, match="blank"): majority(answers)
        return
    best = max(Counter(said).values())
    assert majority(answers) == next(a for a in said if Counter(said)[a] == best)

def test_the_majority_is_counted_in_one_form():
    assert majority(["tea"]*4 + ["caf\u00e9"]*3 + ["cafe\u0301 "]*3) == "caf\u00e9"

def test_check_splits(tmp_path):
    f = read_okvqa(put(tmp_path, *world()), "train")
    t = check_splits(a=f.iloc[:2], b=f.iloc[2:])
    assert t.loc["b"].tolist() == [4, 4]
    with pytest.raises(ValueError, match=r"'a' and 'b' share 1 image_ids, e.g. \[2\]"):
        check_splits(a=f.iloc[:3], b=f.iloc[2:])
    with pytest.raises(ValueError, match="question_ids"):
        check_splits(a=f, b=f.assign(image_id=f.image_id + 100))

def test_fingerprint(tmp_path):
    f = read_okvqa(put(tmp_path, *world()), "train")
    assert (
        items_fingerprint(f)
        == items_fingerprint(f.iloc[::-1])
        == items_fingerprint(f.assign(image_path="elsewhere"))
    )
    for g in (f.iloc[1:], f.assign(question="?"), f.assign(answers=[["x"]*10]*6)):
        assert items_fingerprint(g) != items_fingerprint(f)

def test_show_items(tmp_path):
    import matplotlib.pyplot as plt
    put(tmp_path, *world())
    im = paint(tmp_path / "im", range(6))
    assert len(show_items(read_okvqa(tmp_path, "train", images=im), 2)) == 2
    axes = plt.subplots(1, 3)[1]
    assert (show_items(read_okvqa(tmp_path, "train"), 3, axes) == axes).all()
    assert len(show_items(read_okvqa(tmp_path, "train").head(1))) == 1

# ---- soft labels

def test_expand_labels_inverts_soft_labels():
    # every way five people can agree
    every = [(5,), (4, 1), (3, 2), (3, 1, 1), (2, 2, 1), (2, 1, 1, 1), (1, 1, 1, 1, 1)]
    for groups in every:
        label = {f"w{i}": 1 if c > 1 else .667 for i, c in enumerate(groups)}
        assert Counter(expand_labels(label)) == {f"w{i}": 2*c for i, c in enumerate(groups)}

@pytest.mark.parametrize(
    "label",
    [{}, None, {"a": 0.5}, {"a": "1"}, {"a": 0.667}, dict.fromkeys("abc", 1), dict.fromkeys("abcdef", 0.667)],
)
def test_impossible_labels(label):
    with pytest.raises(ValueError): expand_labels(label)

def test_real_okvqa(okvqa):
    train, val = [read_soft_labels(okvqa, s) for s in ("train", "val")]
    assert (len(train), len(val)) == (9009, 5046) and len(left_out(train)) == len(left_out(val)) == 0
    assert train.image_id.loc[516065] == 51606 and train.answer.loc[516065] == "pony tail"
    assert {len(a) for a in val.answers} == {10}
    check_splits(train=train, val=val)
    # the labels come back from the ten answers
    for row in json.loads((okvqa / "val_soft_labels.json").read_text())[:500]:
        counts = Counter(val.answers.loc[row["question_id"]])
        assert {a: min(c/3, 1) for a, c in counts.items()} == pytest.approx(row["label"], abs=1e-3)
    with pytest.raises(FileNotFoundError, match="mscoco_val2014_annotations.json"): read_okvqa(okvqa, "val")
    weights = Counter(w for a in val.answers for w in answer_targets(a)[1])
    assert set(weights) <= {.3, .6, .9, 1.} and (weights[.6] + weights[1.])/weights.total() > .99

# ---- the embedded world

@pytest.mark.skipif(not repo_path("data", "islands").is_dir(), reason="the embedded world is not here")
def test_islands():
    root = repo_path("data", "islands")
    f = {s: read_okvqa(root, s, images=root/"images") for s in ("train", "dev", "test")}
    t = check_splits(**f)
    assert (t.questions >= [800, 200, 1000]).all()
    assert all(set(x.question_type) == {"shape", "colour", "both"} for x in f.values())
