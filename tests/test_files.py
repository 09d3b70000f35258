"Files as people have them: JSON with marks, packed, or none; pictures by any name; broken checkpoints"
import gzip, json, math, shutil, time
from pathlib import Path
import pytest, torch
from hypothesis import given, strategies as st
from PIL import Image
from leverplus.checkpoints import SETTINGS_FILES, check_checkpoint, read_state, read_weights
from leverplus.core import file_bytes, parse_json, read_json, world_path, write_json
from leverplus.data import BadItems, PictureFolder, find_image, read_okvqa, read_soft_labels, read_vqav2
from leverplus.earlier_json import detect

# ---- JSON

HELD = {"who": "caf\u00e9", "n": [1, 2.5, None]}
TEXT = json.dumps(HELD, ensure_ascii=False)
WRITTEN = {
    "plain": TEXT.encode(),
    "mark": TEXT.encode("utf-8-sig"),
    "utf-16": TEXT.encode("utf-16"),
    "utf-16 without a mark": TEXT.encode("utf-16-be"),
    "utf-32": TEXT.encode("utf-32"),
    "packed": gzip.compress(TEXT.encode()),
    "packed, with a mark": gzip.compress(TEXT.encode("utf-8-sig")),
    "Windows lines": TEXT.replace(",", ",\r\n").encode(),
}

@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a"])
def test_json_is_read_however_it_is_written(tmp_path, how, name):
    (tmp_path/name).write_bytes(WRITTEN[how])
    assert read_json(tmp_path/name) == HELD

OTHER = {
    "cut": (TEXT[:-5].encode(), "not valid JSON .*cut short"),
    "cut in a string": (b'{"who": "ca', "not valid JSON .*cut short"),
    "cut before a value": (b'[{"a": 1}, {"b":', "not valid JSON .*cut short"),
    "no JSON at all": (b"question_id,answer", "line 1 column 1 .*; mend that place"),
    "empty": (b"", "0 bytes of nothing"),
    "zeros": (bytes(4096), "4096 bytes of nothing"),
    "page": (b"\n<!doctype html>\n<html></html>", "an HTML page"),
    "page with a mark": (b"\xef\xbb\xbf<HTML>", "an HTML page"),
    "error of a store": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n", "Git LFS pointer.*lfs pull"),
    "zip": (b"PK\x03\x04 and so on", "a zip archive: unpack it"),
    "parquet": (b"PAR1 and so on", "a Parquet file"),
    "lines": (b'{"a": 1}\n{"a": 2}\n', "JSON lines, a value to a line"),
    "two on a line": (b'{"a": 1} {"a": 2}', r"Extra data: line 1 column 10.*; mend that place"),
    "comma": (b'{"a": [1, 2,]}', r"line 1 column 1\d"),
    "latin-1": ('{"a": "caf\u00e9"}'.encode("latin-1"), "byte 10 is not utf-8; save the file as UTF-8"),
    "twice": (b'{"a": {"b": 1, "b": 1}}', "key 'b' occurs twice in one object"),
    "packed and cut": (gzip.compress(TEXT.encode())[:-9], "packed by gzip, and broken.*cut short"),
    "packed page": (gzip.compress(b"<html>"), "an HTML page"),
}

@pytest.mark.parametrize("what", OTHER)
def test_what_is_no_json_is_named(tmp_path, what):
    content, says = OTHER[what]
    (tmp_path/"0.json").write_bytes(content)
    for read in (read_json, detect):
        with pytest.raises(ValueError, match=rf"0\.json: .*{says}") as e: read(tmp_path/"0.json")
        assert "cut short" not in str(e.value) or "cut" in what

def test_numbers_that_are_none_are_read_as_python_writes_them(tmp_path):
    write_json(tmp_path/"a.json", {"x": math.nan, "y": -math.inf})
    back = read_json(tmp_path/"a.json")
    assert math.isnan(back["x"]) and back["y"] == -math.inf
    assert parse_json(b"[NaN, 1]", "a", constant=str) == ["NaN", 1]

@given(st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
))
def test_anything_comes_back(value):
    for raw in (json.dumps(value).encode(), json.dumps(value, ensure_ascii=False).encode("utf-16")):
        assert parse_json(raw, "x") == value

# ---- data sets

Q, A = "OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json"

