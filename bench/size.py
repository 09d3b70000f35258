"""A large evaluation: how long its tables and its page of 5,000 cases take, how large the page is, and how soon
a browser shows it.

`python bench/size.py [--questions 5046] [--selectors 20] [--cases 5000] [--pictures 2000] [--browser CHROME]`
prints a table. The questions are those of OKVQA where its files lie in ../shared/data/okvqa, else made up. The
pictures are drawn, as large as photographs of COCO. CHROME is a Chromium or Chrome; without it nothing is
opened.
"""
import argparse, statistics, subprocess, tempfile, time
from pathlib import Path
import numpy as np, pandas as pd
from PIL import Image
from leverplus.core import repo_path, rng
from leverplus.data import read_soft_labels
from leverplus.evaluate import gap_table, paired_tests, result_table
from leverplus.report import Cases, Findings, rival_tests, write_report, zero_tests

WORDS = "yes no two red dog surfing kitchen wood winter pizza frisbee train umbrella bear giraffe".split()
OKVQA = repo_path().parent/"shared"/"data"/"okvqa"

def made_up(n):
    "Questions with answers, where there are no real ones"
    g = rng("size", "made up")
    ids = np.arange(1, n + 1)
    answers = [[WORDS[i] for i in g.integers(len(WORDS), size=10)] for _ in ids]
    asked = [f"What is the {WORDS[i % len(WORDS)]} in picture {i} made for?" for i in ids]
    first = [a[0] for a in answers]
    columns = dict(question_id=ids, image_id=ids, question=asked, answer=first, answers=answers)
    return pd.DataFrame(columns, index=ids)

def questions(n):
    "Items: n queries, and as many demonstrations"
    if not OKVQA.is_dir(): return made_up(2*n)
    both = pd.concat([read_soft_labels(OKVQA, split)[:n] for split in ("val", "train")])
    return both[["question_id", "image_id", "question", "answer", "answers"]]

def photographs(folder, n):
    "Files of pictures of 640 x 480 pixels that are no plain surfaces"
    g = rng("size", "pictures")
    for i in range(n):
        coarse = g.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(folder/f"{i}.jpg")
    return [str(folder/f"{i}.jpg") for i in range(n)]

def one_selector(name, shots, queries, demos, base, g):
    "Scored picks of a selector that answers most questions as all others do"
    acc = np.where(g.random(len(queries)) < .15, g.permutation(base), base)
    if name == "oracle": acc = np.maximum(acc, base)
    shown = g.choice(demos, (len(queries), shots)).tolist()
    said = g.choice(WORDS, len(queries))
    return pd.DataFrame(dict(
        selector=name, shots=shots, question_id=queries, draw=0, pointer=[tuple(p) for p in shown],
        vqa_acc_score=acc, vqa_gt_prob=.9*acc, vqa_pred_answer=said, eval_failed=False,
    ))

def evaluation(items, n, k):
    "Scored picks of zero-shot, random, similarity, the oracle and trained selectors, k in all, two shots"
    g = rng("size", "scores")
    queries = items.index[:n]
    demos = items.index[n:]
    base = g.choice([0., .3, .6, .9, 1.], n, p=[.4, .05, .05, .05, .45])
    names = ["zero_shot", "random", "similar_mixed", *(f"ours_{i}" for i in range(k - 4)), "oracle"]
    shots = [0] + [2]*(k - 1)
    parts = [one_selector(name, S, queries, demos, base, g) for name, S in zip(names, shots)]
    return pd.concat(parts, ignore_index=True)

def seconds(f):
    t = time.perf_counter()
    out = f()
    return out, time.perf_counter() - t

def load(browser, page, folder):
    "Start a browser, load a page, draw it, end"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder/'profile'}"]
    command = [browser, *flags, f"--screenshot={folder/'shot.png'}", page.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=300)

def opened(browser, page, folder, repeats=3):
    "Median seconds by which a page takes longer than an empty one"
    empty = folder/"empty.html"
    empty.write_text("<!DOCTYPE html><title>empty</title>")
    def median(what):
        times = [seconds(lambda: load(browser, what, folder))[1] for _ in range(repeats)]
        return statistics.median(times)
    return median(page) - median(empty)

def tests(scored, table, items):
    "All comparisons that a page has"
    return paired_tests(scored, items), zero_tests(scored, items), rival_tests(scored, table, items)

def rows_of(args, folder):
    "(what, how much) of each row of the table"
    items = questions(args.questions)
    n = len(items)//2
    files = photographs(folder, args.pictures)
    items = items.assign(image_path=[files[i % len(files)] for i in range(len(items))])
    scored = evaluation(items, n, args.selectors)
    table, t_table = seconds(lambda: result_table(scored, items))
    _, t_gap = seconds(lambda: gap_table(scored, items))
    tested, t_tests = seconds(lambda: tests(scored, table, items))
    yield f"result table of {args.selectors} selectors on {n:,} questions", f"{t_table:.1f} s"
    yield "gap closed, with intervals", f"{t_gap:.1f} s"
    yield f"{sum(map(len, tested))} paired tests, with intervals", f"{t_tests:.1f} s"
    yield "evaluation, all of this", f"{t_table + t_gap + t_tests:.1f} s"
    findings = Findings(table=table, scored=scored, items=items)
    page, t_page = seconds(lambda: write_report(folder/"run", findings, Cases(n=args.cases)))
    yield f"page of {min(args.cases, n):,} cases, made", f"{t_page:.1f} s"
    yield "page, size", f"{page.stat().st_size/1e6:.1f} MB"
    if args.browser: yield "page, opened", f"{opened(args.browser, page, folder):.1f} s"

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--questions", type=int, default=5046)
    p.add_argument("--selectors", type=int, default=20, help="5 or more, baselines and the oracle included")
    p.add_argument("--cases", type=int, default=5000)
    p.add_argument("--pictures", type=int, default=2000)
    p.add_argument("--browser", help="a Chromium or Chrome that opens the page")
    args = p.parse_args()
    print("| what | how much |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for what, how_much in rows_of(args, Path(folder)): print(f"| {what} | {how_much} |", flush=True)

if __name__ == "__main__": main()
