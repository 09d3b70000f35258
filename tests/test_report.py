"Figures and the page: right words, right colours, nothing from outside, nothing unescaped"
import base64, dataclasses, hashlib, html, io, json, pathlib, re, shutil, subprocess
from html.parser import HTMLParser
import matplotlib

matplotlib.use("Agg")
import leverplus, matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from matplotlib.colors import to_hex
from PIL import Image
from leverplus.curves import CURVES, curves_in, diagnoses, plot_curves, stage_starts
from leverplus.diagnose import PANELS
from leverplus.evaluate import BASELINES, count_look, paired_table, plot_results, result_table, score_picks
from leverplus.infer import pick_zero, picks_frame
from leverplus.items import given_ids
from leverplus.markup import Figure, Paragraph
from leverplus.pools import Pool
from leverplus.cases import (
    MARKS, OUTCOMES, Pictures, Thumbnails, case_block, data_uri, item_picture, mark_of, pick_cases, plot_examples,
    query_outcomes, truth_text,
)
from leverplus.report import (
    GLOSSARY, Cases, Findings, best_row, compare_many, described_items, differences_block, headline, plot_gap,
    plot_shots, read_scored, report, results_block, rival_tests, runs_differ, write_report, zero_tests,
)
from leverplus.runs import Run
from leverplus.statistics import Bootstrap

FEW = Bootstrap(100)

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Eight queries 0..7 and demonstrations 100..105; query 2 asks something nasty, query 7 fails"
    d = tmp_path_factory.mktemp("images")
    ids = [*range(8), *range(100, 106)]
    for i in ids:
        Image.new("RGB", (56, 56) if i < 100 else (400, 300), (2 * i % 256, 80, 160)).save(d / f"{i}.png")
    ask = [f"what is number {i}?" for i in ids]
    ask[2] = "<script>alert('x')</script> & \"why\" $5 is_it $ "
    ask[3] = "endless" * 40 # no place to break a line
    columns = dict(
        question_id=ids,
        image_id=ids,
        image_path=[str(d / f"{i}.png") for i in ids],
        question=ask,
        answer=[f"word{i}" for i in ids],
        answers=[[f"word{i}"] * 7 + ["<b>"] * 3 for i in ids],
    )
    items = pd.DataFrame(columns, index=ids)
    pool = Pool({q: tuple(range(100, 106)) for q in range(8)}, {})
    chosen = dict(random=(100, 101), rce=(103, 102), oracle=(104, 105))
    same = [picks_frame(s, {q: pair for q in range(8)}, 2) for s, pair in chosen.items()]
    picks = pd.concat([pick_zero(pool), *same])
    acc = dict(zero_shot=[0]*8, random=[0, 0, 0, 1, 1, 0, 0, 0], rce=[0, 1, 0, 1, .3, 0, 1, 1], oracle=[1]*8)
    facts = picks.assign(
        vqa_acc_score=[float(acc[s][q]) for s, q in zip(picks.selector, picks.question_id)],
        vqa_gt_prob=0.5,
        vqa_pred_answer=[f"<i>said{q}" for q in picks.question_id],
        eval_failed=(picks.selector == "rce") & (picks.question_id == 7),
    )
    told = ["question_id", "pointer", "vqa_acc_score", "vqa_gt_prob", "vqa_pred_answer", "eval_failed"]
    return items, score_picks(picks, facts[told])

def history(n=3, **kw):
    epoch = np.arange(n)
    rce = pd.DataFrame(dict(stage="rce", epoch=epoch, train_loss=epoch + 1., valid_loss=.3 - .1*epoch, kl=np.nan))
    grpo = rce.assign(stage="grpo", kl=.1)
    return pd.concat([rce, grpo], ignore_index=True).assign(**kw)

# ---- curves ---------------------------------------------------------------------------------------------------------

def test_curves_draw_what_there_is():
    h = history()
    axs = plot_curves(h)
    drawn = [a.get_ylabel() for a in axs]
    assert curves_in(h) == ["train_loss", "valid_loss", "kl"] == [k for k in CURVES if CURVES[k] in drawn]
    a, b = axs[1].get_lines()
    c, = axs[2].get_lines()
    assert a.get_xdata().tolist() == [1, 2, 3]
    assert b.get_xdata().tolist() == c.get_xdata().tolist() == [4, 5, 6]
    assert a.get_color() != b.get_color() == c.get_color()
    assert [t.get_text() for t in axs[0].texts] == ["rce", "grpo"] # named where they begin, not in a legend

def test_curves_take_axes_and_seeds():
    mine = plt.subplots(1, 3)[1]
    h = pd.concat([history(seed=0), history(seed=1)])
    got = plot_curves(h, mine)
    assert all(a is b for a, b in zip(got, mine))
    assert len(mine[1].get_lines()) == 4
    assert len(mine[0].texts) == 2
    with pytest.raises(ValueError, match="2 axes"): plot_curves(h, mine[:2])
    with pytest.raises(ValueError, match="nothing of"): plot_curves(h[["epoch"]])
    assert len(plot_curves(h[["train_loss"]])) == 1 # a history without stages is one stage

def test_stages_are_named_where_they_begin():
    h = history()
    assert stage_starts(h) == {1: "rce", 4: "grpo"}
    one_name = h.assign(stage="rce", fit=[1, 1, 1, 2, 2, 2])
    assert stage_starts(one_name) == {1: "rce", 4: "rce"} # a fit is a stage
    assert stage_starts(pd.concat([h.assign(seed=0), h.assign(seed=1)])) == {1: "rce", 4: "grpo"}
    short = h[1:].assign(run="b", fit=np.nan) # a run whose fits nobody numbered
    both = pd.concat([h.assign(run="a", fit=[1]*3 + [2]*3), short])
    assert stage_starts(both) == {1: "rce", 3: "grpo", 4: "grpo"}
    ax = plot_curves(h[["stage", "train_loss"]])[0]
    assert [(t.get_text(), t.xy[0]) for t in ax.texts] == [("rce", ax.get_xlim()[0]), ("grpo", 3.5)]
    assert not plot_curves(h[:3])[0].texts # one stage needs no name
    nasty_name = plot_curves(h.assign(stage="a $stage$ " * 9 + h.stage))[0].texts[0]
    assert len(nasty_name.get_text()) == 16 and not nasty_name.get_parse_math()

def test_names_of_stages_do_not_cover_each_other():
    h = history(2)
    h = pd.concat([h, h.assign(stage="listwise"), history(20)], ignore_index=True)
    for stage in ("rce", "listwise"): h.loc[h.stage == stage, "stage"] = f"a long {stage}"
    ax = plot_curves(h[["stage", "train_loss"]])[0]
    ax.figure.canvas.draw()
    boxes = [t.get_window_extent() for t in ax.texts]
    assert len(boxes) > 4
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])

def inside(fig):
    "Nothing of a figure runs out of it"
    fig.canvas.draw()
    drawn = fig.get_tightbbox() # in inches
    width, height = fig.get_size_inches()
    return min(drawn.x0, drawn.y0, width - drawn.x1, height - drawn.y1) > -.01

def off_the_curves(legend, axs):
    legend.figure.canvas.draw()
    box = legend.get_window_extent()
    return not any(box.overlaps(ax.get_window_extent()) for ax in axs)

def test_runs_lie_over_each_other():
    h = history()
    several = pd.concat([h.assign(run="a run"), h[1:].assign(run="another $run$"), h[:4].assign(run="third")])
    axs = plot_curves(several)
    fig = axs[0].figure
    assert [ax.get_ylabel() for ax in axs] == [CURVES[c] for c in curves_in(h)] # not a panel per run
    by_run = {}
    for line in axs[0].get_lines(): by_run.setdefault(line.get_label(), set()).add(line.get_color())
    assert list(by_run) == ["a run", "another $run$", "third"]
    assert len(set().union(*by_run.values())) == 3 and all(len(colours) == 1 for colours in by_run.values())
    legend, = fig.legends
    assert [t.get_text() for t in legend.get_texts()] == list(by_run)
    assert not any(ax.get_legend() for ax in axs) and off_the_curves(legend, axs) and inside(fig)
    many = pd.concat([h.assign(run=f"run {i}") for i in range(12)])
    looks = {(line.get_color(), line.get_linestyle()) for line in plot_curves(many)[0].get_lines()}
    assert len(looks) == 12 # more runs than colours

