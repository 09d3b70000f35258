"A bank of solved examples: whatever holds them, its folder, appending, searching"
import io, json, shutil
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from leverplus.bank import DemoBank, keep_picture, solved_items
from leverplus.core import Damaged, read_json, repo_path
from leverplus.data import read_okvqa, read_soft_labels
from leverplus.embed import Clip, EmbedStore, embed_items, load_clip, nearest
from leverplus.evidence import Evidence
from leverplus.pictures import BadPicture, open_image

ISLANDS = repo_path("data", "islands")

@pytest.fixture(scope="module")
def train(): return read_okvqa(ISLANDS, "train", images=ISLANDS/"images").iloc[:60]

@pytest.fixture(scope="module")
def bank(train): return DemoBank.build(train, progress=False)

def square(colour, size=48): return Image.new("RGB", (size, size), colour)

def as_bytes(image, kind="PNG"):
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()

def rows(**more):
    return pd.DataFrame(dict(question=["What colour?", "Which town?", "How many?"], answer=["red", "Rome", "2"]) | more)

# ---- sources ------------------------------------------------------------------------------------------------

def test_pictures_of_every_form_are_the_same_file(tmp_path):
    red = square("red")
    path = keep_picture(red, tmp_path)
    for same in (as_bytes(red), dict(bytes=as_bytes(red), path="x.png")): assert keep_picture(same, tmp_path) == path
    assert keep_picture(dict(bytes=None, path="x.png"), tmp_path) == "x.png"
    assert keep_picture((tmp_path/"a b.png").as_uri()) == str(tmp_path/"a b.png")
    assert keep_picture(as_bytes(red, "JPEG"), tmp_path).endswith(".jpg") and len(list(tmp_path.iterdir())) == 2
    for fault in (b"", b"GIF8 cut short"):
        with pytest.raises(BadPicture, match=f"picture of {len(fault)} bytes"): keep_picture(fault, tmp_path)
    with pytest.raises(ValueError, match="say folder="): keep_picture(red)

@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F", "YCbCr"])
def test_pillow_images_of_every_mode_can_be_kept(mode, tmp_path):
    image = Image.new("L", (20, 20), 200) if mode == "I;16" else square("red").convert(mode)
    if mode == "I;16": image = Image.fromarray(np.full((20, 20), 50000, np.uint16))
    assert open_image(keep_picture(image, tmp_path)).size == image.size

def test_a_turned_picture_is_kept_upright(tmp_path):
    turned = Image.new("RGB", (40, 20), "blue")
    exif = turned.getexif()
    exif[0x0112] = 6
    raw = io.BytesIO()
    turned.save(raw, "JPEG", exif=exif)
    opened = Image.open(io.BytesIO(raw.getvalue()))
    assert open_image(keep_picture(opened, tmp_path)).size == open_image(raw.getvalue()).size == (20, 40)

