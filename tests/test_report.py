"Figures and the page: right words, right colours, nothing from outside, nothing unescaped"
import base64, io, re, shutil, subprocess
from html.parser import HTMLParser
import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from matplotlib.colors import to_hex
from PIL import Image
from leverplus.evaluate import paired_table, pick_zero, picks_frame, result_table, score_picks
from leverplus.pools import Pool
from leverplus.report import CURVES, MARKS, case_html, cases, curves_in, data_uri, mark, picture, plot_curves, plot_examples, truth, write_report

@pytest.fixture(autouse=True)
def close_figures(): yield; plt.close("all")

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Eight queries 0..7 and demonstrations 100..105; query 2 asks something nasty, query 7 fails"
    d = tmp_path_factory.mktemp("images"); ids = [*range(8), *range(100, 106)]
    for i in ids: Image.new("RGB", (56, 56) if i < 100 else (400, 300), (2*i % 256, 80, 160)).save(d/f"{i}.png")
    ask = ["<script>alert('x')</script> & \"why\" $5 is_it $ " if i == 2 else f"what is number {i}?" for i in ids]
    items = pd.DataFrame(dict(question_id=ids, image_id=ids, image_path=[str(d/f"{i}.png") for i in ids], question=ask, answer=[f"word{i}" for i in ids],
                              answers=[[f"word{i}"]*7 + ["<b>"]*3 for i in ids]), index=ids)
    pool = Pool({q: tuple(range(100, 106)) for q in range(8)}, {})
    picks = pd.concat([pick_zero(pool), picks_frame("random", {q: (100, 101) for q in range(8)}, 2), picks_frame("rce", {q: (103, 102) for q in range(8)}, 2),
                       picks_frame("oracle", {q: (104, 105) for q in range(8)}, 2)])
    acc = dict(zero_shot=[0]*8, random=[0, 0, 0, 1, 1, 0, 0, 0], rce=[0, 1, 0, 1, .3, 0, 1, 1], oracle=[1]*8)
    facts = picks.assign(vqa_acc_score=[float(acc[s][q]) for s, q in zip(picks.selector, picks.question_id)], vqa_gt_prob=.5,
                         vqa_pred_answer=[f"<i>said{q}" for q in picks.question_id], eval_failed=(picks.selector == "rce") & (picks.question_id == 7))
    return items, score_picks(picks, facts[["question_id", "pointer", "vqa_acc_score", "vqa_gt_prob", "vqa_pred_answer", "eval_failed"]])

def history(n=3, **kw):
    return pd.concat([pd.DataFrame(dict(stage=s, epoch=range(n), train_loss=np.arange(n) + 1., valid_loss=.3 - .1*np.arange(n), kl=np.nan if s == "rce" else .1)) for s in ("rce", "grpo")], ignore_index=True).assign(**kw)

# ---- curves ---------------------------------------------------------------------------------------------------------

def test_curves_draw_what_there_is():
    h = history(); axs = plot_curves(h)
    assert curves_in(h) == ["train_loss", "valid_loss", "kl"] == [k for k in CURVES if CURVES[k] in [a.get_ylabel() for a in axs]]
    (a, b), (c,) = axs[1].get_lines(), axs[2].get_lines()
    assert a.get_xdata().tolist() == [1, 2, 3] and b.get_xdata().tolist() == [4, 5, 6] and c.get_xdata().tolist() == [4, 5, 6]
    assert a.get_color() != b.get_color() == c.get_color() and [t.get_text() for t in axs[0].get_legend().get_texts()] == ["rce", "grpo"]

def test_curves_take_axes_and_seeds():
    mine = plt.subplots(1, 3)[1]; h = pd.concat([history(seed=0), history(seed=1)])
    got = plot_curves(h, mine)
    assert all(a is b for a, b in zip(got, mine)) and len(mine[1].get_lines()) == 4 and len(mine[0].get_legend().get_texts()) == 2
    with pytest.raises(ValueError, match="2 axes"): plot_curves(h, mine[:2])
    with pytest.raises(ValueError, match="nothing of"): plot_curves(h[["epoch"]])
    assert len(plot_curves(h[["train_loss"]])) == 1 # a history without stages is one stage

