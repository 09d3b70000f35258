"""Everything at once, for people at a prompt: `from leverplus.all import *`

Written by hand, in the order of the notebooks. Library code imports from the modules by name.
"""
from leverplus.core import *
from leverplus.runs import *
from leverplus.toy import *
from leverplus.synth import *
from leverplus.data import *
from leverplus.vqa import *
from leverplus.embed import *
from leverplus.pools import *
from leverplus.vision import *
from leverplus.prefix import *
from leverplus.cost import *
from leverplus.prompt import *
from leverplus.lvlm import *
from leverplus.groups import *
from leverplus.rewards import *
from leverplus.rldata_generate import *
from leverplus.rldata_check import *
from leverplus.rldata_mine import *
from leverplus.rldata_merge import *
from leverplus.rldata_scale import *
from leverplus.rldata_infoscore import *
from leverplus.rldata_json import *
from leverplus.dls import *
from leverplus.warmup import *
from leverplus.blocks import *
from leverplus.selector import *
from leverplus.losses import *
from leverplus.callback_core import *
from leverplus.callback_rce import *
from leverplus.callback_grpo import *
from leverplus.callback_kl import *
from leverplus.callback_schedule import *
from leverplus.callback_track import *
from leverplus.callback_listwise import *
from leverplus.callback_onpolicy import *
from leverplus.diagnose import *
from leverplus.learner import *
from leverplus.recipes import *
from leverplus.infer import *
from leverplus.evaluate import *
from leverplus.world import *
from leverplus.replays import *
from leverplus.report import *