def test_no_legend_lies_on_a_curve(tmp_path):
    from leverplus.report import _rl_figure, _small_axes
    rl = history(20, regret_train=.2, live_before=.6, live_after=.5, entropy=.4, unique=.3, gini=.2)
    for axs in (_rl_figure(rl), plot_curves(history())):
        assert inside(axs[0].figure)
        legends = [ax.get_legend() for ax in axs if ax.get_legend()]
        assert all(off_the_curves(legend, axs) for legend in legends)
    drawn = _rl_figure(rl)
    assert len(drawn) > 3 and all(ax.get_legend() and len(ax.texts) == 2 for ax in drawn)
    ax = plot_results(table_of(rce_1=.3, rce_2=.4, rce_3=.5))
    assert off_the_curves(ax.get_legend(), [ax])
    small = plot_curves(history()[["stage", "train_loss"]], _small_axes(1))
    assert inside(small[0].figure)
    names = [f"a_rather_long_name_of_a_selector_{i}" for i in range(12)]
    many = table_of(**{f"{name}_{S}": .3 for name in names for S in (1, 2)})
    assert inside(plot_shots(many).figure) and inside(plot_results(many).figure)

# ---- the result in words --------------------------------------------------------------------------------------------

def table_of(**acc):
    "A table: {row: accuracy}, where `rce_2` has two shots"
    rows = []
    for name, a in acc.items():
        selector, shots = name.rsplit("_", 1)
        rows.append(dict(selector=selector, shots=int(shots), n=100, acc=a, lo=a - .01, hi=a + .01))
    return pd.DataFrame(rows).assign(gap_closed=np.nan, changed=np.nan)

def test_of(against="random", shots=2, lo=.05, hi=.15, verdict="better", selector="rce", mde=.04):
    pair = dict(selector=selector, against=against, shots=shots, n=100)
    return pd.DataFrame([pair | dict(delta=(lo + hi)/2, lo=lo, hi=hi, mde=mde, verdict=verdict)])
test_of.__test__ = False # a maker of rows

ROWS = dict(zero_shot_0=.2, random_2=.3, similar_mixed_2=.35, rce_1=.3, rce_2=.4, oracle_2=.6)
NOTHING = "no difference shown"

def claims(lines): return [line for line in lines if "better" in line or "worse" in line or "beats" in line]

def test_a_difference_is_told_in_the_first_sentence():
    tests = pd.concat([test_of(), test_of("similar_mixed", lo=.01, hi=.09), test_of(shots=1, selector="rce")])
    first, second = headline(table_of(**ROWS), tests)
    better = "rce (2 shots) is better than "
    # similarity before random, of the best row
    assert first == better + "similar_mixed: 40.0 % against 35.0 %, +5.0 points [+1.0, +9.0]."
    assert second == better + "random: 40.0 % against 30.0 %, +10.0 points [+5.0, +15.0]."
    bounded = pd.concat([tests, test_of("oracle", lo=-.3, hi=-.1, verdict="worse")])
    assert headline(table_of(**ROWS), bounded) == [first, second] # an oracle is no rival
    worse, = headline(table_of(**ROWS), test_of(lo=-.15, hi=-.05, verdict="worse"))
    assert worse.startswith("rce (2 shots) is worse than random: ") and "-10.0 points [-15.0, -5.0]" in worse

UNCLAIMED = [
    (dict(lo=-.01, hi=.05, verdict=NOTHING), "."),
    (dict(lo=-.01, hi=.05, verdict="better"), "."), # a verdict that its interval does not bear out
    (dict(lo=0., hi=.05, verdict="better"), "."),
    (dict(lo=.01, hi=.05, verdict=NOTHING), ", not after Holm's correction."),
    (dict(lo=.01, hi=.05, verdict="better", mde=np.inf), ", too few questions to show anything."),
    (dict(lo=.01, hi=.05, verdict="anything else"), ", not after Holm's correction."),
]

@pytest.mark.parametrize("told,end", UNCLAIMED)
def test_nothing_is_claimed_whose_interval_holds_0(told, end):
    line, = headline(table_of(**ROWS), test_of(**told))
    assert line.startswith("No difference shown between rce (2 shots) and random: 40.0 % against 30.0 %, ")
    assert line.endswith("]" + end) and not claims([line])
    _, zero = headline(table_of(**ROWS), None, test_of("zero_shot", **told))
    assert zero.startswith("Few-shot is not shown to beat zero-shot: rce (2 shots), ")
    assert zero.endswith("]" + end)
    row = differences_block(test_of(**told)).html()
    assert NOTHING in row and 'class="none"' in row and "better" not in row

def test_zero_shot_has_a_sentence():
    table = table_of(**ROWS)
    worse = test_of("zero_shot", lo=-.3, hi=-.2, verdict="worse")
    lead = headline(table, None, pd.concat([worse, test_of("zero_shot"), test_of("zero_shot", 1, .01, .02)]))[-1]
    numbers = "40.0 % against 20.0 %, +10.0 points [+5.0, +15.0]"
    assert lead == f"Few-shot beats zero-shot: rce (2 shots), {numbers}."
    unsure = test_of("zero_shot", 1, -.1, .9, NOTHING) # leads by more, perhaps
    assert headline(table, None, pd.concat([unsure, test_of("zero_shot")]))[-1] == lead
    below = headline(table, None, worse)[-1]
    assert below.startswith("Few-shot does not beat zero-shot here: even rce (2 shots) is worse, ")

def test_a_headline_says_only_what_it_knows():
    untested, = headline(table_of(**ROWS))
    best = "The best trained selector is rce (2 shots), 40.0 % [39.0, 41.0]"
    assert untested == f"{best}; its lead was not tested."
    none = {k: v for k, v in ROWS.items() if not k.startswith("rce")}
    plain, = headline(table_of(**none))
    assert plain.startswith("No trained selector took part. The highest row is similar_mixed (2 shots), 35.0")
    lines = headline(table_of(**ROWS | dict(mmr_2=.5)), test_of())
    assert lines[1] == "A baseline is higher: mmr (2 shots), 50.0 % [49.0, 51.0]; the two were not tested."
    tested = headline(table_of(**ROWS | dict(random_2=.5)), test_of(lo=-.2, hi=-.1, verdict="worse"))
    assert len(tested) == 1 # that a row is higher is said by the test
    as_high = headline(table_of(**ROWS | dict(mmr_2=.5, random_2=.5)), test_of(lo=-.2, hi=-.1, verdict="worse"))
    assert as_high == tested # no row is higher than the one that the test speaks of
    assert headline(table_of(oracle_2=.6)) == ["No row but oracles: nothing was evaluated."]
    assert not claims([untested, plain, lines[1]])

def test_a_table_of_zeros_says_so():
    nobody = headline(table_of(zero_shot_0=0., random_2=0., rce_2=0., oracle_2=.12), test_of(lo=0., hi=0.))
    assert nobody[0].startswith("All rows are at 0 %") and "The oracle reaches 12.0 %" in nobody[1]
    assert not claims(nobody) and "Look at" in nobody[-1]
    assert "Not even the oracle" in headline(table_of(random_2=0., oracle_2=0.))[1]
    assert "oracle" not in " ".join(headline(table_of(random_2=0., rce_2=0.)))
    block = results_block(table_of(random_2=0., rce_2=0.)).html()
    assert "highest" not in block and 'class="best"' not in block