# ---- cases ----------------------------------------------------------------------------------------------------------

def test_cases_take_right_and_wrong_in_turn(world):
    _, s = world; c = cases(s, 6, "rce")
    assert (c.vqa_acc_score >= .5).tolist() == [True, False]*3 and c.equals(cases(s, 6, "rce")) and not c.equals(cases(s, 6, "rce", seed=3))
    assert (c.selector == "rce").all() and len(cases(s, 99, "rce")) == 8 and cases(s, ids=[5, 2], selector="rce").question_id.tolist() == [5, 2]
    assert cases(s[s.selector == "oracle"], 3).vqa_acc_score.tolist() == [1]*3
    with pytest.raises(ValueError, match="grpo"): cases(s, selector="grpo")
    with pytest.raises(KeyError, match="question 55"): cases(s, selector="rce", ids=[55])

@pytest.mark.parametrize("acc,failed,word", [(1., False, "right"), (.95, False, "right"), (.6, False, "partly"), (0., False, "wrong"), (np.nan, True, "failed")])
def test_marks(acc, failed, word):
    text, colour = mark(dict(vqa_acc_score=acc, eval_failed=failed))
    assert word in text and colour == MARKS[word]

def test_truth_counts():
    assert truth(["a"]*6 + ["b"]*3 + ["c"]) == "a ×6, b ×3, c ×1" and truth(list("aabcd"), 2) == "a ×2, b ×1, …"

def texts(ax): return [ax.get_title(), ax.get_xlabel(), *(t.get_text() for t in ax.texts)]

def test_examples_show_the_prompt_in_order(world):
    items, s = world; axs = plot_examples(items, s, selector="rce", ids=[1, 0, 4, 7])
    assert axs.shape == (4, 4)
    for line, q in zip(axs, [1, 0, 4, 7]):
        assert [a.get_title() for a in line[:3]] == ["demonstration 1", "demonstration 2", "query"]
        assert "A: word103" in line[0].get_xlabel() and "A: word102" in line[1].get_xlabel() # the pointer was (103, 102)
        assert f"number {q}?" in line[2].get_xlabel() and f"word{q}" not in line[2].get_xlabel() # the answer is not given away
        assert any(f"word{q} ×7" in t for t in texts(line[3]))
    said = [" ".join(texts(a)) for a in axs[:, 3]]
    assert "✓ right" in said[0] and "✗ wrong" in said[1] and "partly right (0.3)" in said[2] and "failed" in said[3] and "said7" not in said[3]
    assert [to_hex(a.texts[2].get_color()) for a in axs[:, 3]] == [MARKS[k] for k in ("right", "wrong", "partly", "failed")]
    axs[0, 0].figure.canvas.draw() # also with zero shots, and with text that looks like maths
    z = plot_examples(items, s, selector="zero_shot", ids=[2]); z[0, 0].figure.canvas.draw()
    assert r"\$5" in z[0, 0].get_xlabel()
    assert z.shape == (1, 2)

def test_pictures_fail_by_name_or_say_that_there_are_none(world, tmp_path):
    items, s = world
    assert picture(items, 0).size == (56, 56) and picture(items, 100, 200).size == (200, 150)
    blind = items.assign(image_path=None)
    assert picture(blind, 0) is None and "(images not read)" in texts(plot_examples(blind, s, 1, "rce")[0, 0]) and "images not read" in case_html(blind, cases(s, 1, "rce").iloc[0])
    with pytest.raises(FileNotFoundError, match="question 3"): picture(items.assign(image_path=str(tmp_path/"no.png")), 3)
    with pytest.raises(KeyError, match="question 9"): picture(items, 9)