def put(root, question="what?", answer="red", image_id=42, **more):
    "A data set of one question"
    people = [dict(answer=answer, answer_id=i) for i in range(10)]
    write_json(root/Q, dict(questions=[dict(question_id=7, image_id=image_id, question=question)]))
    write_json(root/A, dict(annotations=[dict(question_id=7, image_id=image_id, answers=people, **more)]))
    return root

def test_packed_data_sets_are_read(tmp_path):
    put(tmp_path)
    for name in (Q, A):
        (tmp_path/(name + ".gz")).write_bytes(gzip.compress((tmp_path/name).read_bytes()))
        (tmp_path/name).unlink()
    assert read_okvqa(tmp_path, "train").answer.tolist() == ["red"]
    with pytest.raises(FileNotFoundError, match="the folder holds .*train2014_annotations.json.gz"):
        read_okvqa(tmp_path, "val")

def test_texts_are_composed_when_they_are_read(tmp_path):
    one, two = "caf\u00e9", "cafe\u0301"
    item = read_okvqa(put(tmp_path, f" {two}? ", two), "train").iloc[0]
    assert (item.question, item.answers, item.answer) == (f"{one}?", [one]*10, one)
    write_json(tmp_path/"v2_OpenEnded_mscoco_train2014_questions.json", read_json(tmp_path/Q))
    put(tmp_path, answer=two, multiple_choice_answer=two)
    write_json(tmp_path/"v2_mscoco_train2014_annotations.json", read_json(tmp_path/A))
    assert read_vqav2(tmp_path, "train").answer.tolist() == [one]
    soft = dict(question_id=7, label={two: 1}, img_id="COCO_x_000000000042")
    write_json(tmp_path/"train_soft_labels.json", [soft])
    assert read_soft_labels(tmp_path, "train").answers.tolist() == [[one]*10]

@pytest.mark.parametrize("field", ["question", "answer", "multiple_choice_answer"])
@pytest.mark.parametrize(
    "text,says", [("a <|im_start|>b", "the control token '<|im_start|>'"), ("\ud83d", "half a character")]
)
def test_texts_that_no_model_can_be_shown_are_bad_items(tmp_path, field, text, says):
    texts = dict(question="what?", answer="red", multiple_choice_answer="red") | {field: text}
    people = [dict(answer=texts["answer"], answer_id=i) for i in range(10)]
    asked = dict(question_id=7, image_id=42, question=texts["question"])
    said = dict(question_id=7, answers=people, multiple_choice_answer=texts["multiple_choice_answer"])
    for name, content in ((Q, dict(questions=[asked])), (A, dict(annotations=[said]))):
        (tmp_path/("v2_" + name)).write_text(json.dumps(content))
    with pytest.raises(BadItems) as e: read_vqav2(tmp_path, "train")
    where = "an answer" if field == "answer" else field
    assert f"question 7: {where} holds {says}" in str(e.value)

def test_a_label_that_is_no_number_is_a_bad_item(tmp_path):
    put(tmp_path)
    (tmp_path/"train_soft_labels.json").write_text('[{"question_id": 7, "label": {"red": NaN}}]')
    with pytest.raises(BadItems, match="question 7: score nan of 'red'"): read_soft_labels(tmp_path, "train")

def test_results_are_read_like_other_json(tmp_path):
    from leverplus.infer import check_results
    said = [dict(question_id=7, answer="red")]
    (tmp_path/"r.json").write_text(json.dumps(said), encoding="utf-8-sig")
    assert check_results(tmp_path/"r.json", [7]) == said
    (tmp_path/"r.json").write_text("<html>")
    with pytest.raises(ValueError, match="r.json: not valid JSON: an HTML page"): check_results(tmp_path/"r.json", [7])

# ---- pictures

@pytest.mark.parametrize("ending", ["jpg", "JPG", "jpeg", "JPEG", "png", "PNG", "Jpg"])
@pytest.mark.parametrize(
    "place,front",
    [
        ("", "COCO_train2014_"), ("train2014", "COCO_train2014_"), ("", ""), ("train2014", ""), ("train2017", ""),
        ("val2017", ""),
    ],
)
def test_pictures_are_found_by_any_of_their_names(tmp_path, place, front, ending):
    folder = tmp_path/"im"/place
    folder.mkdir(parents=True)
    file = folder/f"{front}000000000042.{ending}"
    Image.new("RGB", (8, 8)).save(file, format="PNG")
    (folder/f"{front}000000000043.txt").touch()
    assert find_image(tmp_path/"im", "train", 42) == file
    assert find_image(tmp_path/"im", "train", 43) is None and find_image(tmp_path/"im", "train", 4) is None
    items = read_okvqa(put(tmp_path), "train", images=tmp_path/"im")
    assert items.image_path.tolist() == [str(file)]