def test_a_page_of_zeros_says_so_and_draws_nothing(world, tmp_path):
    items, s = world
    zeros = s.assign(vqa_acc_score=s.vqa_acc_score*0)
    table = result_table(zeros, items, changed_from="random", bootstrap=FEW)
    page = write_report(tmp_path/"r", Findings(table=table, scored=zeros, items=items), Cases(n=2), bootstrap=FEW)
    p = sound(page.read_text())
    said = "".join(p.words)
    assert said.index("All rows are at 0 %") < said.index("Results") and "highest" not in said
    assert not p.all("img") and not (tmp_path/"r"/"results.png").exists()

def test_the_best_row_is_never_an_oracle():
    table = table_of(**ROWS | dict(oracle_free_2=.7))
    table.loc[table.selector == "oracle_free", "selector"] = "oracle_free"
    assert (best_row(table).selector, best_row(table).shots) == ("rce", 2)
    assert best_row(table[table.selector.isin(["random", "oracle"])]).selector == "random"
    assert best_row(table[table.selector == "oracle"]) is None
    assert best_row(table_of(a_2=.4, a_1=.4)).shots == 1 # of equals, the cheaper one
    assert best_row(table_of(**ROWS | dict(mmr_2=.5))).selector == "mmr"
    assert best_row(table_of(**ROWS | dict(mmr_2=.5)), trained=True).selector == "rce"

def rows_of(block):
    "[(name, class of its group, [(class of a row, its cells)])] of a result table"
    groups = re.findall(r"<tbody(?: class=\"(\w+)\")?>(.*?)</tbody>", block.html(), re.S)
    found = []
    for kind, body in groups:
        name = re.search(r"<th scope=\"rowgroup\".*?>([^<>]+)</button>", body, re.S)[1]
        rows = re.findall(r"<tr(?: class=\"(\w+)\")?>(.*?)</tr>", body, re.S)
        found.append((name, kind, [(mark, re.findall(r"<td>(.*?)<", cells)) for mark, cells in rows]))
    return found

def test_rows_are_sorted_and_the_best_is_marked():
    rows = dict(oracle_1=.5, zero_shot_0=.2, rce_2=.4, similar_mixed_1=.35, oracle_2=.6, rce_1=.3)
    groups = rows_of(results_block(table_of(**rows)))
    assert [name for name, *_ in groups] == ["rce", "similar_mixed", "zero_shot", "oracle"]
    shots = [[cells[0] for _, cells in lines] for *_, lines in groups]
    assert shots == [["1", "2"], ["1"], ["0"], ["1", "2"]]
    marked = [(name, cells[0]) for name, _, lines in groups for mark, cells in lines if mark == "best"]
    assert marked == [("rce", "2")]
    assert [kind for _, kind, _ in groups] == ["", "", "", "bound"]
    page = Page(results_block(table_of(**rows)).html())
    assert "highest" in page.words and page.words.count("bound") == 2 # its name, and what it means
    from leverplus.report import _result_figures
    drawn = _result_figures(table_of(**rows), None)["results.png"]().get_yticklabels()
    assert [t.get_text() for t in drawn] == ["rce", "similar_mixed", "zero_shot", "oracle"] # as in the table

def test_zero_shot_is_compared_at_every_number_of_shots(world):
    items, s = world
    votes = s[s.selector == "random"].assign(selector="majority_vote", vqa_acc_score=0.)
    tests = zero_tests(pd.concat([s, votes, s[s.selector == "rce"].assign(shots=1)]), items, FEW)
    assert set(zip(tests.selector, tests.shots)) == {("random", 2), ("rce", 1), ("rce", 2)}
    assert set(tests.against) == {"zero_shot"} and (tests.p_holm >= tests.p).all()
    by_hand = s[(s.selector == "rce") & ~s.eval_failed].vqa_acc_score.mean() # zero-shot is at 0 here
    assert np.allclose(tests.delta[tests.selector == "rce"], by_hand)
    is_zero = s.selector == "zero_shot"
    assert zero_tests(s[~is_zero]) is None and zero_tests(s[is_zero]) is None

def test_differences_are_one_figure():
    worse = test_of(lo=-.3, hi=-.1, verdict="worse")
    tests = pd.concat([worse, test_of("similar_mixed"), test_of(shots=1, hi=.5)])
    block = differences_block(tests, test_of("zero_shot", lo=-.1, hi=.1, verdict=NOTHING), None)
    html = block.html()
    svgs = re.findall(r"<svg role=\"img\" aria-label=\"(.*?)\"(.*?)</svg>", html, re.S)
    last = f"rce (2 shots) against zero_shot: +0.0 points [-10.0, +10.0], {NOTHING}"
    assert len(svgs) == 4 and svgs[-1][0] == last
    places = [[float(x) for x in re.findall(r"(?:x1|x2|cx)=\"([\d.-]+)%\"", svg)] for _, svg in svgs]
    zero = {line[0] for line in places}
    assert len(zero) == 1 # one line at 0
    for (label, _), (at_zero, _, lo, hi, middle) in zip(svgs, places):
        assert 0 <= lo <= middle <= hi <= 100
        said = {"better": lo > at_zero, "worse": hi < at_zero, NOTHING: lo < at_zero < hi}
        assert said[label.split(", ")[-1]], label
    one_sided = differences_block(test_of()).html() # 0 is named, wherever it lies
    assert all(">0</text>" in shown for shown in (html, one_sided, differences_block(worse).html()))
    own = differences_block(pd.concat([test_of(), test_of(shots="own", selector="a: rce", against="b: rce")]))
    assert "a: rce (own shots)" in own.html() # runs that have no number in common
    # those of a selector together, the largest difference first
    assert re.findall(r"<th scope=\"row\">(.*?)</th>", html)[:2] == ["rce (1 shot)", "rce (2 shots)"]

def test_words_of_the_page_have_meanings(run):
    p = Page(run[2].read_text())
    buttons = [a for a in p.all("button") if "popovertarget" in a]
    entries = {a["id"] for a in p.all("div") if "popover" in a}
    assert {a["popovertarget"] for a in buttons} == entries and len(entries) > 15
    heads = re.findall(r"<table class=\"results\">.*?</table>", run[2].read_text(), re.S)[0]
    cells = re.findall(r"<th scope=\"(?:col|rowgroup)\".*?>(.*?)</th>", heads, re.S)
    assert len(cells) == 6 + 4 and all("popovertarget" in cell for cell in cells)
    assert not set(BASELINES) - set(GLOSSARY) and not (set(CURVES.values()) | set(PANELS)) - set(GLOSSARY)
    assert all(len(meaning) > 20 and meaning.endswith(".") for meaning in GLOSSARY.values())

# ---- cases ----------------------------------------------------------------------------------------------------------

def test_cases_are_those_of_the_best_selector(world, tmp_path, quick):
    items, s = world
    rce = s[s.selector == "rce"]
    late = rce.assign(selector="late", vqa_acc_score=0.)                # trained last, and worst
    one = rce.assign(shots=1, pointer=rce.pointer.map(lambda p: p[:1]), vqa_acc_score=1., eval_failed=False)
    def heading(scored, cases=Cases(n=2)):
        folder = tmp_path/f"r{len(list(tmp_path.iterdir()))}"
        page = report(make_run(folder, scored), items, cases=cases, bootstrap=FEW)
        return re.search(r"Cases: [^<]*", page.read_text())[0]
    assert heading(pd.concat([s, late])) == "Cases: rce, 2 shots"
    assert heading(pd.concat([s, late, one])) == "Cases: rce, 1 shot"     # where it is best
    assert heading(pd.concat([s, late]), Cases(n=2, selector="late")) == "Cases: late, 2 shots"
    assert heading(s[s.selector != "rce"]) == "Cases: random, 2 shots"      # never an oracle

