"""What the checkers of the recorded numbers share: a case's model, path, picture and draws."""
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from unittest.mock import patch

import torch
from diffusers import DDIMScheduler
from PIL import Image

from diffedit_lab import load
from diffedit_lab.schedule import CLEAN, path

@cache
def _load(folder, dtype):
    m = load(folder, device='cpu', dtype=dtype)
    if dtype!=torch.float64: return m
    table = DDIMScheduler.from_pretrained(folder/'scheduler').alphas_cumprod.double() # recorded on the float32 table, cast
    return replace(m, schedule=replace(m.schedule, abar=table))

def model_of(folder, case, dtype=torch.float32):
    "The case's model, its path starting and ending where the case's does."
    m, s = _load((folder/case.get('model', '../model')).resolve(), dtype), case['settings'].get('scheduler', {})
    s = s if isinstance(s, dict) else {} # some families only say in words that it is the model's own
    final = None if str(s.get('last_alpha_bar', 'alpha_bar[0]')).startswith('alpha_bar[0]') else 1.
    return replace(m, schedule=replace(m.schedule, offset=s.get('steps_offset', m.schedule.offset), final=final))

def picture(t): return Image.fromarray(t['image_uint8'].numpy())

def sample(model, image, noise):
    "`model.encode` with a recorded draw in the place of the generator's."
    with patch('torch.randn', lambda *args, **kwargs: noise): return model.encode(image, generator=torch.Generator())

@contextmanager
def listen(module):
    "The first argument of every call of a network."
    heard = []
    hook = module.register_forward_pre_hook(lambda m, args: heard.append(args[0]))
    try: yield heard
    finally: hook.remove()

def way(model, steps, strength):
    "The path, as long as the originals cut it: int(50*.58) is 28 to them, because .58 is a little less than .58; `path` gives 29."
    return path(model.schedule, steps, int(steps*strength)/steps)

def times_of(model, t, steps, strength):
    "The package's path, which must be the recorded one."
    times = way(model, steps, strength)
    assert times==[CLEAN, *sorted(t['times'].tolist())]
    return times

def bound(t, name): return t.bounds[name]
