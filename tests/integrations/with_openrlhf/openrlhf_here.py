"""OpenRLHF without what needs a GPU or Ray, which the tests have no use for."""

import sys

from stubs import stub

stub("aiohttp", "deepspeed", "flash_attn", "pylatexenc", "ray", "torchdata", "vllm")
sys.modules["flash_attn.ops"] = None  # It is asked for, and can be done without.

import ray  # noqa: E402

# A class is then what `ray.remote` has decorated, not what would run it elsewhere.
ray.remote = lambda *args, **_: args[0] if args else lambda decorated: decorated

import openrlhf.models.actor as actors  # noqa: E402, F401
import openrlhf.models.ring_attn_utils as ring_attn_utils  # noqa: E402, F401
import openrlhf.models.utils as utils  # noqa: E402, F401
import openrlhf.trainer.ppo_utils.experience_maker as experience  # noqa: E402, F401