def test_one_table_by_every_door(tmp_path):
    "The same examples as a frame, a list, CSV, JSONL, JSON and parquet; pictures beside the file"
    square("red").save(tmp_path/"red.png")
    frame = rows(image=["red.png", "", ""], uid=["a", "b", "c"])
    want = None
    frame.to_csv(tmp_path/"x.csv", index=False)
    frame.to_json(tmp_path/"x.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path/"x.json", orient="records")
    frame.to_parquet(tmp_path/"x.parquet")
    for source in (frame, frame.to_dict("records"), *(tmp_path/f"x.{e}" for e in ("csv", "jsonl", "json", "parquet"))):
        got = solved_items(source, dict(question_id="uid"), images=tmp_path)
        seen = got[["given_id", "question", "answer", "image_path", "image_id"]]
        assert [p is None for p in got.image_path] == [False, True, True]
        want = seen if want is None else want
        pd.testing.assert_frame_equal(seen, want)
    assert solved_items(tmp_path/"x.csv", dict(question_id="uid")).image_path.iloc[0] == str(tmp_path/"red.png")

def test_csv_cells_stay_texts(tmp_path):
    (tmp_path/"x.csv").write_text('id,question,answers\n007,Which agent?,"[""Bond"", ""NA"", ""NA""]"\n')
    got = solved_items(tmp_path, dict(question_id="id"))
    assert got.given_id.tolist() == ["007"] and got.answer.tolist() == ["NA"]
    assert got.answers.tolist() == [["Bond", "NA", "NA"]]

def test_files_of_datasets(tmp_path):
    coco = tmp_path/"coco/train2017"
    coco.mkdir(parents=True)
    square("red").save(coco/"000000000007.jpg")
    a = [dict(question_id="22Mex", image_id=7, question="What?", choices=["a"], direct_answers=["red"]*6 + ["pink"]*4)]
    (tmp_path/"aokvqa_v1p0_train.json").write_text(json.dumps(a))
    got = solved_items(tmp_path/"aokvqa_v1p0_train.json", images=tmp_path/"coco")
    assert got.given_id.tolist() == ["22Mex"] and got.answer.tolist() == ["red"] and got.choices.tolist() == [["a"]]
    assert got.image_path.iloc[0].endswith("000000000007.jpg") and got.image_id.tolist() == [7]

    square("blue").save(tmp_path/"0a1b.jpg")
    t = dict(dataset_name="textvqa", dataset_version="0.5.1", data=[
        dict(question_id=3, image_id="0a1b", question="Word?", answers=["stop"]*9 + ["go"], set_name="train")])
    (tmp_path/"TextVQA_0.5.1_train.json").write_text(json.dumps(t))
    got = solved_items(tmp_path/"TextVQA_0.5.1_train.json", images=tmp_path)
    assert got.index.tolist() == [3] and got.answer.tolist() == ["stop"]
    assert got.image_path.iloc[0].endswith("0a1b.jpg")
    with pytest.raises(FileNotFoundError, match="image_id '0a1b'"):
        solved_items(tmp_path/"TextVQA_0.5.1_train.json", images=tmp_path/"coco")

    v = [dict(image="0a1b.jpg", question="Colour?", answerable=1, answer_type="other",
              answers=[dict(answer="blue", answer_confidence="yes")]*10)]
    (tmp_path/"train.json").write_text(json.dumps(v))
    got = solved_items(tmp_path/"train.json")
    assert got.answer.tolist() == ["blue"] and got.answers.iloc[0] == ["blue"]*10
    assert solved_items(tmp_path/"train.json").index.equals(got.index)

def test_a_folder_in_okvqas_format_is_its_training_split(train):
    got = solved_items(ISLANDS)
    assert len(got) == 900 and got.loc[train.index, "image_path"].tolist() == train.image_path.tolist()

def test_real_files(okvqa):
    bank_items = solved_items(okvqa)
    want = read_soft_labels(okvqa, "train")
    assert bank_items.index.equals(want.index) and bank_items.answer.tolist() == want.answer.tolist()

class Table:
    "As `datasets.Dataset`: pictures are dictionaries"
    def __init__(self, frame): self.frame = frame
    def to_pandas(self): return self.frame

def test_what_has_to_pandas_is_a_dataset(tmp_path):
    pictures = [dict(bytes=as_bytes(square(c)), path=None) for c in ("red", "blue")] + [None]
    answers = [np.array(["a", "b", "b"], dtype=object)]*3
    made = DemoBank.build(Table(rows(image=pictures, answers=answers)), folder=tmp_path/"b", progress=False)
    assert made.items.answers.tolist() == [["a", "b", "b"]]*3 and made.items.answer.tolist() == ["red", "Rome", "2"]
    assert len(list((tmp_path/"b/pictures").iterdir())) == 2

def test_datasets_themselves(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(dict(q=datasets.Value("string"), a=datasets.Value("string"), img=datasets.Image()))
    data = dict(q=["What?", "Who?"], a=["red", "Bo"], img=[square("red"), None])
    names = dict(question="q", answer="a", image="img")
    made = DemoBank.build(datasets.Dataset.from_dict(data, features), None, names, tmp_path/"b", progress=False)
    assert [p is None for p in made.items.image_path] == [False, True] and made.items.answer.tolist() == ["red", "Bo"]

@pytest.mark.parametrize("frame, columns, says", [
    (rows().drop(columns="answer"), None, "no column answer"),
    (rows(), dict(answer="said"), "no column 'said'"),
    (rows(), dict(reply="answer"), "'reply' is none of"),
    (rows(answer=["", "x", "y"]), None, "answer"),
    (rows(question_id=[1, 1, 2]), None, "occurs more than once"),
    (rows(answer=None, answers=[["a"], [], ["b"]]), None, "row 1: no answer to show"),
])
def test_what_cannot_be_used_is_named(frame, columns, says):
    with pytest.raises(ValueError, match=says): solved_items(frame, columns)

def test_other_sources_are_refused(tmp_path):
    with pytest.raises(TypeError, match="examples are a int"): solved_items(3)
    with pytest.raises(FileNotFoundError, match="nowhere"): solved_items(tmp_path/"nowhere")
    with pytest.raises(ValueError, match="there is none"): solved_items(tmp_path)
    rows().to_csv(tmp_path/"a.csv")
    rows().to_csv(tmp_path/"b.csv")
    with pytest.raises(ValueError, match="a.csv, b.csv: name the file"): solved_items(tmp_path)

# ---- the folder ---------------------------------------------------------------------------------------------

def test_vectors_are_those_of_embed_items(bank, train):
    assert bank.store.fingerprint == embed_items(train, progress=False).fingerprint
    assert bank.fingerprint == DemoBank.build(train.iloc[::-1].iloc[::-1], progress=False).fingerprint

def test_a_saved_bank_opens_equal(bank, tmp_path):
    bank.save(tmp_path/"b")
    again = DemoBank.open(tmp_path/"b")
    assert again.fingerprint == bank.fingerprint and again.encoder.fingerprint == load_clip().fingerprint
    assert again.items.to_dict("records") == bank.items.to_dict("records")
    assert len((tmp_path/"b/README.md").read_text()) > 200

def test_a_broken_bank_is_named(bank, tmp_path):
    folder = bank.save(tmp_path/"b")
    part = folder/bank.fingerprint
    (folder/"bank.json").write_text("{}")
    with pytest.raises(ValueError, match="not the head of a bank"): DemoBank.open(folder)
    bank.save(folder)
    about = read_json(folder/"bank.json")
    (folder/"bank.json").write_text(json.dumps(about | dict(schema=99)))
    with pytest.raises(ValueError, match="later version"): DemoBank.open(folder)
    bank.save(folder)
    items = pd.read_parquet(part/"items.parquet")
    items.assign(answer="x").to_parquet(part/"items.parquet")
    with pytest.raises(ValueError, match="was it edited"): DemoBank.open(folder)
    (part/"items.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="items.parquet"): DemoBank.open(folder)

def test_a_killed_save_leaves_the_old_bank(bank, tmp_path, monkeypatch):
    folder = tmp_path/"b"
    small = DemoBank.build(rows(), folder=folder, progress=False)
    def killed(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr("leverplus.bank.write_json", killed)
    with pytest.raises(KeyboardInterrupt): small.append(rows(question="Another?"), progress=False)
    monkeypatch.undo()
    assert len(small) == 3 and DemoBank.open(folder).fingerprint == small.fingerprint
    small.append(rows(question="Another?"), progress=False)
    assert len(DemoBank.open(folder)) == 6
    assert len([p for p in folder.iterdir() if len(p.name) == 16]) == 1

def test_another_encoder_is_refused(bank, tmp_path):
    clip = load_clip()
    other = Clip(load_clip().model, clip.tokenizer, clip.image_processor, "other")
    with torch.no_grad(): other.model.text_projection.weight.mul_(1.5)
    folder = bank.save(tmp_path/"b")
    with pytest.raises(ValueError, match="were made by tiny-clip"): DemoBank.open(folder, other)
    unknown = DemoBank(bank.items, EmbedStore(bank.items.index, text=torch.randn(len(bank), 8)))
    with pytest.raises(ValueError, match="does not say what made its vectors"): unknown.encoder

def test_vectors_of_other_examples_are_refused(bank):
    with pytest.raises(ValueError, match="59 examples, and vectors of 60"): DemoBank(bank.items.iloc[1:], bank.store)

# ---- appending ----------------------------------------------------------------------------------------------

def test_appending_is_building_at_once(bank, train):
    grown = DemoBank.build(train.iloc[:40], progress=False).append(train.iloc[30:], progress=False)
    assert grown.fingerprint == bank.fingerprint
    assert torch.equal(grown.store.text, bank.store.text)

def test_only_the_new_are_embedded(train, monkeypatch):
    grown = DemoBank.build(train.iloc[:40], progress=False)
    seen = []
    monkeypatch.setattr(Clip, "texts", lambda self, texts: seen.extend(texts) or torch.ones(len(texts), 64))
    grown.append(train.iloc[:41], progress=False)
    assert seen == [train.question.iloc[40]]

@pytest.mark.parametrize("change", [dict(answer="x"), dict(question="x"), dict(image_path=None)])
def test_an_id_with_another_content_is_refused(bank, train, change):
    before = bank.fingerprint
    with pytest.raises(ValueError, match=f"question_id {train.index[0]} is in the bank with another"):
        bank.append(train.iloc[:1].assign(**change), progress=False)
    assert bank.fingerprint == before

def test_texts_and_pictures_in_one_bank(tmp_path):
    mixed = DemoBank.build(rows(), progress=False)
    assert mixed.store.kinds == ("text",)
    mixed.append(rows(question_id=[1, 2, 3], answers=[["a"]]*3), progress=False)
    assert mixed.items.answers.tolist() == [[]]*3 + [["a"]]*3
    mixed.save(tmp_path/"b")
    mixed.append(rows(question="In the picture?", image=[square("red")]*3), progress=False)
    assert mixed.store.kinds == ("image", "text", "mixed") and len(DemoBank.open(tmp_path/"b")) == 9
    assert mixed.picture_keys()[:6] == [None]*6

# ---- searching ----------------------------------------------------------------------------------------------

def test_search_is_nearest(bank):
    q = bank.items.index[3]
    ids, cos = bank.search(bank.store.get([q]), 6)
    want = nearest(bank.store, q, 5)
    assert ids[0, 0] == q and ids[0, 1:].tolist() == want.index.tolist()
    assert cos[0, 1:] == pytest.approx(want.to_numpy(), abs=2e-6)
    barred = np.ones((1, len(bank)), dtype=bool)
    barred[0, 5] = False
    ids, cos = bank.search(bank.store.get([q]), 3, barred=barred)
    assert ids.tolist() == [[bank.items.index[5], -1, -1]] and np.isneginf(cos[0, 1:]).all()

def test_questions_are_embedded_as_examples_are(bank):
    some = bank.items.iloc[:4]
    asked = bank.embed(some.drop(columns=["answer", "answers"]))
    assert torch.allclose(asked.get(some.index), bank.store.get(some.index), atol=1e-6)
    blind = bank.embed(some.drop(columns="image_path"))
    assert not blind.image.any() and blind.dim() == bank.store.dim()
    texts = DemoBank.build(rows(), progress=False)
    assert texts.embed(some).kinds == ("text",)

def test_the_same_picture_by_id_by_bytes_and_by_both(bank, tmp_path):
    items = bank.items
    first = items.iloc[[0]]
    by_id = first.drop(columns="image_path").set_index(pd.Index([1])).assign(question_id=1)
    copy = shutil.copy(first.image_path.iloc[0], tmp_path/"copy.png")
    by_bytes = by_id.assign(image_id=5, image_path=copy)
    want = (items.image_id == first.image_id.iloc[0]).to_numpy()
    for asked in (first, by_id, by_bytes, by_bytes.drop(columns="image_id")):
        assert (bank.same_picture(asked)[0] == want).all()
    nobody = by_id.assign(image_id=5)
    assert not bank.same_picture(nobody).any()

def test_what_answers_say_is_the_evidence_of_these_items(bank):
    assert bank.with_answers.evidence.fingerprint == Evidence(bank.items, bank.store, bank.items.index).fingerprint

# ---- pictures that change -----------------------------------------------------------------------------------

def test_a_damaged_picture_is_not_shown(tmp_path):
    "One bit of a file in the bank's folder; a file that is not here is not asked for"
    bank = DemoBank.build(rows(image=[square("red"), square("blue"), None]), folder=tmp_path/"b", progress=False)
    ids = bank.items.index.tolist()
    bank.check_pictures(ids)
    file = Path(bank.items.image_path.iloc[0])
    raw = bytearray(file.read_bytes())
    raw[-20] ^= 1
    file.write_bytes(raw)
    with pytest.raises(Damaged, match=rf"question_id {ids[0]}: .*{file.name} is not the picture that was embedded"):
        bank.check_pictures(ids)
    bank.check_pictures(ids[1:])
    file.unlink()
    bank.check_pictures(ids)
