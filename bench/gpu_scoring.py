"""Prompts per second and share of a GPU's peak: the usual procedure against the shared scorer, without a download.

    python bench/gpu_scoring.py --out gpu.json    Qwen2.5-VL-3B, random weights, bfloat16: minutes on an H100
    python bench/gpu_scoring.py --tiny            the same code on the embedded model, on a CPU, in seconds

Speed does not depend on what the weights are, so they are random; answers of such a model mean nothing, but
the shared scorer's must be the naive procedure's, and that is checked in the same run. Greedy texts hardly
ever lie in the answer tree here, so decoding is at its worst.

Needs torch, transformers, safetensors, numpy and pillow. Rows are printed, and written to `--out`, as they
come: a run that is cut off leaves what it has.
"""
import argparse, gc, json, math, os, platform, random, statistics, sys, tempfile, time, traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import numpy as np, torch
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from leverplus import vision
from leverplus.cost import (
    QWEN_SIZES, feature_bytes, kv_bytes, mfu, peak_flops, prompt_flops, qwen_config, text_flops,
    vision_flops,
)
from leverplus.lvlm import LVLM, Targets, load_lvlm
from leverplus.pictures import open_image
from leverplus.scorer import SharedScorer, run_text
from leverplus.prompt import IMAGE_MARK, Demo, Prompt

FOLDER = ROOT/"models"/"tiny-qwen2.5-vl" # tokenizer, chat template and image processor of every size
# images in visual tokens: width, height
SHAPES = {
    "full": [(20, 15), (15, 20), (17, 18), (21, 14), (16, 19), (24, 12)],
    "tiny": [(2, 2), (3, 2), (2, 3)],
}
# |d log P| of an answer that rounding explains
LIMITS = {torch.float32: dict(mean=1e-3, max=1e-3), torch.bfloat16: dict(mean=0.15, max=1.0)}

# ---- model ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def fill(model, known, seed=0):
    """Random weights that keep activations of order 1, let tokens look at few others, and put the likeliest
    token among the first `known`
    """
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("bias"): p.zero_()
        elif p.ndim == 1: p.fill_(1.) # norms
        elif "embed_tokens" in name or "lm_head" in name:
            std = 3.2 / math.sqrt(p.shape[1])
            p.normal_(0, std / 10)
            p[:known].normal_(0, std)
        else:
            p.normal_(
                0,
                (1.4 if any(k in name for k in ("q_proj", "k_proj", "qkv")) else 1.0)
                / math.sqrt(p[0].numel()),
            )