def test_cases_take_right_and_wrong_in_turn(world):
    _, s = world
    c = pick_cases(s, 6, "rce")
    assert (c.vqa_acc_score >= .5).tolist() == [True, False]*3
    assert c.equals(pick_cases(s, 6, "rce")) and not c.equals(pick_cases(s, 6, "rce", seed=3))
    assert (c.selector == "rce").all()
    assert len(pick_cases(s, 99, "rce")) == 8
    assert pick_cases(s, ids=[5, 2], selector="rce").question_id.tolist() == [5, 2]
    assert pick_cases(s[s.selector == "oracle"], 3).vqa_acc_score.tolist() == [1]*3
    with pytest.raises(ValueError, match="grpo"): pick_cases(s, selector="grpo")
    with pytest.raises(KeyError, match="question 55"): pick_cases(s, selector="rce", ids=[55])

def test_outcomes_tell_won_from_lost(world):
    _, s = world
    o = query_outcomes(s, "rce", 2, "random")
    # .3 against 1 is lost
    assert o.tolist() == ["unchanged", "won", "unchanged", "unchanged", "lost", "unchanged", "won", "failed"]
    mirror = dict(won="lost", lost="won", unchanged="unchanged", failed="failed")
    assert query_outcomes(s, "random", 2, "rce").map(mirror).equals(o)
    assert query_outcomes(s, "rce", 2, "zero_shot")[1] == "won" # zero-shot has no shots
    c = pick_cases(s, 5, "rce", against="random")
    assert [o[q] for q in c.question_id] == ["won", "lost", "unchanged", "failed", "won"]
    with pytest.raises(ValueError, match="mmr"): query_outcomes(s, "rce", 2, "mmr")

MARKED = [
    (1., False, "right"),
    (.95, False, "right"),
    (.6, False, "partly"),
    (0., False, "wrong"),
    (np.nan, True, "failed"),
]

@pytest.mark.parametrize("acc,failed,word", MARKED)
def test_marks(acc, failed, word):
    text, colour = mark_of(dict(vqa_acc_score=acc, eval_failed=failed))
    assert word in text and colour == MARKS[word]

def test_truth_counts():
    assert truth_text(["a"]*6 + ["b"]*3 + ["c"]) == "a ×6, b ×3, c ×1"
    assert truth_text(list("aabcd"), 2) == "a ×2, b ×1, …"

def texts(ax): return [ax.get_title(), ax.get_xlabel(), *(t.get_text() for t in ax.texts)]

def test_examples_show_the_prompt_in_order(world):
    items, s = world
    axs = plot_examples(items, s, selector="rce", ids=[1, 0, 4, 7])
    assert axs.shape == (4, 4)
    for line, q in zip(axs, [1, 0, 4, 7]):
        assert [a.get_title() for a in line[:3]] == ["demonstration 1", "demonstration 2", "query"]
        # the pointer was (103, 102)
        assert "A: word103" in line[0].get_xlabel() and "A: word102" in line[1].get_xlabel()
        # the answer is not given away
        assert f"number {q}?" in line[2].get_xlabel() and f"word{q}" not in line[2].get_xlabel()
        assert any(f"word{q} ×7" in t for t in texts(line[3]))
    said = [" ".join(texts(a)) for a in axs[:, 3]]
    for words, mine in zip(("✓ right", "✗ wrong", "partly right (0.3)", "failed"), said): assert words in mine
    assert "said7" not in said[3]
    colours = [MARKS[k] for k in ("right", "wrong", "partly", "failed")]
    assert [to_hex(a.texts[2].get_color()) for a in axs[:, 3]] == colours
    axs[0, 0].figure.canvas.draw() # also with zero shots, and with text that looks like maths
    z = plot_examples(items, s, selector="zero_shot", ids=[2])
    z[0, 0].figure.canvas.draw()
    assert r"\$5" in z[0, 0].get_xlabel()
    assert z.shape == (1, 2)

def test_pictures_fail_by_name_or_say_that_there_are_none(world, tmp_path):
    items, s = world
    assert item_picture(items, 0).size == (56, 56)
    assert item_picture(items, 100, 200).size == (200, 150)
    blind = items.assign(image_path=None)
    assert item_picture(blind, 0) is None
    assert "(no picture here)" in texts(plot_examples(blind, s, 1, "rce")[0, 0])
    assert "no picture here" in case_block(blind, pick_cases(s, 1, "rce").iloc[0]).html()
    with pytest.raises(FileNotFoundError, match="question 3"):
        item_picture(items.assign(image_path=str(tmp_path / "no.png")), 3)
    with pytest.raises(KeyError, match="question 9"): item_picture(items, 9)

# ---- figures of the table -------------------------------------------------------------------------------------------

def test_shots_and_gap_figures():
    rows = [("zero_shot", 0, .1), ("random", 1, .2), ("rce", 1, .3), ("random", 2, .2), ("rce", 2, .4)]
    t = pd.DataFrame(rows, columns=["selector", "shots", "acc"])
    t = t.assign(lo=t.acc - .1, hi=t.acc + .1)
    ax = plt.subplots()[1]
    assert plot_shots(t, ax) is ax
    assert {a.get_text() for a in ax.texts} == {"zero_shot", "random", "rce"}
    heights = {a.get_text(): a.get_position()[1] for a in ax.texts}
    assert heights["zero_shot"] < heights["random"] < heights["rce"]
    close = plot_shots(t.assign(acc=0.3, lo=0.2, hi=0.5))
    y = sorted(a.get_position()[1] for a in close.texts)
    lo, hi = close.get_ylim()
    assert min(np.diff(y)) > .06*(hi - lo) # names do not cover each other
    with pytest.raises(ValueError, match="no curve"): plot_shots(t[t.shots == 0])
    closed = [("rce", 1, .5, .4, .6), ("rce", 2, -.1, -.3, .2)]
    g = pd.DataFrame(closed, columns=["selector", "shots", "gap", "lo", "hi"])
    assert sorted(b.get_width() for b in plot_gap(g).patches if b.get_height() < .5) == [-.1, .5]
    bounded = pd.concat([g, g.assign(selector="oracle_free", gap=1.), g.assign(selector="grpo", gap=.8)])
    assert [t.get_text() for t in plot_gap(bounded).get_yticklabels()] == ["grpo", "rce", "oracle_free"]
    with pytest.raises(ValueError, match="no rows"): plot_gap(g[:0])

def test_diagnoses_go_by_fit_and_seed():
    h = history().assign(live_before=[.6]*3 + [.01]*3)
    # stages stand for fits
    assert [(d.stage, d.alarms) for d in diagnoses(h)] == [("rce, 3 epochs", []), ("grpo, 3 epochs", ["live"])]
    seeds = diagnoses(pd.concat([h.assign(seed=0), h.assign(seed=7)]))
    assert seeds[-1].stage == "seed 7, grpo, 3 epochs"

# ---- the page -------------------------------------------------------------------------------------------------------

class Page(HTMLParser):
    "Tags, attributes and visible text; notices tags that do not match"
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.stack = []
        self.words = []
        self.feed(text)
        assert not self.stack
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "input"): self.stack.append(tag)
    def handle_endtag(self, tag): assert self.stack.pop() == tag
    def handle_data(self, data): self.words += [] if self.stack and self.stack[-1] == "style" else [data]
    def all(self, tag): return [a for t, a in self.tags if t == tag]

