"What a person types at a prompt: `from leverplus.all import *`"
# Written by hand, in the order of the notebooks. Words that could as well be your variables (`ask`, `pick`, `split`)
# are left out; these, and all the rest, are imported from their modules by name.
from leverplus.core import seed_all
from leverplus.runs import Run, runs_frame
from leverplus.synth import quiet, synth_dls, toy_learner
from leverplus.settings import (
    Asking, Choosing, Data, Guarding, Job, Mining, Model, Picking, Pools, Proposing, Rewarding, Rows, Teaching,
    plain_settings, read_settings, settings_of,
)
from leverplus.pictures import open_image, picture_key
from leverplus.items import as_items, given_ids
from leverplus.data import check_splits, read_okvqa, read_soft_labels, read_vqav2, show_items
from leverplus.vqa import vqa_accuracies, vqa_accuracy
from leverplus.embed import EmbedStore, embed_items, load_clip, show_neighbours
from leverplus.pools import Pool, make_pool, plot_pools
from leverplus.evidence import BankStore
from leverplus.prompt import Demo, Prompt, make_prompt
from leverplus.lvlm import MockScorer, NaiveScorer, load_lvlm
from leverplus.scorer import SharedScorer
from leverplus.bank import DemoBank
from leverplus.cases import pick_cases, plot_examples
from leverplus.groups import RLData
from leverplus.rewards import REWARDS, plot_rewards
from leverplus.rldata_propose import SimilarityPrior, propose
from leverplus.rldata_ask import FactCache, self_test
from leverplus.rldata_generate import generate
from leverplus.world import World, world
from leverplus.rldata_check import Health, health
from leverplus.rldata_merge import by_gap, drop_failed
from leverplus.rldata_scale import generate_ray
from leverplus.dls import GroupDataset, group_dls
from leverplus.plan import plan_run
from leverplus.selector import PointerSelector
from leverplus.losses import kl_exact, regret
from leverplus.callback_core import Objective, SkipFlat, StageCallback, set_anchor
from leverplus.callback_rce import RCE
from leverplus.callback_grpo import GRPO, RLOO
from leverplus.callback_kl import AdaptiveKL, EntropyFloor, KLToRef
from leverplus.callback_schedule import Freeze, NoDropout, Phases, SplitShots, TempSchedule, TopKCurriculum
from leverplus.callback_track import Best, History, Resume, RLStats, plot_history
from leverplus.callback_listwise import SFT, Listwise
from leverplus.callback_onpolicy import DistinctPG, Drawing, Feedback, GreedyLoss, OnPolicy
from leverplus.diagnose import Watch, diagnose, plot_rl
from leverplus.learner import SelectorLearner, load_selector, selector_learner
from leverplus.recipes import RECIPES, load_recipe, recipe, recipe_learner, recipes_table, save_recipe
from leverplus.offpolicy import OffPolicyStats, off_policy
from leverplus.verbs import verbs
from leverplus.training import train_run, training_data
from leverplus.curves import plot_curves
from leverplus.picker import Picker
from leverplus.infer import pick_mmr, pick_model, pick_random, pick_similar, pick_zero, predict, rerank
from leverplus.statistics import Bootstrap, Interval, holm, paired_bootstrap
from leverplus.evaluate import (
    best_fixed, compare_runs, compare_seeds, gap_closed, gap_table, majority_vote, paired_table, paired_tests,
    pick_baselines, pick_oracle, plot_results, result_table, score_picks, seeds_table, shots_table, size_table,
    table_text,
)
from leverplus.table import Asked, full_table
from leverplus.loops import closed_loop, plot_rounds
from leverplus.sweep import plot_sweep, sweep_table
from leverplus.report import Cases, Findings, plot_gap, plot_shots, report, write_report
from leverplus.controls import pool_shift
