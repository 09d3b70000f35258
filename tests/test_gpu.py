"""What a GPU changes, and what it does not: `make gpu`. Skipped without one; needs no network and no nbdev.

Exactness in three number formats, the facts and vectors of the CPU, training twice with one seed, resuming,
mixed precision, rounds on-policy, a real out-of-memory, the doors, the demo, README's code, and every page
of the book.
"""
import gc, json, os, subprocess, sys, warnings
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from test_exactness import goals, images, louder, prompt, world as prompts_and_goals
from own_warnings import SPOKEN
from test_readme import run_blocks
from leverplus.lvlm import NaiveScorer, compare, load_lvlm
from leverplus.scorer import SharedScorer
from leverplus.tiny import save_lvlm, tiny_qwen

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/".ci"))
from directives import is_skipped

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(scope="module", autouse=True)
def on_the_gpu():
    "These tests prove nothing on a CPU"
    assert torch.cuda.is_available(), "LEVERPLUS_GPU=1, but torch sees no GPU"
    yield
    gc.collect()
    torch.cuda.empty_cache()


# ---- the scorer --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_lvlm(louder(tiny_qwen(seed=1)), tmp_path_factory.mktemp("lvlm"))

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (300, 1001)], ids=str)
def test_content_hashes_the_same_on_both(dtype, shape):
    from leverplus.core import tensor_hash
    x = (10*torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    there = x.to(CUDA)
    assert tensor_hash(x).item() == tensor_hash(there).item()
    if x.ndim == 2: assert tensor_hash(there.T).item() == tensor_hash(x.T).item()

def test_a_model_is_the_same_on_both_and_may_move(folder, images):
    lv = load_lvlm(folder, device="cpu")
    there = load_lvlm(folder, device="cuda")
    assert (lv.fingerprint, lv.vision_fingerprint) == (there.fingerprint, there.vision_fingerprint)
    prompts = [prompt(images, 20 + k, (1, 2)) for k in range(4)]
    targets = [goals("dax", "yes")]*4
    scorer = SharedScorer(lv, prefix_cache="global", prefix_depth=2)
    before = scorer.run(prompts, targets)
    lv.model.to(CUDA)
    assert compare(before, scorer.run(prompts, targets))["logprob"] < lv.tolerance

STORES = dict(
    off={}, query=dict(prefix_cache="query"), everything=dict(prefix_cache="global", prefix_depth=2)
)

@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("store", STORES)
def test_exact_in_float32(folder, prompts_and_goals, store, attn):
    lvlm = load_lvlm(folder, device="cuda", attn=attn)
    scorer = SharedScorer(lvlm, **STORES[store])
    want = NaiveScorer(lvlm).run(*prompts_and_goals)
    for _ in range(2):
        c = compare(scorer.run(*prompts_and_goals), want)
        assert not c["failed"] and c["text"] == 0 and c["logprob"] < 1e-4, c

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("store", STORES)
def test_half_precision_stays_within_its_rounding(tmp_path, images, store, dtype):
    lvlm = load_lvlm(save_lvlm(tiny_qwen(seed=1), tmp_path), dtype=dtype, device="cuda")
    prompts = [prompt(images, 20 + k, tuple(range(k % 4))) for k in range(8)]
    targets = [goals("dax", "yes", "yes it is")]*8
    c = compare(
        SharedScorer(lvlm, **STORES[store]).run(prompts, targets), NaiveScorer(lvlm).run(prompts, targets)
    )
    assert not c["failed"]
    assert c["logprob"] < lvlm.tolerance

def test_cpu_and_gpu_say_the_same(folder, prompts_and_goals):
    here, there = (SharedScorer(load_lvlm(folder, device=d)).run(*prompts_and_goals) for d in ("cpu", "cuda"))
    c = compare(there, here)
    assert not c["failed"] and c["text"] == 0 and c["logprob"] < 1e-3, c

def test_running_out_of_memory_is_survived(folder, images):
    "A real one: the process may have 48 MiB more than it holds, and the batch wants far more"
    lvlm = load_lvlm(folder, device="cuda")
    prompts = [prompt(images, 20 + k, tuple((k + i) % 6 for i in range(4))) for k in range(512)]
    targets = [goals("dax", "yes", "red circle")]*len(prompts)
    want = SharedScorer(lvlm).run(prompts, targets)
    torch.cuda.empty_cache()
    room = torch.cuda.memory_allocated() + (48 << 20)
    torch.cuda.set_per_process_memory_fraction(room/torch.cuda.get_device_properties(CUDA).total_memory)
    try:
        tight = SharedScorer(lvlm, batch_tokens=1 << 20)
        got = tight.run(prompts, targets)
    finally: torch.cuda.set_per_process_memory_fraction(1.)
    c = compare(got, want)
    assert tight.stats.retries > 0 and not c["failed"] and c["logprob"] < 1e-3, (tight.stats, c)


# ---- the embedded world ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def islands():
    from leverplus.world import world
    return world("islands")

def test_stored_facts_hold(islands):
    "Facts that a CPU stored are this model's, and it says the same again"
    from leverplus.rldata_ask import FactCache, ask
    facts = islands.facts()
    assert islands.scorer.lvlm.device.type == "cuda"
    assert islands.scorer.lvlm.model.dtype == torch.float32
    sample = facts.sample(256, random_state=0)
    again = ask(sample[["question_id", "pointer"]], islands.scorer, islands.items, FactCache())
    assert again.vqa_pred_answer.tolist() == sample.vqa_pred_answer.tolist()
    assert np.abs(again.vqa_gt_prob.to_numpy() - sample.vqa_gt_prob.to_numpy()).max() < 1e-4

def test_vectors_and_pools_are_those_of_a_cpu(islands):
    from leverplus.core import world_path
    from leverplus.embed import embed_items
    from leverplus.pools import make_pool
    some = islands.items.groupby("split").head(100)
    here, there = (
        embed_items(some, world_path("models", "tiny-clip"), device=d, progress=False)
        for d in ("cpu", "cuda")
    )
    ids = some.question_id.tolist()
    for kind in ("image", "text", "mixed"):
        assert (here.get(ids, kind) - there.get(ids, kind)).abs().max() < 1e-5, kind
    assert here.fingerprint == there.fingerprint
    test, train = some[some.split == "test"], some[some.split == "train"]
    near, same_there = (make_pool(test, train, 8, "mixed", store, 0) for store in (here, there))
    # neighbours that are equally near may change places
    assert np.mean([list(near[q]) == list(same_there[q]) for q in near]) >= 0.99

def test_half_precision_is_asked_for_and_then_said(islands):
    from leverplus.world import world
    half = world("islands", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"bfloat16.*world\('islands'\)"): half.facts()


# ---- training ----------------------------------------------------------------------------------------------

def learner(**kw):
    from leverplus.learner import selector_learner
    from leverplus.synth import synth_dls
    return selector_learner(
        synth_dls(96, 32, 16, K=(5, 64), N=(2, 6), shots=(1, 2), device=CUDA),
        **dict(d_hidden=16, n_heads=2, dropout=0.3) | kw
    )

def weights(learn): return {k: v.detach().clone() for k, v in learn.model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def fit(learn, method, **kw):
    "Fit, with an error for every kernel that does not add in a fixed order"
    from leverplus.synth import quiet
    with quiet(learn), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*deterministic")
        getattr(learn, method)(**kw)
    return learn

def small_groups(islands):
    "Groups of 24 training and 16 development questions"
    import tempfile
    from leverplus.rldata_generate import generate
    from leverplus.settings import Guarding, Proposing
    def some(split, n):
        ids = islands.ids(split)[:n]
        return generate(
            Path(tempfile.mkdtemp()) / split,
            ids,
            islands.items,
            islands.pools[split],
            islands.scorer,
            islands.store,
            proposing=Proposing(counts=dict(random=4)),
            guarding=Guarding(test=0),
            progress=False,
        )
    return some("train", 24), some("dev", 16)

def island_learner(islands, groups):
    from leverplus.dls import group_dls
    from leverplus.learner import selector_learner
    return selector_learner(
        group_dls(*groups, islands.store, "soft_only", device=CUDA), match="net", n_layers=0, state="none"
    )

STAGES = dict(
    rce=("fit_rce", {}), listwise=("fit_listwise", {}), sft=("fit_sft", {}), grpo=("fit_grpo", dict(lr=5e-3))
)
MODELS = {
    "gate": {},
    "gru": dict(state="gru"),
    "net": dict(match="net", n_layers=0, state="none"),
    "heads": dict(match="heads", prior="match"),
    "no prior": dict(prior=False),
    "self-attention": dict(cand_layers=1),
    "bilinear": dict(scorer="bilinear"),
    "additive": dict(scorer="additive"),
    "mmr": dict(diversity="mmr"),
    "coverage": dict(diversity="coverage"),
    "dpp": dict(diversity="dpp"),
    "stop": dict(stop=True),
}

@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", MODELS)
def test_same_seed_same_weights(stage, model):
    name, kw = STAGES[stage]
    def train():
        return fit(learner(**MODELS[model]), name, n_epoch=3, watch=None, best=False, **dict(lr=1e-2) | kw)
    start = learner(**MODELS[model])
    first = train()
    second = train()
    assert next(first.model.parameters()).is_cuda
    assert same(weights(first), weights(second))
    # they did train
    assert not same(
        {k: v.cpu() for k, v in weights(first).items()}, {k: v.cpu() for k, v in weights(start).items()}
    )
    assert not torch.are_deterministic_algorithms_enabled() # the switches are back

def test_training_goes_on_bit_for_bit(tmp_path):
    "Broken off in the backward pass of the sixth batch, with dropout, a reference and an adaptive penalty to remember"
    from test_learner import Die
    from leverplus.callback_kl import AdaptiveKL, KLToRef
    def train(folder=None, at=None):
        Die.at = at
        cbs = [KLToRef(beta=.05), AdaptiveKL(.001, .01), Die()]
        return fit(learner(), "fit_rce", n_epoch=4, lr=1e-2, watch=None, cbs=cbs, resume=folder)
    whole = train()
    assert next(whole.model.parameters()).is_cuda
    with pytest.raises(SystemExit): train(tmp_path/"run", at=8)
    again = train(tmp_path/"run")
    assert same(weights(whole), weights(again))
    assert not any(loss.is_cuda for loss in again.recorder.losses)

@pytest.mark.parametrize("precision", ["to_fp16", "to_bf16"])
def test_mixed_precision_trains(precision):
    from leverplus.callback_track import valid_loss
    learn = learner(dropout=0.)
    if not hasattr(learn, precision): pytest.skip(f"this fastai has no {precision}")
    before = valid_loss(learn)
    getattr(learn, precision)()
    fit(learn, "fit_rce", n_epoch=6, lr=2e-2, watch=None)
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert valid_loss(learn) < before

@pytest.mark.parametrize("objective", ["rloo", "grpo", "distinct"])
def test_rounds_on_policy(islands, objective):
    "The scorer answers on the same card, within the fit; twice the same"
    from leverplus.callback_onpolicy import Drawing, Feedback
    from leverplus.rldata_ask import FactCache
    groups = small_groups(islands)
    def train():
        learn = island_learner(islands, groups)
        fit(
            learn,
            "fit_onpolicy",
            feedback=Feedback(islands.scorer, islands.items, FactCache()),
            store=islands.store,
            rounds=2,
            lr=1e-3,
            objective=objective,
            drawing=Drawing(G=4, queries_per_round=12, patience=None),
            watch=None,
        )
        return weights(learn)
    assert same(train(), train())

def test_warmup(islands):
    groups = small_groups(islands)
    train_items = islands.items[islands.items.split == "train"]
    def train():
        return weights(
            fit(
                island_learner(islands, groups),
                "fit_warmup",
                items=train_items,
                store=islands.store,
                n_epoch=1,
                steps=20,
                watch=None,
            )
        )
    assert same(train(), train())

def test_one_set_of_weights_picks_the_same_on_both(islands):
    from leverplus.infer import pick_model
    from leverplus.selector import PointerSelector
    torch.manual_seed(0)
    model = PointerSelector(islands.store.dim("mixed"), d_hidden=32).eval()
    picks = [
        pick_model(model.to(d), islands.pools["dev"], islands.store, 2).pointer.tolist()
        for d in ("cpu", "cuda")
    ]
    agree = np.mean([tuple(a) == tuple(b) for a, b in zip(*picks)])
    assert agree >= .99, agree


# ---- doors, demo, README, book -----------------------------------------------------------------------------

def shell(*words, cwd):
    env = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"} | dict(
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        HF_HUB_OFFLINE="1",
        MPLBACKEND="Agg",
    )
    r = subprocess.run(
        [sys.executable, "-m", "leverplus", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
    )
    assert r.returncode == 0, r.stdout + r.stderr
    return r.stdout + r.stderr

def test_the_doors(tmp_path):
    for split in ("train", "dev"):
        shell(
            "generate",
            "--n",
            "8",
            "--split",
            split,
            "--test",
            "2",
            "--quiet",
            "--out",
            f"runs/{split}",
            cwd=tmp_path,
        )
    said = shell(
        "train",
        "runs/train",
        "--dev",
        "runs/dev",
        "--out",
        "runs/rce",
        "--epochs",
        "2",
        "--bs",
        "4",
        cwd=tmp_path,
    )
    assert "checkpoint" in said
    assert not [
        line for line in said.splitlines() if "warning" in line and not any(w in line for w in SPOKEN)
    ], said

def test_the_demo(tmp_path, islands):
    from leverplus.demo import run_demo
    from test_demo import SMALL
    table = run_demo(tmp_path/"demo", progress=False, **SMALL).set_index(["selector", "shots"]).acc
    facts = islands.facts()
    zero = facts[facts.pointer.map(len) == 0]
    assert table["zero_shot", 0] == pytest.approx(zero.vqa_acc_score.mean())
    assert table["oracle_free", 2] == table.max()
    assert (tmp_path/"demo"/"report.html").exists()

def test_readme_code(tmp_path): run_blocks(tmp_path)

NOTEBOOKS = [
    p
    for d in (ROOT / "nbs", ROOT / "nbs" / "tutorials")
    for p in sorted(d.glob("*.ipynb"))
    if p.name[0] not in "_." and p.stem != "index"
]

def code_cells(path):
    "Sources of the cells that a test runs"
    cells = json.loads(path.read_text(encoding="utf8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    return [s for s in sources if not is_skipped(s, ("slow", "gpu", "net"))]

@pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").with_suffix("").as_posix()
)
def test_the_book(path):
    "Every page, top to bottom, with a GPU in the machine; a plain runner, since a GPU machine may lack nbdev"
    if any("IPython" in s for s in code_cells(path)): pytest.importorskip("IPython")
    lines = [f"import os, sys; os.chdir({str(path.parent)!r}); sys.path.insert(0, {str(ROOT)!r})"]
    for n, source in enumerate(code_cells(path)):
        lines.append(f"exec(compile({source!r}, {f'{path.stem}, code cell {n}'!r}, 'exec'), globals())")
    r = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
        env=dict(os.environ, HF_HUB_OFFLINE="1", MPLBACKEND="Agg", TQDM_DISABLE="1"),
    )
    assert r.returncode == 0, r.stderr[-4000:]