def build(size, device, layers=None):
    """Full-size model with random weights in bfloat16, and the embedded model's tokenizer and image processor
    without its limit on image size
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    small = AutoConfig.from_pretrained(FOLDER)
    text = dict(num_hidden_layers=layers) if layers else {}
    ids = {
        k: getattr(small, k)
        for k in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    }
    text |= {k: getattr(small.text_config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.device(device): # not `.to(bfloat16)` afterwards: the rotation tables must stay in float32
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            qwen_config(size, text, **ids), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.tie_weights()
    model.eval().requires_grad_(False)
    tok = AutoTokenizer.from_pretrained(FOLDER, padding_side="left")
    fill(model, len(tok))
    images = AutoImageProcessor.from_pretrained(
        FOLDER, size=dict(shortest_edge=56 * 56, longest_edge=2048 * 28 * 28)
    )
    return LVLM(model, tok, images, f"{size}-random")

# ---- work -----------------------------------------------------------------------------------------------------------

def words(tok):
    "Phrases of exactly 1, 2 and 3 tokens, in words of the tokenizer, by length"
    say = [tok.decode([i]) for i in range(256, len(tok))]
    n = lambda s: len(tok(s, add_special_tokens=False)["input_ids"])
    first = [w for w in say if w.isalpha() and len(w) > 2]
    then = [w for w in say if w[0] == " " and len(w) > 3]
    two = [a + b for a in first for b in then if n(a + b) == 2]
    pick = random.Random(0).sample(two, 40)
    return {
        1: first,
        2: pick,
        3: [p for p in (a + random.Random(a).choice(then) for a in pick) if n(p) == 3],
    }, then

def write_image(path, shape, seed):
    "A smooth random picture, as a JPEG whose sides need no resizing"
    from PIL import Image
    g = np.random.default_rng(seed)
    (w, h) = (28*s for s in shape)
    Image.fromarray(g.integers(256, size=(6, 6, 3), dtype=np.uint8)).resize((w, h), Image.BICUBIC).save(
        path, quality=90
    )
    return str(path)

def open_plain(source, *_, **__):
    "Stands in for `open_resized` where qwen_vl_utils is absent"
    return open_image(source)

class Work:
    """Prompts of two demonstrations out of small pools and a query of its own, with ten answers; all prompts
    are asked the same answers
    """
    def __init__(self, lvlm, n, folder, shapes, pools=(8, 16), answers=10, seed=0):
        g, (by_length, then), self.tok, self.tokens = (
            random.Random(seed),
            words(lvlm.tokenizer),
            lvlm.tokenizer,
            {},
        )
        lengths = [1] * (answers // 5) + [3] * (answers // 5)
        lengths += [2] * (answers - len(lengths))
        texts = [t for k in (1, 2, 3) for t in g.sample(by_length[k], lengths.count(k))]
        self.answers = Targets(tuple(texts), (1 / answers,) * answers)
        count = iter(range(10**6))
        ask = lambda: "What" + "".join(g.choices(then, k=3))
        def image():
            i = next(count)
            shape = g.choice(shapes)
            path = write_image(Path(folder) / f"{i}.jpg", shape, i)
            self.tokens[path] = shape[0] * shape[1]
            return path
        pool = [
            [Demo(10**6 * (j + 1) + i, image(), ask(), g.choice(by_length[2])) for i in range(k)]
            for j, k in enumerate(pools)
        ]
        self.prompts = [Prompt(i, image(), ask(), tuple(g.choice(p) for p in pool)) for i in range(n)]
        rendered = [lvlm.render(p).replace(IMAGE_MARK, "") for p in self.prompts]
        self.sizes = [
            ([self.tokens[im] for im in p.images], len(self.ids(r))) for p, r in zip(self.prompts, rendered)
        ]
        ids = [self.ids(t) for t in texts]
        self.answer_tokens = sum(map(len, ids)) / answers
        # per answer, tokens that no other shares
        self.nodes = len({tuple(i[: k + 1]) for i in ids for k in range(len(i))}) / answers

    def ids(self, text): return self.tok(text, add_special_tokens=False)["input_ids"]

    def flops(self, config, n, way, new_tokens, **known):
        "Operations for the facts about the first n prompts"
        each = dict(
            answers=len(self.answers.texts),
            answer_tokens=self.nodes if way == "shared" else self.answer_tokens,
            new_tokens=new_tokens,
        )
        # of tokens, a share is given
        kept = lambda L: {k: v * L if k == "known_tokens" else v for k, v in known.items()}
        return sum(
            prompt_flops(config, im, text, way=way, **each, **kept(sum(im) + text)).total
            for im, text in self.sizes[:n]
        )

    def copies(self, n, folder):
        """The first n prompts with an image file of their own for every item: same pixels, other bytes, so
        that no two prompts share an image
        """
        def copy(path, k): # decoders stop before what is appended
            to = Path(folder) / f"{k}-{Path(path).name}"
            to.write_bytes(Path(path).read_bytes() + f"copy {k}".encode())
            return str(to)
        own = lambda item, k: replace(item, image=copy(item.image, k))
        return [
            replace(own(p, k), demos=tuple(own(d, k) for d in p.demos))
            for k, p in enumerate(self.prompts[:n])
        ]

# ---- the usual procedure --------------------------------------------------------------------------------------------

class Naive:
    """A forward pass per answer and `generate`, from the model's own methods; a prompt's images are opened and
    prepared once, which favours it
    """
    def __init__(self, lvlm, new_tokens): self.lvlm, self.new_tokens = lvlm, new_tokens

    def prepare(self, prompt):
        lv, dev = self.lvlm, self.lvlm.device
        x = lv.image_processor(images=[vision.open_resized(im) for im in prompt.images], return_tensors="pt")
        per = x["image_grid_thw"].prod(-1) // lv.image_processor.merge_size**2
        pieces = lv.render(prompt).split(IMAGE_MARK)
        text = pieces[0] + "".join(IMAGE_MARK*n + piece for n, piece in zip(per.tolist(), pieces[1:]))
        return (
            lv.tokenizer(text, add_special_tokens=False)["input_ids"],
            x["pixel_values"].to(dev, lv.model.dtype),
            x["image_grid_thw"].to(dev),
        )

    def inputs(self, ready, tails):
        "Left-padded inputs of one row per (prompt, tail)"
        lv = self.lvlm
        rows = [r[0] + t for r, t in zip(ready, tails)]
        L = max(map(len, rows))
        ids = torch.tensor([[lv.tokenizer.pad_token_id]*(L - len(r)) + r for r in rows], device=lv.device)
        mask = torch.tensor([[0]*(L - len(r)) + [1]*len(r) for r in rows], device=lv.device)
        return dict(
            input_ids=ids,
            attention_mask=mask,
            mm_token_type_ids=(ids == lv.image_id).int(),
            pixel_values=torch.cat([r[1] for r in ready]),
            image_grid_thw=torch.cat([r[2] for r in ready]),
        )

    @torch.no_grad()
    def logprobs(self, ready, tails, all_logits):
        "Log-probability of each row's tail"
        n = max(map(len, tails))
        x = self.inputs(ready, tails)
        logits = (
            self.lvlm.model(**x, **({} if all_logits else dict(logits_to_keep=n + 1)))
            .logits[:, -n - 1 : -1]
            .float()
        )
        lp = logits.log_softmax(-1).gather(-1, x["input_ids"][:, -n:, None])[..., 0]
        return [row[n - len(t):].sum().item() for row, t in zip(lp, tails)]

    @torch.no_grad()
    def generate(self, ready):
        from transformers import GenerationConfig
        x = self.inputs(ready, [[]]*len(ready))
        tok = self.lvlm.tokenizer
        greedy = GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=self.new_tokens,
            eos_token_id=self.lvlm.end_id,
            pad_token_id=tok.pad_token_id,
        )
        new = self.lvlm.model.generate(**x, generation_config=greedy)[:, x["input_ids"].shape[1]:]
        return tok.batch_decode(new, skip_special_tokens=True)

    def run(self, prompts, targets, rows=1, all_logits=True):
        "(log-probabilities, greedy text) of each prompt, `rows` rows in a pass"
        end, out = [self.lvlm.end_id], []
        tails = [self.lvlm.tokenizer(a, add_special_tokens=False)["input_ids"] + end for a in targets.texts]
        for i in range(0, len(prompts), rows):
            ready = [self.prepare(p) for p in prompts[i : i + rows]]
            says = self.generate(ready)
            todo = [(r, t) for r in ready for t in tails]
            lps = []
            for j in range(0, len(todo), rows): lps += self.logprobs(*zip(*todo[j:j+rows]), all_logits)
            out += [(lps[k*len(tails):(k + 1)*len(tails)], s) for k, s in enumerate(says)]
        return out

# ---- measuring ------------------------------------------------------------------------------------------------------

def sync(device):
    if device.type == "cuda": torch.cuda.synchronize(device)

def timed(fn, device, repeats, setup=tuple):
    "(seconds of each call of `fn(*setup())`, its last result, peak memory in GiB or None)"
    seconds, cuda = [], device.type == "cuda"
    if cuda: torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeats):
        out = None
        args = setup()
        sync(device)
        t = time.perf_counter()
        out = fn(*args)
        sync(device)
        seconds.append(time.perf_counter() - t)
    return seconds, out, torch.cuda.max_memory_allocated(device)/2**30 if cuda else None

def matmul_peak(device, dtype):
    "FLOP/s of a large matrix product on random data: median of 20"
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3): a @ b
    return 2*n**3/statistics.median(timed(lambda: a @ b, device, 20)[0])

NAIVE = "naive, one row at a time"

class Table:
    "Rows printed and saved as they come"
    HEAD = (
        f"{'way':44s} {'prompts':>7s} {'/s':>9s} {'x naive':>8s} {'GFLOP':>9s} {'TFLOP/s':>8s} {'MFU':>6s}"
        f" {'of matmul':>9s} {'GiB':>6s} {'spread':>7s}"
    )

    def __init__(self, out, minutes, peak, measured, **about):
        self.out = out
        self.end = time.perf_counter() + 60*minutes
        self.naive = None
        self.peak = peak
        self.measured = measured
        self.data = dict(about=about | dict(peak=peak, matmul=measured), rows=[], notes=[], failed=[])
        self.save()

    def save(self):
        if not self.out: return
        tmp = Path(f"{self.out}.tmp")
        tmp.parent.mkdir(parents=True, exist_ok=True)
        tmp.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(tmp, self.out)

    def add(self, way, n, seconds, flops, gib=None, whole=True, **more):
        """One row: n prompts (or only a part of their work, not `whole`) took `seconds`, a list of repeats,
        and needed `flops`
        """
        t = statistics.median(seconds)
        if way == NAIVE: self.naive = n/t
        row = dict(
            way=way,
            prompts=n,
            per_second=n / t,
            ratio=n / t / self.naive if whole and self.naive else None,
            flops=flops / n,
            rate=flops / t,
            mfu=self.peak and mfu(flops, t, self.peak),
            of_matmul=mfu(flops, t, self.measured),
            gib=gib,
            spread=max(seconds) / min(seconds),
            seconds=list(seconds),
            **more
        )
        self.data["rows"].append(row)
        self.save()
        show = lambda x, form: "-" if x is None else format(x, form)
        print(
            f"{way:44s}",
            f"{n:7.4g}",
            f"{n/t:9.2f}",
            f"{show(row['ratio'], '.1f'):>8s}",
            f"{flops/n/1e9:9.4g}",
            f"{row['rate']/1e12:8.3g}",
            f"{show(row['mfu'], '.1%'):>6s}",
            f"{row['of_matmul']:9.1%}",
            f"{show(gib, '.1f'):>6s}",
            f"{row['spread']:7.2f}",
            flush=True,
        )

    def note(self, text):
        self.data["notes"].append(text)
        self.save()
        print("  " + text, flush=True)

    def section(self, way, fn):
        "Run a part of the bench; its failure is reported and ends neither the others nor what was printed"
        if time.perf_counter() > self.end:
            self.note(f"{way}: not run, time was up")
            return None
        try: return fn()
        except Exception as e:
            self.data["failed"].append(dict(way=way, error=f"{type(e).__name__}: {e}"))
            self.save()
            print(
                f"  {way}: FAILED, {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}", flush=True
            )
            traceback.print_exc()
        finally: # the exception and its frames are gone here, and their tensors with them
            gc.collect()
            if torch.cuda.is_available(): torch.cuda.empty_cache()

# ---- parts ----------------------------------------------------------------------------------------------------------

def check(table, ref, got, dtype, what):
    """Hold results against the naive ones, and them against the next prompt's: exact to rounding in float32,
    within the limits of bfloat16 else
    """
    ref = ref[: len(got)]
    a = np.array([r[0] for r in ref])
    b = np.array([g[0] for g in got[: len(ref)]])
    d = np.abs(a - b)
    wrong = np.abs(a - np.roll(b, 1, 0))
    same = sum(r[1] == g[1] for r, g in zip(ref, got))
    limit = LIMITS[dtype]
    table.note(
        f"against naive, |d log P| of {d.size} answers: mean {d.mean():.1e}, max {d.max():.1e} (another"
        f" prompt's: mean {wrong.mean():.1e}); greedy texts equal {same} of {len(ref)}"
    )
    if not (d.mean() <= limit["mean"] and d.max() <= limit["max"]):
        raise AssertionError(f"{what}: |d log P| mean {d.mean():.3g}, max {d.max():.3g}; allowed {limit}")
    if len(ref) > 1 and not d.mean() < .2*wrong.mean():
        raise AssertionError(
            f"{what}: |d log P| {d.mean():.3g} is not small beside another prompt's, {wrong.mean():.3g}"
        )
    if dtype == torch.float32 and same < len(ref):
        raise AssertionError(f"{what}: {len(ref) - same} greedy texts differ in float32")

def clean(out):
    "Results, if none failed"
    if bad := [s.error for s in out if s.error]:
        raise RuntimeError(f"{len(bad)} of {len(out)} prompts failed: {bad[0]}")
    return out

def naive_rows(table, a, lvlm, work):
    way = Naive(lvlm, a.new_tokens)
    asked = work.prompts[:a.naive]
    def row(name, rows, all_logits, flops_way, ref=None):
        # warm-up
        run = lambda prompts: way.run(prompts, work.answers, rows, all_logits)
        run(asked[:1])
        seconds, out, gib = timed(lambda: run(asked), lvlm.device, a.repeats)
        table.add(
            name, len(asked), seconds, work.flops(lvlm.model.config, len(asked), flops_way, a.new_tokens), gib
        )
        if ref: check(table, ref, out, lvlm.model.dtype, name) # what batching alone does to the numbers
        return out
    ref = table.section(NAIVE, lambda: row(NAIVE, 1, True, "naive"))
    many = f"naive, {a.naive_rows} rows at a time, needed logits"
    table.section(many, lambda: row(many, a.naive_rows, False, "naive_logits", ref))
    return ref

def shared_rows(table, a, lvlm, work, ref, folder):
    dev = lvlm.device
    config = lvlm.model.config
    dtype = lvlm.model.dtype
    largest = a.batch_tokens[-1]
    def make(tokens=largest, **kw):
        return SharedScorer(lvlm, tokens, a.new_tokens, cache_bytes=8 << 30, prefix_bytes=4 << 30, **kw)
    known = make() # its cache of image features serves all rows that know their images
    def scorer(tokens=largest, **kw):
        s = make(tokens, **kw)
        s.vision.cache = known.vision.cache
        return s
    def counts(s): return {k: v for k, v in vars(s.stats).items() if isinstance(v, int)}
    def row(name, new, prompts=work.prompts, known_images=1.):
        "`new` gives the scorer of each repeat: always the same one, or a fresh one"
        # warm-up
        n = len(prompts)
        run = lambda s: clean(s.run(prompts, [work.answers] * n))
        run(new())
        seconds, (s, was, out), gib = timed(
            lambda s: (s, counts(s), run(s)), dev, a.repeats, lambda: (new(),)
        )
        d = {k: v - was[k] for k, v in counts(s).items()}
        kept = dict(known_images=known_images, known_tokens=1 - d["ran"] / d["tokens"])
        more = dict(padding=d["padded"]/d["ran"] - 1, retries=s.stats.retries, off_tree=d["off_tree"]/n,
                    n_decode=statistics.mean(o.n_decode for o in out))
        table.add(
            name, n, seconds, work.flops(config, n, "shared", a.new_tokens, **kept), gib, **more, **kept
        )
        if s.stats.retries:
            table.note(
                f"memory ran out {s.stats.retries} times: batches of {s.budget} tokens now, not of"
                f" {s.batch_tokens}"
            )
        if ref: check(table, ref, [(o.logprobs, o.text) for o in out], dtype, name.strip())
        return s, more

    def phases(s, more):
        spent = {k: v / sum(s.stats.seconds.values()) for k, v in s.stats.seconds.items()}
        table.data["rows"][-1]["phases"] = spent
        table.note(
            "where the time goes: "
            + ", ".join(f"{k} {v:.0%}" for k, v in spent.items())
            + f"; padding {more['padding']:.1%}; {more['off_tree']:.0%} of greedy texts leave the tree,"
            f" {more['n_decode']:.1f} decoding steps per prompt"
        )
    def cold(): phases(*row("shared, images once per prompt", make, work.copies(a.cold, folder), 0.))
    def warm(tokens):
        s = scorer(tokens)
        clean(s.run(work.prompts, [work.answers] * len(work.prompts)))
        s.stats.seconds.clear()
        phases(*row(f"+ images known, batches of {tokens} tokens", lambda: s))
    def kept(name, **kw):
        s = scorer(prefix_cache="global", **kw)
        row(name, lambda: s)
    parts = [
        ("shared, images once per prompt", cold),
        *((f"images known, {t}", lambda t=t: warm(t)) for t in a.batch_tokens),
    ]
    parts += [
        (
            "lengths mixed",
            lambda: row("  the same, lengths mixed: padding and mask", lambda: scorer(equal_lengths=False)),
        ),
        (
            "prefix store, cold",
            lambda: row("+ prefix store (global), cold", lambda: scorer(prefix_cache="global")),
        ),
        ("prefix store, warm", lambda: kept("+ prefix store (global), warm")),
        ("two demonstrations", lambda: kept("+ two demonstrations kept, warm", prefix_depth=2)),
    ]
    for name, part in parts: table.section(name, part)

@torch.no_grad()
def prefill_rows(table, a, lvlm, work):
    """The language model alone: a batch without padding needs no mask and gets the causal kernel; one padded
    row forces a mask on all
    """
    from transformers import DynamicCache
    lm = lvlm.model.model.language_model
    dev = lvlm.device
    L = sum(work.sizes[0][0]) + work.sizes[0][1]
    def row(tokens, masked):
        B = max(2, tokens // L)
        emb = torch.randn(B, L, lm.config.hidden_size, device=dev, dtype=lvlm.model.dtype)
        pos, mask = torch.arange(L, device=dev).expand(3, B, L), torch.ones(
            B, L, dtype=torch.bool, device=dev
        )
        mask[0, 0] = False
        run = lambda: run_text(lm, emb, DynamicCache(config=lm.config), mask if masked else None, pos)[:, -1]
        run()
        seconds, _, gib = timed(run, dev, 2 * a.repeats + 1)
        flops = B * text_flops(lvlm.model.config, L, logits=0)
        table.add(
            f"prefill alone, {B*L} tokens, {'mask' if masked else 'no mask'}",
            B,
            seconds,
            flops,
            gib,
            whole=False,
        )
    for tokens in a.batch_tokens:
        for masked in (True, False):
            table.section(f"prefill alone, {tokens}, masked={masked}", lambda: row(tokens, masked))

@torch.no_grad()
def vision_rows(table, a, lvlm, work):
    "The vision tower alone: one attention call per window, or one per distinct length of window"
    paths = list(work.tokens)[:a.images]
    t = time.perf_counter()
    x = lvlm.image_processor(images=[vision.open_resized(p) for p in paths], return_tensors="pt")
    table.note(
        f"opening and preparing an image takes {(time.perf_counter() - t)/len(paths)*1e3:.1f} ms of one"
        " thread"
    )
    px = x["pixel_values"].to(lvlm.device, lvlm.model.dtype)
    grids = x["image_grid_thw"]
    tower = lvlm.model.model.visual
    flops = sum(vision_flops(lvlm.model.config, g) for g in grids.tolist())
    per = len(work.prompts[0].images)
    loop = lambda: vision.image_features(lvlm.model, px, grids)
    def grouped():
        with vision.grouped_windows(tower): return vision.image_features(lvlm.model, px, grids)
    def row(name, run):
        run()
        seconds, out, gib = timed(run, lvlm.device, a.repeats)
        table.add(name, len(paths) / per, seconds, flops, gib, whole=False)
        return torch.cat(out).float()
    one = table.section(
        "vision alone, loop", lambda: row(f"vision alone, {len(paths)} images, loop over windows", loop)
    )
    many = table.section(
        "vision alone, grouped", lambda: row(f"vision alone, {len(paths)} images, grouped windows", grouped)
    )
    if one is not None and many is not None:
        table.note(
            "features, loop against grouped: largest difference"
            f" {(one - many).abs().max()/one.abs().max():.1e} of the largest"
        )

def options(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument(
        "--size", choices=[*QWEN_SIZES, "tiny"], help="model; default 3b on a GPU and tiny without one"
    )
    p.add_argument(
        "--tiny", action="store_const", const="tiny", dest="size", help="the embedded model, few prompts"
    )
    p.add_argument("--layers", type=int, help="fewer layers of the language model, for a quick look")
    p.add_argument("--device", help="default cuda if there is one")
    p.add_argument("--peak", type=float, help="TFLOP/s of the GPU in bfloat16, if its name is not known")
    p.add_argument("--prompts", type=int, help="of the shared rows")
    p.add_argument("--naive", type=int, help="of these, how many are also asked naively")
    p.add_argument("--cold", type=int, help="how many with unknown images")
    p.add_argument("--images", type=int, help="for the vision tower alone")
    p.add_argument("--naive-rows", type=int, help="rows of a naive batch")
    p.add_argument("--batch-tokens", type=int, nargs="+", help="budgets of the shared scorer, ascending")
    p.add_argument("--new-tokens", type=int, default=3, help="longest greedy text")
    p.add_argument("--repeats", type=int)
    p.add_argument("--minutes", type=float, default=7.5, help="parts that would start later are left out")
    p.add_argument("--out", help="JSON file")
    a = p.parse_args(argv)
    a.device = torch.device(a.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    a.size = a.size or ("3b" if a.device.type == "cuda" else "tiny")
    tiny = a.size == "tiny"
    for k, big, small in (
        ("prompts", 192, 6),
        ("naive", 8, 3),
        ("cold", 48, 3),
        ("images", 48, 4),
        ("naive_rows", 32, 8),
        ("repeats", 3, 1),
        ("batch_tokens", [8192, 32768, 65536], [256, 1024]),
    ):
        if getattr(a, k) is None: setattr(a, k, small if tiny else big)
    a.naive, a.cold = min(a.naive, a.prompts), min(a.cold, a.prompts)
    return a

def about(a, lvlm):
    "What the numbers were measured on, and with"
    import transformers
    name = torch.cuda.get_device_name(a.device) if a.device.type == "cuda" else platform.machine()
    m = lvlm.model
    return dict(
        gpu=name,
        date=time.strftime("%Y-%m-%d"),
        size=a.size,
        layers=m.config.text_config.num_hidden_layers,
        dtype=str(m.dtype),
        parameters=sum(p.numel() for p in m.parameters()),
        torch=torch.__version__,
        transformers=transformers.__version__,
        options={k: str(v) for k, v in vars(a).items()},
    )

def main(argv=None):
    "Run the bench; 0 if every part ran and every check held"
    a = options(argv)
    tiny = a.size == "tiny"
    lvlm = (
        load_lvlm(FOLDER, dtype=torch.float32, device=str(a.device))
        if tiny
        else build(a.size, a.device, a.layers)
    )
    i = about(a, lvlm)
    config = lvlm.model.config
    dtype = lvlm.model.dtype
    peak = a.peak*1e12 if a.peak else peak_flops(i["gpu"]) if a.device.type == "cuda" else None
    table = Table(a.out, a.minutes, peak, matmul_peak(a.device, dtype), **i)
    print(
        f"{i['gpu']}, {i['date']}; Qwen2.5-VL {a.size}, {i['layers']} layers, {i['parameters']/1e9:.3g}B"
        f" parameters, {i['dtype']}; torch {i['torch']}, transformers {i['transformers']}\npeak"
        f" {'unknown' if peak is None else f'{peak/1e12:.0f} TFLOP/s'}, measured matrix product"
        f" {table.measured/1e12:.3g} TFLOP/s; {a.new_tokens} new tokens at most, median of {a.repeats}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        try: import qwen_vl_utils
        except ImportError:
            vision.open_resized = open_plain
            # its limits are part of a model's fingerprint; where it is absent, there are none
            sys.modules["qwen_vl_utils"] = SimpleNamespace(vision_process=None)
            table.note(
                "qwen_vl_utils is absent: images are opened and not resized; their sides are such that it"
                " would not resize them"
            )
        work = Work(lvlm, a.prompts, folder, SHAPES["tiny" if tiny else "full"])
        images, text = work.sizes[0]
        table.note(
            f"{a.prompts} prompts like {len(images)} images of {'/'.join(map(str, images))} visual tokens and"
            f" {text} of text, {len(work.answers.texts)} answers of {work.answer_tokens:.1f} tokens;"
            f" {kv_bytes(config, dtype)*(sum(images) + text)/1e6:.1f} MB of keys and values and"
            f" {feature_bytes(config, sum(images), dtype)/1e6:.2f} MB of features each"
        )
        print(f"\n{Table.HEAD}", flush=True)
        ref = naive_rows(table, a, lvlm, work)
        table.section("shared", lambda: shared_rows(table, a, lvlm, work, ref, folder))
        for name, part in (("prefill alone", prefill_rows), ("vision alone", vision_rows)):
            table.section(name, lambda: part(table, a, lvlm, work))
    print(
        "\nGFLOP: what must be computed per prompt (half the square of attention, no padding). MFU: of the"
        " maker's peak; 'of matmul': of the\nproduct measured above. GiB: peak memory allocated, weights"
        " included. Spread: slowest repeat over fastest."
    )
    failed = [f["way"] for f in table.data["failed"]]
    if failed: print(f"{len(failed)} parts FAILED: " + "; ".join(failed))
    return int(bool(failed))

if __name__ == "__main__": sys.exit(main())