@pytest.mark.parametrize("name", ["COCO_test2015_000000000042.jpg", "test2015/COCO_test2015_000000000042.jpg"])
def test_test_pictures_are_those_of_2015(tmp_path, name):
    (tmp_path/name).parent.mkdir(exist_ok=True)
    (tmp_path/name).touch()
    assert find_image(tmp_path, "test", 42) == tmp_path/name
    assert find_image(tmp_path, "val", 42) is None

def test_pictures_of_another_split_are_not_taken(tmp_path):
    val = "COCO_val2014_000000000042.jpg"
    for name in (val, f"val2014/{val}", "val2014/000000000042.jpg"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).touch()
    assert find_image(tmp_path, "train", 42) is None
    assert find_image(tmp_path, "val", 42) == tmp_path/val

def test_two_files_for_one_picture(tmp_path):
    "Equal ones: the first in the documented order. Others: a bad item, by name"
    (tmp_path/"im"/"train2017").mkdir(parents=True)
    own = "COCO_train2014_000000000042"
    names = ["train2017/000000000042.jpg", f"{own}.png", f"{own}.JPG"]
    for name in names: Image.new("RGB", (8, 8)).save(tmp_path/"im"/name, format="PNG")
    assert find_image(tmp_path/"im", "train", 42).name == f"{own}.JPG"
    Image.new("RGB", (8, 8), "red").save(tmp_path/"im"/names[0], format="PNG")
    says = f"two files that differ, {own}.JPG and train2017/000000000042.jpg"
    with pytest.raises(ValueError, match=says): find_image(tmp_path/"im", "train", 42)
    put(tmp_path)
    with pytest.raises(BadItems, match="COCO_train2014_000000000042: question 7: two files that differ"):
        read_okvqa(tmp_path, "train", images=tmp_path/"im")

def test_a_picture_that_is_not_there_says_what_was_sought(tmp_path):
    (tmp_path/"im"/"val2017").mkdir(parents=True)
    with pytest.raises(BadItems) as e: read_okvqa(put(tmp_path), "train", images=tmp_path/"im")
    sought = "no COCO_train2014_000000000042 or 000000000042 (.jpg, .jpeg, .png) in im, im/val2017"
    assert f"COCO_train2014_000000000042: question 7: no such image: {sought}" in str(e.value)

def test_a_folder_is_listed_once(tmp_path, monkeypatch):
    n = 20_000
    for i in range(n): (tmp_path/f"COCO_train2014_{i:012d}.jpg").touch()
    folder = PictureFolder(tmp_path, "train")
    monkeypatch.setattr("os.scandir", lambda *_: pytest.fail("listed again"))
    monkeypatch.setattr(Path, "is_file", lambda *_: pytest.fail("asked for a name"))
    start = time.process_time()
    assert all(folder.find(i).stem.endswith(str(i)) for i in range(n))
    assert time.process_time() - start < 3