def sound(text):
    "A page that needs nothing, hides nothing from a screen reader, and points nowhere else"
    p = Page(text)
    ids = [a["id"] for _, a in p.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert not {t for t, _ in p.tags} & {"script", "link", "iframe", "i", "s"}
    assert not re.search(r"https?:|url\(|src=\"(?!data:)", text)
    assert any(m.get("name") == "viewport" for m in p.all("meta"))
    assert p.all("html")[0]["lang"] == "en"
    levels = [int(t[1]) for t, _ in p.tags if re.fullmatch("h[1-6]", t)]
    assert levels[0] == 1 and levels.count(1) == 1 and max(np.diff(levels)) <= 1
    used = [a["href"] for a in p.all("use")]
    assert {u[1:] for u in used} == {a["id"] for a in p.all("symbol")}
    assert {a["href"][1:] for a in p.all("a")} <= set(ids)
    assert all(a["alt"] for a in p.all("img"))
    assert all(a["aria-label"] for a in p.all("svg") if a.get("role") == "img")
    assert p.stack == []
    for uri in [a["src"] for a in p.all("img")] + [a["href"] for a in p.all("image")]:
        kind, raw = re.fullmatch(r"data:image/(png|jpeg|svg\+xml);base64,(.+)", uri).groups()
        raw = base64.b64decode(raw)
        assert b"<svg" in raw if kind == "svg+xml" else Image.open(io.BytesIO(raw)).format == kind.upper()
    return p

@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    items, s = world
    d = tmp_path_factory.mktemp("runs") / "my <run>"
    d.mkdir()
    (d / "settings.json").write_text('{"note": "<s>tau"}')
    few = Bootstrap(200)
    table = result_table(s, items, changed_from="random", bootstrap=few)
    count_look(d, s)
    paired = paired_table(s, items, ["random"], few)
    findings = Findings(table=table, scored=s, items=items, history=history(), paired=paired)
    path = write_report(d, findings, notes=["a & b"], bootstrap=few)
    return d, table, path

def test_page_is_sound_and_escaped(run):
    d, _, path = run
    text = path.read_text()
    p = sound(text)
    words = "".join(p.words)
    assert str(d.parent) not in text and len(text) < 500_000
    nasty = ("my <run>", "a & b", "<script>alert('x')</script>", "<i>said", "<b> ×3", "<s>tau")
    for said in nasty: assert said in words
    for said in ("no difference shown", "1 evaluations failed", "looks at test: 1"): assert said in words
    assert len(p.all("symbol")) == 8 + 6 < len(p.all("use")) # each picture once, however often it is shown

def test_page_says_what_the_table_says(run):
    d, table, path = run
    p = Page(path.read_text())
    words = "".join(p.words)
    back = pd.read_csv(d / "results.csv")
    assert list(back) == ["selector", "shots", "n", "acc", "lo", "hi", "gap_closed", "changed"]
    assert np.allclose(back.acc, table.acc)
    for r in table.itertuples():
        assert r.selector in words and f"{100*r.acc:.1f} [{100*r.lo:.1f}, {100*r.hi:.1f}]" in words
    assert "Cases: rce, 2 shots" in words
    assert words.count("The LVLM says") == len(p.all("article")) == 8
    figures = {"results.png", "gap.png", "curves.png", "rl.png", "examples.png"}
    others = {"results.csv", "report.html", "settings.json", "looks.json"}
    assert {f.name for f in d.iterdir() if not f.name.startswith(".")} == figures | others
    assert all(Image.open(f).size[0] > 250 for f in d.glob("*.png"))

def test_a_case_shows_what_the_others_would_have_chosen(run, world):
    _, s = world
    p = Page(run[2].read_text())
    text = "".join(p.words)
    one = text[text.index("Question 6") :]
    one = one[: one.index("Question", 9)] if "Question" in one[9:] else one
    assert "unchanged against zero_shot" not in one
    for said in ("won against random", "probability of the right answer 0.50", "truth: word6 ×7"): assert said in one
    # prompt order, then the query
    assert one.index("demonstration 1") < one.index("word103")
    assert one.index("word103") < one.index("word102") < one.rindex("what is number 6?")
    # zero-shot, random, the oracle last
    assert one.index("no demonstration") < one.index("word100") < one.index("word104")

def test_a_case_has_the_id_that_came_in(tmp_path):
    "Where ids were texts, a reader of the page looks for those"
    Image.new("RGB", (8, 8), "red").save(tmp_path/"a.png")
    texts = dict(question="what?", answer="dax", answers=[["dax"]*10]*2, image_path=str(tmp_path/"a.png"))
    items = pd.DataFrame(dict(question_id=["22MexNk", 7]) | texts)
    row = pick_zero(Pool({"22MexNk": (7,)}, {})).iloc[0]
    told = row.copy()
    for column in ("vqa_pred_answer", "vqa_acc_score", "vqa_gt_prob", "eval_failed", "error"):
        told[column] = dict(vqa_pred_answer="dax", vqa_acc_score=1., vqa_gt_prob=.5, eval_failed=False).get(column)
    page = case_block(items, told).html()
    assert "Question 22MexNk: what?" in page and 'aria-label="image of question 22MexNk"' in page
    assert item_picture(items, "22MexNk").size == item_picture(items, "7").size == (8, 8)

def test_page_leaves_out_what_was_not_given(world, tmp_path):
    _, s = world
    table = result_table(s, changed_from=None, bootstrap=FEW)
    path = write_report(tmp_path / "r", Findings(table=table), title="bare")
    words = "".join(sound(path.read_text()).words)
    assert not re.search("Training|Cases|Differences|Settings|Data", words)
    assert "bare" in words and "not counted" in words
    assert not (tmp_path/"r"/"curves.png").exists()

def test_pictures_fit_their_budget(tmp_path):
    ids = list(range(12))
    noise = np.random.default_rng(0)
    for i in ids:
        Image.fromarray(noise.integers(0, 255, (300, 400, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    items = pd.DataFrame(dict(question_id=ids, image_path=[str(tmp_path / f"{i}.png") for i in ids]))
    pics = Pictures(160_000)
    wide = Pictures()
    for i in ids:
        pics.show(items, i, 80)
        pics.show(items, i)
        wide.show(items, i)
    assert len(pics.html()) < 170_000 < len(wide.html())
    assert pics.html().count("image/jpeg") == 12
    assert Pictures().html().count("<symbol") == 0
    assert data_uri(Image.new("RGB", (56, 56))).startswith("data:image/png") # a drawing stays exact

# ---- run folders ----------------------------------------------------------------------------------------------------

@pytest.fixture
def quick(monkeypatch):
    "Pages without drawing: what is drawn is tested above"
    def close(ax): plt.close(np.ravel(ax)[0].figure)
    def svg(ax, alt):
        close(ax)
        return Figure(data_uri(Image.new("RGB", (2, 2))), alt)
    def save_fig(path, ax):
        close(ax)
        return path
    monkeypatch.setattr("leverplus.report._svg", svg)
    monkeypatch.setattr("leverplus.report._save_fig", save_fig)
    monkeypatch.setattr("leverplus.runs.git_state", lambda root=None: None)

def make_run(path, scored, seed=0, pool="p", **settings):
    r = Run.create(path, dict(split="test") | settings, seed, dict(pool=pool))
    r.save_frame("predictions.parquet", scored.assign(pointer=scored.pointer.map(list)))
    return r.finish(acc=.5)

def test_a_run_folder_is_enough(world, tmp_path, quick):
    items, s = world
    r = make_run(tmp_path / "one", s)
    r.save_history(history())
    text = report(r.path, items, bootstrap=FEW).read_text()
    words = "".join(sound(text).words)
    there = tmp_path/"there.html"
    two = make_run(tmp_path/"two", s)
    assert "Training" not in report(two, items, there, Cases(n=1), bootstrap=FEW).read_text()
    assert there.exists()
    assert read_scored(r).pointer.tolist() == s.pointer.tolist()
    assert "Cases: rce" in words and "Training" in words and "fingerprints" in words
    assert (r.path/"results.csv").exists()
    assert report(r, bootstrap=FEW).read_text().count("<article") == 0 # no items, nothing described: no cases
    axs = r.show_results(items, 2, "rce", 2)
    assert axs.shape == (2, 4)

def test_described_predictions_need_no_items(world, tmp_path, quick):
    items, s = world
    one = s[s.selector == "rce"]
    asked = items.loc[one.question_id]
    described = one.assign(
        image_id=one.question_id,
        question=asked.question.to_numpy(),
        answers=asked.answers.to_numpy(),
        demo_questions=[[items.question[d] for d in p] for p in one.pointer],
        demo_answers=[[items.answer[d] for d in p] for p in one.pointer],
    )
    r = make_run(tmp_path/"d", described)
    known = described_items(read_scored(r))
    assert known.answer[103] == "word103" and known.answer[4] == "word4"
    assert described_items(s) is None
    named = described_items(read_scored(r).assign(given_id=[f"id {q}" for q in one.question_id]))
    assert given_ids(named, [4, 103]) == ["id 4", 103]         # demonstrations are told by number
    words = "".join(sound(report(r, bootstrap=FEW).read_text()).words)
    assert "(no picture here)" in words and "Cases: rce" in words
    assert "Differences" not in words

def test_data_that_cannot_be_read_is_told(world, tmp_path, quick):
    items, s = world
    r = make_run(tmp_path / "bad", s)
    d = r.path / "groups" / "train"
    d.mkdir(parents=True)
    (d / "manifest.json").write_text('{"format": 99}')
    assert "train was not read: " in report(r, items, cases=Cases(n=1), bootstrap=FEW).read_text()
    given = Findings(facts={}, data="fit to train on")
    with pytest.raises(ValueError, match="facts, data belong to one run"):
        report([r, r], items, findings=given)

def test_several_runs_are_compared_or_refused_in_words(world, tmp_path, quick):
    items, s = world
    runs = [make_run(tmp_path/"a", s), make_run(tmp_path/"b", s, 1)]
    runs.append(make_run(tmp_path/"c", s, pool="other", tau=2))
    (runs[2].path / "predictions.parquet").rename(tmp_path / "x")
    d = runs_differ(runs)
    assert d.index.tolist() == ["seed", "setting.tau", "fingerprint.pool"]
    assert d.loc["setting.tau"].tolist() == ["absent", "absent", "2"]
    words = "".join(sound(report(runs, items, cases=Cases(n=4), bootstrap=FEW).read_text()).words)
    assert "c against a: run 'c' has no predictions.parquet" in words
    assert "b: rce - a: rce: +0.0 points" in words
    assert "The highest row is a: rce (2 shots)" in words and "No difference shown between the runs" in words
    assert "1 run could not be compared with the first" in words
    assert "Training curves together" not in words # no run has any
    assert (tmp_path/"report.html").exists()
    assert "Over seeds" not in words
    for r in runs[:2]: r.save_history(history())
    two = report(runs[:2], items, tmp_path/"two.html", Cases(n=2), bootstrap=FEW)
    assert "Over seeds" in two.read_text() and "Training curves together" in two.read_text()
    (tmp_path / "x").rename(runs[2].path / "predictions.parquet")
    tests, refused = compare_many(runs, items=items, bootstrap=FEW)
    assert len(refused) == 1 and "not comparable: pool" in refused[0]
    assert set(tests.verdict) == {"no difference shown"}
    tests, refused = compare_many(runs, other=("pool",), items=items, bootstrap=FEW)
    assert not refused and len(tests) == 2
    with pytest.raises(FileNotFoundError, match="not a run folder"): report(tmp_path/"nowhere")
    with pytest.raises(ValueError, match="no runs"): report([])

# ---- nothing that a run holds is HTML ----------------------------------------------------------------------

NASTY = "<img src=x onerror=alert(1)>&amp;\"'</title></style><b>"

def nasty(place): return f"{place} {NASTY}"

def shown_as_text(page, places):
    "A sound page on which what stands in these places is read as it was written"
    text = page.read_text()
    words = " ".join(sound(text).words)
    assert "onerror=alert(1)>" not in text and NASTY not in text
    for place in places:
        quoted = json.dumps(nasty(place), ensure_ascii=False) # settings stand on the page as JSON
        assert nasty(place) in words or quoted in words, place
    attributes = [value for _, given in Page(text).tags for value in given.values() if value]
    assert not any("javascript:" in value for value in attributes)

@pytest.fixture
def marked(world):
    "Items and scored picks whose every text holds markup"
    items, s = world
    items = items.assign(
        question=[nasty(f"question {i}") for i in items.index],
        answer=[nasty(f"answer {i}") for i in items.index],
        answers=[[nasty(f"annotator {i}")] * 10 for i in items.index],
        question_type=[nasty("type") if i % 2 else "plain" for i in items.index],
    )
    named = s.selector.replace(dict(rce=nasty("selector")))
    return items, s.assign(selector=named, vqa_pred_answer=[nasty(f"said {q}") for q in s.question_id])

def test_a_run_of_markup_is_text_everywhere(marked, tmp_path):
    items, s = marked
    settings = {nasty("key"): {"a": nasty("value")}}
    r = make_run(tmp_path/"<i>run & folder", s, pool=nasty("fingerprint"), **settings)
    r.save_history(history(stage=nasty("stage")).assign(live_before=.01, **{nasty("column"): 1.}))
    tests = pd.DataFrame([{
        "selector": nasty("tested"), "against": nasty("rival"), "shots": 2, "n": 8, "delta": .1, "lo": .0,
        "hi": .2, "mde": .1, "better": 1, "worse": 0, "p_changed": .5, "changed": .2, "agree": .3, "p": .01,
        "p_holm": .01, "verdict": nasty("verdict"), nasty("tests column"): nasty("tests value"),
    }])
    r.save_frame("tests.csv", tests)
    r.finish(**{"acc": .5, nasty("metric"): nasty("measured")})
    train = r.path/"groups"/"<u>train"
    train.mkdir(parents=True)
    (train/"manifest.json").write_text(json.dumps({"format": nasty("format")}))
    page = report(r, items, title=nasty("title"), notes=[nasty("note")], bootstrap=FEW)
    shown_as_text(page, [
        "title", "note", "key", "value", "fingerprint", "metric", "measured", "stage", "tested", "rival",
        "verdict", "tests column", "tests value", "selector", "question 3", "question 103", "answer 103",
        "annotator 4", "said 5", "type",
    ])
    text = page.read_text()
    words = " ".join(Page(text).words)
    assert "<u>train was not read" in words
    # the headline and what the figure of differences says aloud
    said, = re.findall("<section class=\"headline\".*?</section>", text, re.S)
    assert nasty("selector") in " ".join(Page(said).words)
    labels = [a["aria-label"] for a in Page(text).all("svg") if a.get("role") == "img"]
    assert any(nasty("tested") in label and nasty("rival") in label for label in labels)

def test_names_and_differences_of_runs_are_text(marked, tmp_path, quick):
    items, s = marked
    runs = [
        make_run(tmp_path/"<b>a", s, maker=nasty("mine")),
        make_run(tmp_path/"<i>b", s, 1, maker=nasty("yours")),
        make_run(tmp_path/"<s>c", s, pool=nasty("other pool")),
    ]
    page = report(runs, items, cases=Cases(n=3), notes=[nasty("note")], bootstrap=FEW)
    shown_as_text(page, ["note", "mine", "yours", "other pool", "selector"])
    words = " ".join(Page(page.read_text()).words)
    for name in ("Run <b>a", "<i>b: selector", "<s>c against <b>a: "): assert name in words
    said = re.findall("<section class=\"headline\".*?</section>", page.read_text(), re.S)
    assert len(said) == 4 and "No difference shown between the runs" in said[0] # on top, and of each run

def test_a_bare_folder_of_markup_is_text(world, tmp_path, quick):
    d = tmp_path/"<b>bare"
    d.mkdir()
    (d/"settings.json").write_text(json.dumps({nasty("name"): "any"}))
    (d/"looks.json").write_text("[]")
    table = result_table(world[1], changed_from=None, bootstrap=FEW)
    table.attrs["oracle"] = {2: nasty("oracle")}
    findings = Findings(table=table, data=nasty("data"), split=nasty("split"))
    page = write_report(d, findings)
    shown_as_text(page, ["data", "split", "oracle"])
    words = " ".join(sound(page.read_text()).words)
    assert "<b>bare" in words and json.dumps(nasty("name"), ensure_ascii=False) in words

def test_only_blocks_are_html():
    "No template calls its data safe, and no module does"
    package = pathlib.Path(leverplus.__file__).parent
    templates = sorted((package/"templates").iterdir())
    assert len(templates) > 15
    for path in templates: assert not re.search(r"\bsafe\b|autoescape", path.read_text()), path.name
    for path in package.glob("*.py"):
        words = set(re.findall(r"(?<![.\w])(?:Markup|escape)(?=\()", path.read_text()))
        assert not words and "to_html(" not in path.read_text(), path.name

def test_a_level_is_said_where_it_is_used(world, tmp_path, quick):
    items, s = world
    strict = Bootstrap(100, level=.99)
    table = result_table(s, items, changed_from="random", bootstrap=strict)
    page = write_report(tmp_path/"r", Findings(table=table, scored=s, items=items), bootstrap=strict)
    words = " ".join(Page(page.read_text()).words)
    assert "accuracy, % [99 %]" in words and "gap closed [99 %]" in words and "95 %" not in words

def test_what_is_given_goes_before_what_is_found(world, tmp_path, quick):
    items, s = world
    r = make_run(tmp_path/"run", s, split="dev")
    count_look(r.path, s, "dev")
    given = Findings(history=history(), data=Paragraph("looked at by hand"), looks=7)
    words = "".join(Page(report(r, items, findings=given, bootstrap=FEW).read_text()).words)
    assert "Training" in words and "looked at by hand" in words and "looks at dev: 7" in words
    found = "".join(Page(report(r, items, bootstrap=FEW).read_text()).words)
    assert "Training" not in found and "looks at dev: 1" in found

def test_settings_of_a_page_are_keywords():
    for make in (Findings, Cases):
        with pytest.raises(TypeError, match="positional"): make(None)
    with pytest.raises(dataclasses.FrozenInstanceError): Cases().n = 3
    assert repr(Findings(split="dev", looks=3)) == "Findings: looks, split"

def test_a_table_alone_is_no_finding(tmp_path):
    with pytest.raises(TypeError, match="a DataFrame, wanted Findings"):
        write_report(tmp_path/"r", pd.DataFrame())
    assert not (tmp_path/"r").exists()

# ---- in a browser ---------------------------------------------------------------------------------------------------

BROWSERS = """
    chromium chromium-browser google-chrome google-chrome-stable chrome chromium-headless-shell microsoft-edge
""".split()
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
WIDTHS = 390, 1200
ASK = """<script>onload = () => { document.title = JSON.stringify([...document.querySelectorAll('iframe')].map(f => {
  const d = f.contentDocument;
  const seen = () => [...d.querySelectorAll('.case')].filter(c => c.getClientRects().length).length;
  const click = c => { const b = d.querySelector(c); if (b) b.checked = true; return seen() };
  const pop = c => { const b = d.querySelector(c); b.click(); const open = d.querySelector(':popover-open');
    const box = open.getBoundingClientRect();
    const said = {text: open.innerText, right: box.right, bottom: box.bottom, left: box.left,
                  id: open.id, wanted: b.getAttribute('popovertarget')};
    open.hidePopover(); return {...said, shut: d.querySelectorAll(':popover-open').length} };
  const out = e => !e.closest('.wide') && e.getBoundingClientRect().right > f.clientWidth + 1;
  return {width: d.documentElement.scrollWidth, room: d.documentElement.clientWidth,
          ink: d.body.innerText.length, all: seen(),
          cut: [...d.querySelectorAll('h1,h2,h3,p,li,dd,figure,img,fieldset,summary,.forest td')]
            .filter(out).length,
          forest: [...d.querySelectorAll('.forest svg[role]')].map(e => e.getBoundingClientRect().width),
          word: pop('.results .term'),
          won: click('.f-won-0'), lost: click('.f-lost-0'), unchanged: click('.f-unchanged-0'),
          back: click('.f-all')} })) }</script>"""

def browse(tmp_path, page, *args):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command = [BROWSER, *flags, f"--user-data-dir={tmp_path/'profile'}", *args, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, timeout=120, text=True).stdout

@pytest.mark.skipif(not BROWSER, reason="no headless Chromium or Chrome on this machine")
def test_a_browser_shows_the_page(run, world, tmp_path):
    "At a phone's and a desk's width nothing runs out of the right edge, there is ink, and the filter filters"
    text = html.escape(run[2].read_text(), quote=True)
    look = "height:900px;border:0"
    frames = "".join(f'<iframe srcdoc="{text}" style="width:{w}px;{look}"></iframe>' for w in WIDTHS)
    both = tmp_path / "both.html"
    both.write_text(f"<!DOCTYPE html><meta charset=utf-8><title>-</title>{ASK}{frames}", encoding="utf8")
    dump = browse(tmp_path, both, "--virtual-time-budget=5000", "--dump-dom")
    told = json.loads(html.unescape(re.search("<title>(.*?)</title>", dump)[1]))
    o = query_outcomes(world[1], "rce", 2, "random").value_counts()
    for w, t in zip(WIDTHS, told):
        assert t["room"] == w and t["width"] <= w and t["cut"] == 0 and t["ink"] > 1000, t
        word = t["word"] # one tap away, within the screen, and gone again
        assert word["id"] == word["wanted"] and word["text"].startswith("selector") and word["shut"] == 0, t
        assert 0 <= word["left"] and word["right"] <= w and word["bottom"] <= 900, t
        assert len(t["forest"]) == 2 and min(t["forest"]) > 60, t # against random, and against zero-shot
        assert t["all"] == t["back"] == 8 and [t[k] for k in OUTCOMES[:3]] == [o[k] for k in OUTCOMES[:3]], t
    shot = tmp_path / "phone.png"
    browse(tmp_path, run[2], "--window-size=500,3000", f"--screenshot={shot}")
    im = np.asarray(Image.open(shot).convert("L"))
    assert im.shape == (3000, 500) and .01 < (im < 128).mean() < .5 and (im[:, -6:] > 250).all()

# ---- thousands of cases ------------------------------------------------------------------------------------

LARGE = 130 # questions: more than a page shows as they are

@pytest.fixture(scope="module")
def large(tmp_path_factory):
    "Items, scored picks of four selectors, and the page of all their cases; every text holds markup"
    d = tmp_path_factory.mktemp("large")
    queries = list(range(LARGE))
    demos = list(range(1000, 1020))
    g = np.random.default_rng(0)
    for i in range(60):
        noise = g.integers(0, 256, (150, 200, 3), dtype=np.uint8)
        Image.fromarray(noise).save(d/f"{i}.jpg")
    ids = queries + demos
    items = pd.DataFrame(dict(
        question_id=ids, image_id=ids, image_path=[str(d/f"{i % 60}.jpg") for i in ids],
        question=[nasty(f"question {i}") for i in ids], answer=[nasty(f"answer {i}") for i in ids],
        answers=[[nasty(f"annotator {i}")]*10 for i in ids],
    ), index=ids)
    parts = []
    for name, S in (("zero_shot", 0), ("random", 2), (nasty("mine"), 2), ("oracle", 2)):
        acc = g.choice([0., .6, 1.], LARGE)
        parts.append(pd.DataFrame(dict(
            selector=name, shots=S, question_id=queries, draw=0,
            pointer=[tuple(g.choice(demos, S, replace=False).tolist()) for _ in queries],
            vqa_acc_score=acc, vqa_gt_prob=acc/2, vqa_pred_answer=[nasty(f"said {q}") for q in queries],
            eval_failed=[q == 7 for q in queries],
        )))
    scored = pd.concat(parts, ignore_index=True)
    table = result_table(scored, items, changed_from=None, bootstrap=FEW)
    findings = Findings(table=table, scored=scored, items=items)
    return items, scored, write_report(d/"run", findings, Cases(n=LARGE), bootstrap=FEW)

def data_of(page):
    "What the script of a large page is given"
    raw, = re.findall(r'<script type="application/json">(.*?)</script>', page.read_text(), re.S)
    assert not set("<>&'") & set(raw)
    return json.loads(raw)

def test_a_large_page_has_the_first_cases_and_all_of_them_as_data(large):
    items, scored, page = large
    p = Page(page.read_text())
    assert len(p.all("article")) == 40 and len(p.all("script")) == 2
    data = data_of(page)
    assert len(data["cases"]) == LARGE and len(set(data["texts"])) == len(data["texts"])
    mine = scored[scored.selector == nasty("mine")].set_index("question_id")
    went = query_outcomes(scored, nasty("mine"), 2, "random")
    assert [data["against"][0], set(data["selectors"])] == ["random", {"random", "oracle", "zero_shot"}]
    for query, demos, told, truth, outcomes, others in data["cases"]:
        who, question, answer, _ = data["items"][query]
        q = int(data["texts"][who])
        row = mine.loc[q]
        assert data["texts"][question] == items.question[q]
        assert data["texts"][truth] == truth_text(items.answers[q])
        assert [data["texts"][data["items"][d][2]] for d in demos] == items.answer[list(row.pointer)].tolist()
        kind, word, said, prob, _ = told
        assert data["texts"][word] == mark_of(row)[0] and prob == pytest.approx(row.vqa_gt_prob, abs=1e-3)
        assert said is None if row.eval_failed else data["texts"][said] == row.vqa_pred_answer
        assert data["outcomes"][outcomes[0]] == went[q] and len(others) == 3

def test_pictures_of_a_large_page_are_there_once_and_within_bounds(large, monkeypatch):
    import leverplus.cases
    items, scored, page = large
    text = page.read_text()
    addresses = re.findall(r"data:image/jpeg;base64,[\w+/=]+", text)
    data = data_of(page)
    assert len(set(addresses)) == len(addresses)
    on_top = {a["id"] for a in Page(text).all("symbol")}
    pointed = {address[1:] for address, *_ in data["pictures"] if address[0] == "#"}
    assert pointed <= on_top and len(data["pictures"]) == 60
    opened = []
    def look(path, **kw):
        opened.append(path)
        return Image.open(path)
    monkeypatch.setattr(leverplus.cases, "open_image", look)
    room = Thumbnails(Pictures(), room=20_000)
    places = [room.place(items, q) for q in items.index]
    assert 0 < len(room.list) < 20 and places.count(-2) > 60 and len(opened) == len(set(opened)) == len(room.list)

def test_a_picture_of_a_page_is_read_once_for_each_size(world, monkeypatch):
    import leverplus.cases
    items, s = world
    opened = []
    def look(path, **kw):
        opened.append(path)
        return Image.open(path)
    monkeypatch.setattr(leverplus.cases, "open_image", look)
    pics = Pictures()
    for _ in range(3):
        for size in (224, 80): pics.show(items, 100, size)
    assert len(opened) == 2 and len(pics.kept) == 1

def test_only_the_script_of_the_page_may_run(large, run):
    "The policy of a page names its script by its content, and nothing else"
    for page in (large[2], run[2]):
        metas = Page(page.read_text()).all("meta")
        policy, = [m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy"]
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
        scripts = re.findall(r"<script>(.*?)</script>", page.read_text(), re.S)
        digests = {base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts}
        assert all(rules["script-src"] == f"'sha256-{digest}'" for digest in digests)
        assert len(scripts) == (page == large[2])

def test_half_a_character_does_not_stop_a_page(world, tmp_path):
    page = write_report(tmp_path/"r", Findings(table=table_of(random_2=.3, rce_2=.4)), title="a \ud800 b")
    assert "a &#55296; b" in page.read_text()

TURN = """<script>onload = () => { const d = document.querySelector('iframe').contentDocument;
  const seen = () => [...d.querySelectorAll('.case')].filter(c => c.getClientRects().length).length;
  const where = () => d.querySelector('.where').textContent;
  const click = c => { d.querySelector(c).click(); return [seen(), where()] };
  const first = [seen(), where()];
  d.querySelectorAll('.turn button')[1].click();
  document.title = JSON.stringify({first, on: [seen(), where()], head: d.querySelector('.case').innerText,
    html: d.querySelectorAll('.case script, .case b b').length, won: click('.f-won-0'), all: click('.f-all'),
    title: d.title}) }</script>"""

@pytest.mark.skipif(not BROWSER, reason="no headless Chromium or Chrome on this machine")
def test_a_browser_turns_the_pages_of_a_large_page(large, tmp_path):
    items, scored, page = large
    text = page.read_text().replace("<body>", "<body><script>document.title = 'run by somebody'</script>")
    frame = f'<iframe srcdoc="{html.escape(text, quote=True)}" style="width:900px;height:900px"></iframe>'
    outer = tmp_path/"outer.html"
    outer.write_text(f"<!DOCTYPE html><meta charset=utf-8><title>-</title>{TURN}{frame}", encoding="utf8")
    dump = browse(tmp_path, outer, "--virtual-time-budget=5000", "--dump-dom")
    told = json.loads(html.unescape(re.search("<title>(.*?)</title>", dump)[1]))
    won = int((query_outcomes(scored, nasty("mine"), 2, "random") == "won").sum())
    assert told["first"] == [40, f"1 to 40 of {LARGE}"] and told["on"] == [40, f"41 to 80 of {LARGE}"]
    assert told["won"] == [min(won, 40), f"1 to {min(won, 40)} of {won}"] and told["all"] == told["first"]
    assert told["title"] == "run" and told["html"] == 0
    assert "<b" in told["head"] and "question" in told["head"]

# ---- rivals at their best ------------------------------------------------------------------------------------

def test_a_headline_holds_each_rival_at_its_best_number_of_demonstrations():
    "A selector that is best with one demonstration is not held against rivals that are good with two"
    n = 200
    shares = { # of the questions, with one and with two demonstrations
        "rce": (.9, .3), "similar_mixed": (.2, .6), "random": (.12, .1), "oracle": (1., 1.),
    }
    rows = [
        dict(selector=selector, shots=S, draw=0, question_id=q, pointer=tuple(range(1000, 1000 + S)),
             vqa_acc_score=float(q < share*n), vqa_gt_prob=.5, vqa_pred_answer="so", eval_failed=False)
        for selector, both in shares.items() for S, share in zip((1, 2), both) for q in range(n)
    ]
    scored = pd.DataFrame(rows)
    table = result_table(scored, bootstrap=FEW)
    tests = rival_tests(scored, table, bootstrap=FEW)
    assert dict(zip(tests.against, tests.against_shots)) == dict(random=1, similar_mixed=2)
    assert set(tests.shots) == {1} and set(tests.selector) == {"rce"}
    assert dict(zip(tests.against, tests.delta.round(2))) == dict(similar_mixed=.3, random=.78)
    first, second = headline(table, tests)
    better = "rce (1 shot) is better than "
    assert first.startswith(better + "similar_mixed (2 shots): 90.0 % against 60.0 %, +30.0 points [")
    assert second.startswith(better + "random: 90.0 % against 12.0 %, +78.0 points [")
    nobody = scored.selector != "rce"
    assert rival_tests(scored[nobody], table[table.selector != "rce"], bootstrap=FEW) is None
    alone = table[table.selector.isin(["rce", "oracle"])]
    assert rival_tests(scored[scored.selector.isin(["rce", "oracle"])], alone, bootstrap=FEW) is None
