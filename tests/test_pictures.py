"Pictures: one decoder whose pixels both models see, one key; what cannot be read is refused by name"
import ast, io, os, pickle, socket, struct, warnings, zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageFile, PngImagePlugin
import leverplus.pictures as pictures
from leverplus.data import image_fault
from leverplus.embed import Clip, embed_items, load_clip
from leverplus.lvlm import NaiveScorer, Targets, compare, load_lvlm, official_inputs, prompt_images
from leverplus.pictures import (
    ASPECT_LIMIT, TOKEN_SIDES, BadPicture, NoPicture, open_image, picture_fault, picture_file, picture_key,
    picture_size, read_picture,
)
from leverplus.prompt import Demo, Prompt
from leverplus.cases import item_picture
from leverplus.scorer import SharedScorer
from leverplus.vision import VisionCache, VisionEncoder, open_resized

ROOT = Path(__file__).resolve().parent.parent
RGB = np.random.default_rng(0).integers(256, size=(40, 52, 3), dtype=np.uint8)
GREY = RGB[..., 0]

# ---- files of every kind -----------------------------------------------------------------------------------

def saved(pixels, kind="PNG", mode=None, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if mode is not None: image = image.convert(mode)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()

def png(pixels, depth, colours, key=b""):
    "A PNG file written by hand: samples of any depth, and a transparent colour"
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    h, w = pixels.shape[:2]
    lines = []
    for row in pixels:
        bits = "".join(format(int(v), f"0{depth}b") for v in np.ravel(row))
        bits += "0"*(-len(bits) % 8)
        lines.append(b"\0" + int(bits, 2).to_bytes(len(bits)//8, "big"))
    head = struct.pack(">IIBBBBB", w, h, depth, colours, 0, 0, 0)
    transparent = chunk(b"tRNS", key) if key else b""
    body = chunk(b"IDAT", zlib.compress(b"".join(lines)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + transparent + body + chunk(b"IEND", b"")

def tiff(data, width, height, bits, sample=1, photometric=1):
    "A TIFF file of one channel written by hand"
    tags = [
        (256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric),
        (273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(data)), (339, 3, sample),
    ]
    data += b"\0"*(len(data) % 2)
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + b"\0"*4
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory

def exif(orientation):
    out = Image.Exif()
    out[0x0112] = orientation
    return out

def grey(values): return np.asarray(values, np.uint8)[..., None].repeat(3, -1)

def over_white(rgb, alpha):
    share = alpha[..., None].astype(float)/255
    return np.floor(rgb*share + 255*(1 - share) + .5).astype(np.uint8)

ALPHA = np.random.default_rng(1).choice([0, 51, 128, 255], size=(40, 52)).astype(np.uint8)
DEEP = np.random.default_rng(2).integers(65536, size=(40, 52)).astype(np.uint16)
DEEP_RGB = np.random.default_rng(3).integers(65536, size=(40, 52, 3)).astype(np.uint16)
TWO = np.random.default_rng(4).integers(4, size=(40, 52)).astype(np.uint8) # samples of two bits
LEVEL = np.full((30, 30, 3), (200, 30, 90), np.uint8)
BLACK = np.zeros((30, 40), np.uint8)
DISPLAYED = { # orientation -> stored pixels of what is to be seen as RGB
    1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.transpose(1, 0, 2), 6: np.rot90(RGB, 1),
    7: RGB[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(RGB, -1),
}

def palette(transparency):
    "Three colours in stripes; `transparency` of the palette"
    image = Image.fromarray((np.arange(40*52).reshape(40, 52) % 3).astype(np.uint8))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return saved(image, transparency=transparency)

STRIPES = np.eye(3, dtype=np.uint8)[np.arange(40*52).reshape(40, 52) % 3]*255

def with_clear_stripe(index, alpha):
    out = STRIPES.copy()
    stripe = np.arange(40*52).reshape(40, 52) % 3 == index
    out[stripe] = over_white(STRIPES, np.full((40, 52), alpha, np.uint8))[stripe]
    return out

def key_as_white(values, key): return np.where(values == key, 255, values)

def frames(kind, pixels=RGB, **options):
    return saved(pixels, kind, save_all=True, append_images=[Image.fromarray(255 - pixels)], **options)

def with_xmp(orientation):
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", f'<rdf:Description tiff:Orientation="{orientation}"/>')
    return saved(DISPLAYED[orientation], pnginfo=notes)

def bits12(values):
    "Pairs of values of 12 bits as three bytes"
    bits = "".join(format(v, "012b") for v in values)
    return int(bits, 2).to_bytes(len(bits)//8, "big")

one_clear = (RGB == RGB[3, 3]).all(-1, keepdims=True)
RGB_KEY = np.where(one_clear, 255, RGB).astype(np.uint8)
DEEP_KEY = np.where(DEEP == DEEP[3, 3], 255, DEEP >> 8)
STRETCHED = np.floor(255*(DEEP - float(DEEP.min()))/(DEEP.max() - float(DEEP.min())) + .5)
BITS12 = tiff(bits12([0, 15, 16, 2048, 4095, 4080]*40), 6, 40, 12)
RGBA16 = np.dstack([DEEP_RGB, ALPHA.astype(np.uint16)*257])
FAR = np.float32([[-2, 0, 2], [1, -1, 2]]*20)
SIGNED = np.tile(np.array([-1000, 0, 1000, 3000], np.int16), (40, 10))
WIDE = np.tile(np.array([0, 2**31, 2**32 - 1], np.uint32), (30, 10))
LONG = Image.new("RGB", (1, 200), (200, 30, 90))

CASES = { # name -> (file, what everybody sees)
    "grey of 16 bits": (saved(DEEP), grey(DEEP >> 8)),
    "grey of 16 bits, TIFF": (saved(DEEP, "TIFF"), grey(DEEP >> 8)),
    "grey of 16 bits, big-endian TIFF": (saved(Image.fromarray(DEEP.astype(">u2")), "TIFF"), grey(DEEP >> 8)),
    "grey of 16 bits, PGM": (b"P5 52 40 65535\n" + DEEP.astype(">u2").tobytes(), grey(DEEP >> 8)),
    "grey of 16 bits, all below 256": (saved(DEEP & 255), grey(DEEP*0)),
    "grey of 12 bits": (BITS12, grey([[0, 0, 1, 128, 255, 255]]*40)),
    "16 bits, 0 is white": (tiff(DEEP.tobytes(), 52, 40, 16, photometric=0), grey(255 - (DEEP >> 8))),
    "colours of 16 bits": (png(DEEP_RGB, 16, 2), (DEEP_RGB >> 8).astype(np.uint8)),
    "floats within 0..1": (saved(GREY.astype(np.float32)/255, "TIFF"), grey(GREY)),
    "floats within 0..255": (saved(GREY.astype(np.float32), "TIFF"), grey(GREY)),
    "floats beyond": (saved(FAR, "TIFF"), grey([[0, 128, 255], [191, 64, 255]]*20)),
    "floats a little beyond 1": (saved(np.float32([[0, .5, 1.001]]*30), "TIFF"), grey([[0, 127, 255]]*30)),
    "large floats": (saved(np.float32([[3e38, -3e38, 0]]*30), "TIFF"), grey([[255, 0, 128]]*30)),
    "floats, all alike": (saved(np.full((30, 30), 7e4, np.float32), "TIFF"), grey(np.full((30, 30), 128))),
    "floats, PFM": (b"Pf\n3 1\n-1.0\n" + np.float32([0, .5, 1]).tobytes(), grey([[0, 128, 255]])),
    "16 bits with a sign": (tiff(SIGNED.tobytes(), 40, 40, 16, sample=2), grey([[0, 64, 128, 255]*10]*40)),
    "32 bits": (tiff(WIDE.tobytes(), 30, 30, 32), grey([[0, 128, 255]*10]*30)),
    "32 bits with a sign": (saved(DEEP.astype(np.int32) - 9, "TIFF"), grey(STRETCHED)),
    "RGBA": (saved(np.dstack([RGB, ALPHA])), over_white(RGB, ALPHA)),
    "RGBA, WebP": (saved(np.dstack([RGB, ALPHA]), "WEBP", lossless=True, exact=True), over_white(RGB, ALPHA)),
    "RGBA of 16 bits": (png(RGBA16, 16, 6), over_white(DEEP_RGB >> 8, ALPHA)),
    "grey with alpha": (saved(np.dstack([GREY, ALPHA])), over_white(grey(GREY), ALPHA)),
    "palette, one entry clear": (palette(1), with_clear_stripe(1, 0)),
    "palette, one entry half clear": (palette(bytes([255, 255, 51])), with_clear_stripe(2, 51)),
    "palette, opaque": (palette(None), STRIPES),
    "grey, one clear": (saved(GREY, transparency=int(GREY[3, 3])), grey(key_as_white(GREY, GREY[3, 3]))),
    "RGB, one clear": (png(RGB, 8, 2, struct.pack(">HHH", *RGB[3, 3])), RGB_KEY),
    "grey of 1 bit, black clear": (png(TWO % 2, 1, 0, struct.pack(">H", 0)), grey(np.full((40, 52), 255))),
    "grey of 1 bit, white clear": (png(TWO % 2, 1, 0, struct.pack(">H", 1)), grey(255*(TWO % 2))),
    "grey of 2 bits, one clear": (png(TWO, 2, 0, struct.pack(">H", 1)), grey(key_as_white(85*TWO, 85))),
    "grey of 4 bits, one clear": (png(TWO, 4, 0, struct.pack(">H", 2)), grey(key_as_white(17*TWO, 34))),
    "grey of 16 bits, one clear": (png(DEEP, 16, 0, struct.pack(">H", DEEP[3, 3])), grey(DEEP_KEY)),
    "CMYK": (saved(LEVEL, "TIFF", mode="CMYK"), LEVEL),
    "CMYK, JPEG": (saved(LEVEL, "JPEG", mode="CMYK", quality=100), LEVEL),
    "YCbCr": (saved(LEVEL, "JPEG", quality=100), LEVEL),
    "black and white": (saved(Image.fromarray(BLACK > 0)), grey(BLACK)),
    "GIF": (saved(grey(BLACK + 60), "GIF"), grey(BLACK + 60)),
    "GIF of two frames": (frames("GIF", grey(BLACK + 60)), grey(BLACK + 60)),
    "PNG of two frames": (frames("PNG"), RGB),
    "TIFF of two pages": (frames("TIFF"), RGB),
    "WebP of two frames": (frames("WEBP", lossless=True), RGB),
    "1 x 1": (saved(LEVEL[:1, :1]), LEVEL[:1, :1]),
    "3 x 1": (saved(LEVEL[:1, :3]), LEVEL[:1, :3]),
    "1 x 3": (saved(LEVEL[:3, :1]), LEVEL[:3, :1]),
    "1 x 200": (saved(LONG), np.array(LONG)),
    "200 x 1": (saved(LONG.transpose(Image.Transpose.ROTATE_90)), np.array(LONG).transpose(1, 0, 2)),
    "turned by XMP": (with_xmp(6), RGB),
    "EXIF that is none": (saved(RGB, exif=b"Exif\0\0nothing"), RGB),
    "EXIF 9": (saved(RGB, exif=exif(9)), RGB),
    "ICC profile": (saved(RGB, icc_profile=b"no profile at all"), RGB),
}
for o, stored in DISPLAYED.items():
    for kind in ("PNG", "TIFF"): CASES[f"{kind}, EXIF {o}"] = (saved(stored, kind, exif=exif(o)), RGB)
    CASES[f"WebP, EXIF {o}"] = (saved(stored, "WEBP", exif=exif(o), lossless=True), RGB)
CASES["grey of 16 bits, EXIF 6"] = (saved(np.rot90(DEEP, 1).copy(), exif=exif(6)), grey(DEEP >> 8))

LOSSY = {"CMYK, JPEG": 3, "YCbCr": 2} # name -> largest difference that compression explains
each = pytest.mark.parametrize("name", CASES)

def difference(image, wanted):
    got = np.asarray(image)
    assert got.shape == wanted.shape and got.dtype == np.uint8
    return int(np.abs(got.astype(int) - wanted.astype(int)).max())

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "{name: path} of all cases; the endings say nothing"
    folder = tmp_path_factory.mktemp("pictures")
    out = {}
    for i, (name, (data, _)) in enumerate(CASES.items()):
        out[name] = str(folder/f"{i}.png")
        Path(out[name]).write_bytes(data)
    return out

@pytest.fixture(scope="module")
def lvlm(): return load_lvlm()

@pytest.fixture(scope="module")
def clip(): return load_clip()

@pytest.fixture(autouse=True)
def said(monkeypatch):
    "Warnings that were given are forgotten behind each test"
    monkeypatch.setattr(pictures, "_SAID", set())

quiet = pytest.mark.filterwarnings("ignore:.*several frames", "ignore:.*EXIF")

# ---- what everybody sees -----------------------------------------------------------------------------------

@quiet
@each
def test_pixels_are_right(name, files):
    data, wanted = CASES[name]
    image = open_image(data)
    assert image.mode == "RGB" and difference(image, wanted) <= LOSSY.get(name, 0)
    assert open_image(files[name]).tobytes() == image.tobytes()
    assert open_image(Path(files[name])).tobytes() == image.tobytes()
    assert picture_size(data) == picture_size(files[name]) == image.size
    assert picture_fault(files[name]) == picture_fault(files[name], pixels=False) == ""
    assert image_fault(files[name]) == image_fault(files[name], "header") == ""

@quiet
@each
def test_clip_is_given_these_pixels(name, files, clip, monkeypatch):
    given = []
    def images(self, batch):
        given.extend(batch)
        return torch.ones(len(batch), 3)
    monkeypatch.setattr(Clip, "images", images)
    items = pd.DataFrame(dict(question_id=[7], image_path=[files[name]], question=["what?"]))
    store = embed_items(items, clip, progress=False)
    assert difference(given[0], CASES[name][1]) <= LOSSY.get(name, 0)
    assert store.meta["image_hash"] == [picture_key(files[name])]

@quiet
@each
def test_fast_scorer_and_reference_see_the_same_pixels(name, files, lvlm):
    "Which are those of qwen_vl_utils for the right RGB"
    from qwen_vl_utils import process_vision_info
    path = files[name]
    wanted = Image.fromarray(CASES[name][1])
    if name in LOSSY: wanted = open_image(path)
    resized, _ = process_vision_info([dict(role="user", content=[dict(type="image", image=wanted)])])
    pixels = lvlm.image_processor(images=resized, return_tensors="pt")["pixel_values"]
    encoder = VisionEncoder(lvlm.model, lvlm.image_processor, VisionCache("pixels"))
    assert torch.equal(encoder._prepare(picture_key(path), path).values, pixels)
    prompt = Prompt(7, path, "what?", (Demo(8, path, "who?", "dax"),))
    official = official_inputs(lvlm, [lvlm.render(prompt)], [prompt_images(lvlm, prompt)])
    assert torch.equal(official["pixel_values"], torch.cat([pixels, pixels]))

@quiet
def test_scorers_agree_on_strange_pictures(files, lvlm):
    some = [
        "grey of 16 bits", "floats beyond", "RGBA", "palette, one entry clear", "PNG, EXIF 6", "1 x 1",
        "1 x 200", "GIF of two frames", "CMYK", "grey with alpha",
    ]
    prompts = [
        Prompt(i, files[name], "what is this?", (Demo(100, files[other], "who?", "dax"),))
        for i, (name, other) in enumerate(zip(some, some[1:] + some[:1]))
    ]
    targets = [Targets(("dax", "yes"), (1., 1.))]*len(prompts)
    found = compare(SharedScorer(lvlm).run(prompts, targets), NaiveScorer(lvlm).run(prompts, targets))
    assert found["failed"] == found["text"] == 0 and found["logprob"] < lvlm.tolerance

def processors(folder):
    "Of a model, one per backend of transformers"
    from transformers import AutoImageProcessor, CLIPImageProcessorPil
    return [AutoImageProcessor.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)]

SMALL = [(1, 1), (3, 1), (1, 3), (3, 3), (4, 3), (1, 200), (200, 1), (3, 300), (300, 3)]

@pytest.mark.parametrize("size", SMALL)
def test_a_side_of_one_or_three_is_no_channel(size, lvlm, clip):
    "A picture of one colour stays of that colour, in every channel, whatever its sides"
    colour = np.array([200, 30, 90])
    image = open_image(saved(Image.new("RGB", size, tuple(colour.tolist()))))
    for processor in (clip.image_processor, *processors(ROOT/"models"/"tiny-clip")):
        pixels = processor(images=[image], return_tensors="pt")["pixel_values"] # [1,3,H,W]
        assert np.abs(as_colours(pixels, processor) - colour[:, None]).max() < .01
    processor = lvlm.image_processor
    patches = processor(images=[open_resized(saved(image))], return_tensors="pt")["pixel_values"] # [n,3*C]
    assert np.abs(as_colours(patches, processor) - colour[:, None]).max() < .01

def as_colours(pixels, processor):
    "What a processor made of pixels, taken back: [n,3,..] in 0..255"
    pixels = pixels.double().numpy().reshape(len(pixels), 3, -1)
    return 255*(pixels*np.reshape(processor.image_std, (3, 1)) + np.reshape(processor.image_mean, (3, 1)))

def test_ordinary_pictures_are_what_they_were():
    "The islands: bit by bit what Pillow's plain conversion gives"
    paths = sorted((ROOT/"data"/"islands"/"images").rglob("*.png"))
    assert len(paths) > 100
    for path in paths:
        with Image.open(path) as plain: assert open_image(path).tobytes() == plain.convert("RGB").tobytes()

def test_pictures_of_reports_are_upright_and_small(files):
    items = pd.DataFrame(dict(question_id=[7], image_path=[files["PNG, EXIF 6"]]))
    assert difference(item_picture(items, 7), RGB) == 0
    assert item_picture(items, 7, 26).size == (26, 20)

def test_nobody_else_decodes():
    "A second decoder would read some file in another way"
    readers = ("Image.open", "PIL.Image.open", "plt.imread", "process_vision_info")
    found = set()
    for path in [*(ROOT/"leverplus").rglob("*.py"), *(ROOT/"bench").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in readers:
                found.add((path.name, ast.unparse(node.func)))
    assert found == {("pictures.py", "Image.open"), ("vision.py", "process_vision_info")}

# ---- several frames ----------------------------------------------------------------------------------------

def test_several_frames_are_said_once(files):
    with warnings.catch_warnings(record=True) as given, ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("always")
        names = ["GIF of two frames", "PNG of two frames", "TIFF of two pages", "WebP of two frames"]
        list(pool.map(open_image, [files[name] for name in names*4]))
    assert len(given) == 1
    assert any(f"{files[name]} has several frames" in str(given[0].message) for name in names)

@pytest.mark.filterwarnings("error:.*frames")
def test_whoever_makes_warnings_errors_gets_this_one(files):
    with pytest.raises(UserWarning, match="has several frames"): open_image(files["GIF of two frames"])

@pytest.mark.filterwarnings("error:.*frames")
def test_one_frame_says_nothing(files):
    for name in ("GIF", "PNG, EXIF 1", "grey of 16 bits, TIFF"): open_image(files[name])

# ---- what is refused ---------------------------------------------------------------------------------------

def damaged():
    data = bytearray(saved(RGB))
    data[len(data)//2] ^= 1
    return bytes(data)

NOISE = np.random.default_rng(5).integers(256, size=(64, 64, 3), dtype=np.uint8)
REFUSED = { # name -> (file, words, seen from the header alone?)
    "empty": (b"", "file is empty", True),
    "text": (b"not found", "no format that Pillow reads", True),
    "web page": (b"<html>not found</html>", "is an HTML page", True),
    "HEIC of a phone": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0"*99, "is HEIC, which Pillow does not read", True),
    "pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer", True),
    "drawing": (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "is SVG", True),
    "cut PNG": (saved(NOISE)[:3000], "is broken", True),
    "cut JPEG": (saved(NOISE, "JPEG")[:1500], "truncated", False),
    "cut GIF": (saved(NOISE, "GIF")[:2500], "is broken", False),
    "cut BMP": (saved(NOISE, "BMP")[:2500], "truncated", False),
    "a wrong bit": (damaged(), "is broken", True),
    "1 x 201": (saved(Image.new("RGB", (1, 201))), "is 1 x 201 pixels", True),
    "300 x 1": (saved(Image.new("RGB", (300, 1))), "is 300 x 1 pixels", True),
    "601 x 3": (saved(Image.new("L", (601, 3))), "is 601 x 3 pixels", True),
    "41 x 8200": (saved(Image.new("L", (41, 8200))), "become 1 x 293 visual tokens", True),
    "bomb": (b"P6 20000 20000 255 ", "is too large", True),
    "large": (b"P6 9000 9000 255 ", "is too large: 9000 x 9000 pixels, of which at most 64,000,000", True),
    "not a number": (saved(np.float32([[0, np.nan]]), "TIFF"), "not finite", False),
    "infinite": (saved(np.float32([[0, np.inf]]), "TIFF"), "not finite", False),
    "16 bits, one clear": (png(DEEP_RGB, 16, 2, b"\0"*6), "save it with an alpha channel", False),
}
each_refused = pytest.mark.parametrize("name", REFUSED)

@each_refused
def test_what_cannot_be_read_is_refused_by_name(name, tmp_path, lvlm, clip):
    data, words, in_header = REFUSED[name]
    path = tmp_path/"odd.png"
    path.write_bytes(data)
    told = f"odd.png: image of question_id 17 .*{words}"
    with pytest.raises(BadPicture, match=told): open_image(path, question_id=17)
    with pytest.raises(BadPicture, match=f"a name: cannot be read.*{words}"): open_image(data, "a name")
    with pytest.raises(BadPicture, match=f"picture of {len(data)} bytes.*{words}"): open_image(data)
    assert words in picture_fault(path) and words in image_fault(path)
    assert picture_fault(path, pixels=False) == (picture_fault(path) if in_header else "")
    assert (image_fault(path, "header") != "") == in_header
    assert (image_fault(path, "exists") != "") == (data == b"")
    items = pd.DataFrame(dict(question_id=[17], image_path=[str(path)], question=["what?"]))
    with pytest.raises(BadPicture, match=told): embed_items(items, clip, progress=False)
    prompt = Prompt(17, str(path), "what?")
    for scorer in (SharedScorer(lvlm), NaiveScorer(lvlm)):
        error = scorer.run([prompt], [Targets(("dax",), (1.,))])[0].error
        assert error.startswith("BadPicture") and "odd.png" in error and words in error

def test_an_error_is_caught_as_either_and_travels_and_is_the_same_in_every_run():
    for kind in (OSError, ValueError):
        with pytest.raises(kind): open_image(b"no picture")
    def text():
        with pytest.raises(BadPicture) as e: open_image(b"no picture", "x.png", 3)
        return str(e.value)
    assert text() == text() and "0x" not in text()
    with pytest.raises(BadPicture) as e: open_image(b"", "x.png", 3)
    back = pickle.loads(pickle.dumps(e.value))
    assert (str(back), back.why) == (str(e.value), e.value.why)

def test_missing_files_and_items_without_one(tmp_path):
    gone = tmp_path/"gone.png"
    told = "gone.png: image of question_id 17 does not exist"
    without = "question_id 17 has no image_path"
    for look in (open_image, picture_size, picture_key, picture_file, read_picture):
        with pytest.raises(NoPicture, match=told): look(gone, question_id=17)
        with pytest.raises(FileNotFoundError): look(str(gone))
        for none in (None, np.nan, pd.NA):
            with pytest.raises(BadPicture, match=without): look(none, question_id=17)
    assert picture_fault(gone) == "does not exist" and "no image_path" in picture_fault(None)
    with pytest.raises(BadPicture, match="does not exist"): open_image(tmp_path)

def test_limit_is_the_processors(lvlm):
    from qwen_vl_utils.vision_process import MAX_RATIO
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
    assert ASPECT_LIMIT == MAX_RATIO
    smart_resize(ASPECT_LIMIT, 1)
    with pytest.raises(ValueError): smart_resize(ASPECT_LIMIT + 1, 1)

SIDES = st.tuples(st.integers(1, 400), st.floats(60, 210), st.booleans())

@settings(max_examples=400, deadline=None, derandomize=True)
@given(SIDES)
def test_long_pictures_are_refused_where_the_processors_refuse_them(sides):
    "By qwen_vl_utils as they are, or by transformers as qwen_vl_utils resizes them"
    from qwen_vl_utils.vision_process import smart_resize
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as second
    short, ratio, lying = sides
    width, height = (round(short*ratio), short) if lying else (short, round(short*ratio))
    taken = True
    for side in TOKEN_SIDES:
        try: second(*smart_resize(height, width, side), side)
        except ValueError: taken = False
    if taken: pictures._check_sides(width, height)
    else:
        told = f"{width} x {height} pixels"
        with pytest.raises(pictures._Refusal, match=told): pictures._check_sides(width, height)

@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 9000), st.integers(1, 9000), st.sampled_from(TOKEN_SIDES))
def test_whole_tokens_are_those_of_qwen_vl_utils(width, height, side):
    from qwen_vl_utils.vision_process import smart_resize
    if max(width, height) > ASPECT_LIMIT*min(width, height): return
    h, w = smart_resize(height, width, side)
    assert pictures._in_tokens(width, height, side) == (w//side, h//side)

def test_cut_files_do_not_pass_because_of_a_switch(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES is on"): open_image(saved(RGB))

# ---- one key -----------------------------------------------------------------------------------------------

def test_key_is_the_content(tmp_path):
    a, b = tmp_path/"a.png", tmp_path/"b.png"
    a.write_bytes(saved(RGB))
    b.write_bytes(saved(RGB))
    assert picture_key(a) == picture_key(str(b)) and len(picture_key(a)) == 32
    for i in range(20): # written again and again within a tick, as long as before
        b.write_bytes(saved(RGB)[:-1] + bytes([i]))
        assert picture_key(b) == pictures.content_hash(b.read_bytes())

def test_a_settled_file_is_read_once_and_again_when_written_to(tmp_path, monkeypatch):
    path = tmp_path/"a.png"
    path.write_bytes(saved(RGB))
    monkeypatch.setattr(pictures, "_SETTLED", -1) # at once
    read = []
    real = pictures.content_hash
    def content_hash(data):
        read.append(len(data))
        return real(data)
    monkeypatch.setattr(pictures, "content_hash", content_hash)
    before = [picture_key(path) for _ in range(3)]
    assert len(set(before)) == 1 and len(read) == 1
    path.write_bytes(saved(RGB[::-1].copy()) + b" ")
    assert picture_key(path) != before[0] and len(read) == 2

def test_a_picture_that_changes_while_it_is_embedded_is_refused(tmp_path, clip, monkeypatch):
    import leverplus.embed as mod
    path = tmp_path/"a.png"
    path.write_bytes(saved(RGB))
    def changed_behind(path, question_id):
        key = picture_key(path, question_id)
        Path(path).write_bytes(saved(RGB[::-1].copy()))
        return key
    monkeypatch.setattr(mod, "picture_key", changed_behind)
    items = pd.DataFrame(dict(question_id=[17], image_path=[str(path)], question=["what?"]))
    with pytest.raises(BadPicture, match="a.png: image of question_id 17 changed while it was being read"):
        embed_items(items, clip, progress=False)

# ---- files as people have them -----------------------------------------------------------------------------

SMALL = Image.new("RGB", (8, 6), (200, 100, 50))

NAMES = ["a b.png", "\u00fc\u65e5.png", "100%20.png", "~x.png", "#?&.png", "A.PNG", "not_a.gif"]

@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_taken_as_it_stands(name, tmp_path, monkeypatch):
    (tmp_path/name).write_bytes(saved(SMALL))
    os.symlink(tmp_path/name, tmp_path/"link")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path/name, str(tmp_path/name), name, tmp_path/"link"):
        assert difference(open_image(path), np.asarray(SMALL)) == 0 and image_fault(path) == ""
        assert picture_key(path) == picture_key(tmp_path/name)

def no_files(folder):
    "{name: path of something that is no picture file}"
    os.mkfifo(folder/"pipe.png")
    os.symlink(folder/"gone.png", folder/"dangling.png")
    os.symlink(folder/"loop.png", folder/"loop.png")
    with open(folder/"large.png", "wb") as file: file.truncate(5 * 2**30)
    return {
        "folder": (folder, "does not exist as a file"),
        "pipe": (folder/"pipe.png", "does not exist as a file"),
        "device": ("/dev/zero", "does not exist as a file"),
        "dangling": (folder/"dangling.png", "does not exist"),
        "loop": (folder/"loop.png", "does not exist"),
        "address": (f"file://{folder}/a.png", "is an address, wanted the path of a file"),
        "web": ("https://example.com/a.png", "is an address"),
        "home": ("~/gone.png", 'a "~" is not expanded'),
        "nothing": ("", "does not exist"),
        "NUL": ("a\0b.png", "does not exist"),
        "large": (folder/"large.png", "is too large: 5.0 GiB"),
    }

def test_what_is_no_file_is_refused_by_name_and_soon(tmp_path):
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path/"s.png"))
        there = no_files(tmp_path) | {"socket": (tmp_path/"s.png", "does not exist as a file")}
        for name, (path, why) in there.items():
            told = f"{path}: image of question_id 17 "
            for look in (picture_file, picture_key, picture_size):
                with pytest.raises(BadPicture) as e: look(path, question_id=17)
                assert told in str(e.value) and why in str(e.value), name
            assert why in image_fault(path, "exists") and why in image_fault(path), name
    for data in (b"a.png", bytearray(b"a.png")):
        with pytest.raises(BadPicture, match="question_id 17 has byte.* in place of a path"): picture_file(data, 17)

def test_a_picture_that_became_a_text_file(tmp_path):
    path = tmp_path/"a.png"
    path.write_bytes(saved(SMALL))
    before = picture_key(path)
    path.write_text("404: not found")
    assert picture_key(path) != before
    told = "a.png: image of question_id 17 "
    with pytest.raises(BadPicture, match=told + "changed"): read_picture(path, before, 17)
    with pytest.raises(BadPicture, match=told + "is broken"): open_image(path, question_id=17)

def test_deep_pictures_take_few_bytes_a_pixel():
    "What Pillow holds aside; a picture of 64 million pixels is read in a gigabyte"
    import tracemalloc
    side = 1500
    deep = saved(np.linspace(-1, 1, side*side, dtype=np.float32).reshape(side, side), "TIFF")
    tracemalloc.start()
    open_image(deep)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12*side*side

def premultiplied(mode, colour):
    "A TIFF file whose colours are multiplied by their alpha, which one tag says"
    data = bytearray(saved(Image.new(mode, (8, 6), colour), "TIFF"))
    at = data.find(struct.pack("<HHI", 338, 3, 1))
    data[at+8:at+10] = struct.pack("<H", 1)
    return bytes(data)

def phone():
    "Two frames, the first lies on its side"
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    more = dict(save_all=True, append_images=[Image.new("RGB", (4, 3), "blue")], exif=exif)
    Image.new("RGB", (8, 6), (200, 100, 50)).save(out, "MPO", **more)
    return out.getvalue()

def moving(kind, **how):
    out = io.BytesIO()
    SMALL.save(out, kind, save_all=True, append_images=[Image.new("RGB", (8, 6), "blue")], **how)
    return out.getvalue()

HALF = (227, 177, 152) # (200, 100, 50), half transparent on white
SEEN = { # name -> (file, size, colour, largest difference; None where this Pillow cannot make it)
    "premultiplied": (premultiplied("RGBA", (100, 50, 25, 128)), (8, 6), HALF, 1),
    "moving WebP": (moving("WEBP", lossless=True), (8, 6), (200, 100, 50), 0),
    "moving PNG": (moving("PNG"), (8, 6), (200, 100, 50), 0),
    "phone": (phone(), (6, 8), (200, 100, 50), 4),
    "JPEG 2000": (saved(SMALL, "JPEG2000"), (8, 6), (200, 100, 50), 0),
    "JPEG 2000, alpha": (saved(Image.new("RGBA", (8, 6), (200, 100, 50, 128)), "JPEG2000"), (8, 6), HALF, 1),
    "WebP, alpha": (saved(Image.new("RGBA", (8, 6), (200, 100, 50, 128)), "WEBP"), (8, 6), HALF, 6),
    "grey, alpha": (saved(Image.new("LA", (8, 6), (100, 128)), "TIFF"), (8, 6), (177, 177, 177), 1),
    "1 bit": (saved(Image.new("1", (8, 6), 1)), (8, 6), (255, 255, 255), 0),
    "1 bit of a fax": (saved(Image.new("1", (8, 6), 0), "TIFF"), (8, 6), (0, 0, 0), 0),
    "Lab, white": (saved(Image.frombytes("LAB", (8, 6), bytes([255, 0, 0])*48), "TIFF"), (8, 6), (255, 255, 255), 1),
    "big-endian": (saved(Image.frombytes("I;16B", (8, 6), b"\x80\0"*48), "TIFF"), (8, 6), (128, 128, 128), 0),
    "bytes behind the end": (saved(SMALL) + b"more", (8, 6), (200, 100, 50), 0),
}

@pytest.mark.parametrize("name", SEEN)
@pytest.mark.filterwarnings("ignore:.*several frames")
def test_what_people_see(name):
    data, size, colour, apart = SEEN[name]
    image = open_image(data)
    assert image.mode == "RGB" and image.size == picture_size(data) == size
    assert np.abs(np.asarray(image).astype(int) - colour).max() <= apart

def test_premultiplied_grey_is_read_or_refused():
    "Old releases of Pillow do not know this kind"
    data = premultiplied("LA", (100, 128))
    if picture_fault(data): assert picture_fault(data) == "is broken, or of no format that Pillow reads"
    else: assert np.abs(np.asarray(open_image(data)).astype(int) - 227).max() <= 1

@pytest.mark.skipif(".avif" not in Image.registered_extensions(), reason="this Pillow reads no AVIF")
def test_avif_is_upright_and_on_white():
    data = saved(Image.new("RGBA", (64, 48), (200, 100, 50, 128)), "AVIF")
    assert open_image(data).size == (64, 48)
    assert np.abs(np.asarray(open_image(data)).astype(int) - HALF).max() <= 8