# ---- checkpoints

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n"
DAMAGE = {
    "cut": lambda raw: raw[:len(raw)//2],
    "empty": lambda raw: b"",
    "zeros": lambda raw: bytes(len(raw)),
    "pointer": lambda raw: POINTER,
    "page": lambda raw: b"<!DOCTYPE html><html>404</html>",
    "mark": lambda raw: b"\xef\xbb\xbf" + raw,
}

def load(kind, folder):
    from leverplus.embed import load_clip
    from leverplus.lvlm import load_lvlm
    from leverplus.selector import PointerSelector
    return dict(lvlm=load_lvlm, clip=load_clip, selector=PointerSelector.from_pretrained)[kind](folder)

@pytest.fixture(scope="module", params=["lvlm", "clip", "selector"])
def checkpoint(request, tmp_path_factory):
    from leverplus.selector import PointerSelector
    kind = request.param
    d = tmp_path_factory.mktemp("checkpoints")/kind
    if kind == "selector": PointerSelector(8, d_hidden=8).save_pretrained(d, info=dict(data="ab"))
    else: shutil.copytree(world_path("models", dict(lvlm="tiny-qwen2.5-vl", clip="tiny-clip")[kind]), d)
    return kind, d

@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_file_of_a_checkpoint_is_named(checkpoint, damage):
    kind, folder = checkpoint
    def is_read(file): return file.name in SETTINGS_FILES or file.suffix in (".safetensors", ".jinja")
    files = list(filter(is_read, sorted(folder.iterdir())))
    assert len(files) == dict(lvlm=7, clip=5, selector=2)[kind]
    for file in files:
        if damage == "cut" and file.suffix == ".jinja": continue    # half a text is a text
        whole = file.read_bytes()
        file.write_bytes(DAMAGE[damage](whole))
        with pytest.raises(ValueError) as e: load(kind, folder)
        assert str(e.value).startswith(f"{file}: "), e.value
        file.write_bytes(whole)
    load(kind, folder)

def test_settings_that_are_no_object(checkpoint):
    kind, folder = checkpoint
    whole = (folder/"config.json").read_text()
    (folder/"config.json").write_text("null")
    with pytest.raises(ValueError, match="config.json: holds a NoneType, wanted an"): load(kind, folder)
    (folder/"config.json").write_text(whole)

def test_other_files_do_not_matter(checkpoint):
    kind, folder = checkpoint
    for name in ("notes.json", "README.md"): (folder/name).write_bytes(b"\xef\xbb\xbf no JSON")
    check_checkpoint(folder)
    check_checkpoint(folder/"nowhere")
    check_checkpoint("nobody/has-this-one")

def test_a_broken_file_in_the_cache_of_the_hub_is_named(tmp_path, monkeypatch):
    snapshot = tmp_path/"models--me--tiny"/"snapshots"/"ab"
    shutil.copytree(world_path("models", "tiny-clip"), snapshot)
    (tmp_path/"models--me--tiny"/"refs").mkdir()
    (tmp_path/"models--me--tiny"/"refs"/"main").write_text("ab")
    import huggingface_hub
    asked = huggingface_hub.try_to_load_from_cache
    def here(name, file): return asked(name, file, cache_dir=tmp_path)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", here)
    check_checkpoint("me/tiny")
    (snapshot/"tokenizer.json").write_text('{"cut')
    with pytest.raises(ValueError, match="ab/tokenizer.json: not valid JSON"): check_checkpoint("me/tiny")

@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_state_is_named(tmp_path, damage):
    file = tmp_path/"state.pt"
    torch.save({"epoch": 3, "w": torch.ones(100)}, file)
    assert read_state(file)["epoch"] == 3
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    says = r"state\.pt: no saved state can be read from it .*remove it to begin anew"
    with pytest.raises(ValueError, match=says): read_state(file)

def test_a_fit_that_goes_on_names_its_broken_state(tmp_path):
    from leverplus.callback_track import Resume
    from leverplus.losses import regret
    from leverplus.synth import quiet, synth_dls, toy_learner
    def fit():
        learn = toy_learner(regret, synth_dls(8, 4, bs=4), cbs=Resume(tmp_path/"stage"))
        with quiet(learn): learn.fit(1)
    fit()
    state = tmp_path/"stage"/"state.pt"
    whole = state.read_bytes()
    for cut, says in ((50, "damaged, since its bytes are not"), (150, "no saved state can be read")):
        state.write_bytes(whole[:-cut])
        with pytest.raises(ValueError, match=rf"stage/state\.pt: {says}"): fit()

@pytest.mark.parametrize("damage", [d for d in DAMAGE if d != "mark"])
def test_a_broken_store_is_named(tmp_path, damage):
    from leverplus.embed import EmbedStore
    EmbedStore([1, 2], torch.eye(2), torch.eye(2), {}).save(tmp_path)
    for name in ("embed.safetensors", "embed.json"):
        whole = (tmp_path/name).read_bytes()
        (tmp_path/name).write_bytes(DAMAGE[damage](whole))
        with pytest.raises(ValueError, match=name): EmbedStore.load(tmp_path)
        (tmp_path/name).write_bytes(whole)
    EmbedStore.load(tmp_path)

def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="b: no such file; was the"): read_weights(tmp_path/"b")
    with pytest.raises(FileNotFoundError, match="a.json: no such file"): file_bytes(tmp_path/"a.json")