# ---- the page -------------------------------------------------------------------------------------------------------

class Page(HTMLParser):
    "Tags, attributes and visible text; notices tags that do not match"
    def __init__(self, text): super().__init__(); self.tags, self.stack, self.words = [], [], []; self.feed(text); assert not self.stack
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"): self.stack.append(tag)
    def handle_endtag(self, tag): assert self.stack.pop() == tag
    def handle_data(self, data): self.words += [] if self.stack and self.stack[-1] == "style" else [data]
    def all(self, tag): return [a for t, a in self.tags if t == tag]

@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    items, s = world; d = tmp_path_factory.mktemp("runs")/"my <run>"; d.mkdir(); (d/"settings.json").write_text('{"note": "<s>tau"}')
    table = result_table(s, items, changed_from="random", n_boot=200)
    path = write_report(d, table, s, items, history(), paired_table(s, items, ["random"], n_boot=200), n=8, notes=["a & b"])
    return d, table, path

def test_page_is_self_contained_and_escaped(run):
    d, _, path = run; text = path.read_text(); p = Page(text); words = "".join(p.words)
    assert not {t for t, _ in p.tags} & {"script", "link", "iframe", "i", "s"} and "http" not in text and str(d.parent) not in text
    assert any(m.get("name") == "viewport" for m in p.all("meta")) and p.all("html")[0]["lang"] == "en"
    for im in p.all("img"):
        kind, raw = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", im["src"]).groups()
        assert im["alt"] and Image.open(io.BytesIO(base64.b64decode(raw))).format == kind.upper()
    assert "my <run>" in words and "a & b" in words and "<script>alert('x')</script>" in words and "<i>said" in words and "<b> ×3" in words and "<s>tau" in words
    assert "Failed evaluations: 1." in words and "no difference shown" in words and len(text) < 500_000

def test_page_says_what_the_table_says(run):
    d, table, path = run; p = Page(path.read_text()); words = "".join(p.words); back = pd.read_csv(d/"results.csv")
    assert list(back) == ["selector", "shots", "n", "acc", "lo", "hi", "gap_closed", "changed"] and np.allclose(back.acc, table.acc)
    for r in table.itertuples(): assert r.selector in words and f"{100*r.acc:.1f} [{100*r.lo:.1f}, {100*r.hi:.1f}]" in words
    assert "Cases: rce, 2 shots" in words and words.count("The LVLM says") == len(p.all("section")) == 8
    assert {f.name for f in d.iterdir()} == {"results.csv", "results.png", "curves.png", "examples.png", "report.html", "settings.json"}
    assert all(Image.open(d/f).size[0] > 300 for f in ("results.png", "curves.png", "examples.png"))

def test_page_leaves_out_what_was_not_given(world, tmp_path):
    _, s = world; path = write_report(tmp_path/"r", result_table(s, changed_from=None, n_boot=50), title="bare"); words = "".join(Page(path.read_text()).words)
    assert not re.search("Training|Cases|Differences|Settings", words) and "bare" in words and not (tmp_path/"r"/"curves.png").exists()

def test_images_embed_small(world):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8))
    assert data_uri(photo).startswith("data:image/jpeg") and data_uri(Image.new("RGB", (56, 56))).startswith("data:image/png")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "firefox"))), None)
@pytest.mark.skipif(not BROWSER or "firefox" in BROWSER, reason="no headless browser here")
def test_a_phone_shows_the_page(run, tmp_path):
    "Rendered at 390 pixels: there is ink, and nothing runs out of the right edge"
    shot = tmp_path/"phone.png"
    subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path/'profile'}", "--window-size=500,3000",
                    f"--screenshot={shot}", run[2].as_uri()], check=True, capture_output=True, timeout=120)
    im = np.asarray(Image.open(shot).convert("L"))
    assert im.shape == (3000, 500) and (im < 128).mean() > .01 and (im[:, -6:] > 250).all()
