"""Numbers recorded from the original programs, reached through the package's public functions.

Every folder with a `case.json` below $DIFFEDIT_LAB_GOLDENS (default ../shared/goldens) is one case: `<item>_<case>`. `ITEMS` says how an
item is reached; a checker computes tensors by name, and the test compares every tensor that the case expects within the case's own bound.
All settings come from the case, so a further case of a known item needs no new code."""
import inspect, json, math, os
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import load_file

from diffedit_lab import load
from diffedit_lab.loops import denoise, invert, walk
from diffedit_lab.masks import as_heat, cut, noise_contrast
from diffedit_lab.methods.diffedit import decode_masked, slow_mask, three_rows
from diffedit_lab.methods.fast_diffedit import blur_and_cut, inpaint
from diffedit_lab.schedule import CLEAN, clean_of, noised, path

GOLDENS = Path(os.environ.get('DIFFEDIT_LAB_GOLDENS') or Path(__file__).resolve().parents[1]/'../shared/goldens').resolve()
if not GOLDENS.is_dir(): pytest.skip(f'no golden vectors at {GOLDENS}: set DIFFEDIT_LAB_GOLDENS to their folder', allow_module_level=True)
CASES = sorted(p.parent for p in GOLDENS.rglob('case.json'))

# -- tools of the checkers

@cache
def _load(folder): return load(folder, device='cpu', dtype=torch.float32)

def model_of(folder, case):
    "The case's model, its path starting and ending where the case's does."
    m, s = _load((folder/case.get('model', '../model')).resolve()), case['settings'].get('scheduler', {})
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

# -- one function an item: (model, tensors, settings) -> what was reached by name, and further claims (what, got, wanted, bound)

def mask(model, t, s):
    """diffusers' `generate_mask` takes the prompt for the negative prompt and vice versa, so its guidance points away from the texts (factor
    guidance-1; right masks by luck, and only while the negatives are equal). `noise_contrast` has no guidance at all: it would cancel.
    Equal prompts give 0/0 and a full mask there; `as_heat` gives zeros."""
    R,Q,N = (model.embed(s[k]) for k in ('source_prompt', 'target_prompt', 'negative_prompt_for_both'))
    time = way(model, s['steps'], s['noise_strength'])[-1]
    assert time==s['time'] and len(t['noises'])==s['maps']
    with listen(model.vae.encoder) as pixels: z = sample(model, picture(t), t['posterior_noise'])
    zt, maps = noised(z, t['noises'], model.schedule[time]), noise_contrast(model, z, R, Q, time, t['noises'])
    heat = maps.mean((0,1))
    same = as_heat(noise_contrast(model, z, R, R, time, t['noises']))
    return dict(pixels=pixels[0], latents=z, noised=zt, noise_source=model.eps(zt, time, R), noise_target=model.eps(zt, time, Q), noise_negative=model.eps(zt, time, N),
                plain_heat=heat, heat=abs(s['guidance']-1)*heat, mask=cut(as_heat(maps, clip=s['threshold_ratio']), .5)), [('heat of equal prompts', same, 0*same, 0)]

def inversion(model, t, s):
    """diffusers' `invert` guides by 7.5 unless told otherwise, against the paper and past the point where inversion works; `invert` here
    takes the empty prompt and guidance 1 by default. The network is asked at the destination time, as recorded."""
    times = times_of(model, t, s['steps'], s['strength'])
    c,n = model.embed(s['prompt']), model.embed(s.get('negative_prompt', ''))
    up = invert(model, sample(model, picture(t), t['posterior_noise']), times, c, s['guidance'], negative=n)
    eps = [model.eps(up[a], b, c, s['guidance'], n) for a,b in zip(times, times[1:])]
    more = [('the defaults', torch.cat([*invert(model, up[CLEAN], times).values()]), t['trajectory'], bound(t, 'trajectory'))] if s['prompt']=='' and s['guidance']==1 else []
    return dict(trajectory=torch.cat([*up.values()]), noise_predictions=torch.cat(eps)), more

def edit(model, t, s):
    """diffusers' pipeline puts the background back from the level *before* each step, one step too noisy, and so never returns to the clean
    latent (`shipped_*`, `as_published=True`). The default takes the level reached (`corrected_*`); an empty mask returns the clean latent exactly."""
    times = times_of(model, t, s['steps'], s['strength'])
    up, m = dict(zip(times, t['trajectory'].split(1))), t['mask'].reshape(1,1,*t['mask'].shape[-2:])
    c,n = model.embed(s['prompt']), model.embed(s.get('negative_prompt', ''))
    got = dict(text_embedding=c, negative_embedding=n)
    for kind,words in dict(shipped=dict(as_published=True), corrected={}).items():
        zs = [up[times[-1]], *(z for _,z,_ in decode_masked(model, up, m, c, s['guidance'], n, **words))]
        *_,(_,kept,_) = decode_masked(model, up, 0*m, c, s['guidance'], n, **words)
        got |= {f'{kind}_latents': torch.cat(zs), f'{kind}_image': model.pixels(zs[-1]), f'{kind}_all_background': kept}
    return got, [('an empty mask returns the clean latent', got['corrected_all_background'], up[CLEAN], 0)]

def tutorial_mask(model, t, s):
    """The tutorial seeds its draws with `if seed:`, so map 0 (seed 0) compares two unrelated noises and outweighs the signal; its own maps are
    reached by feeding its draws. `noise_draws` treats 0 as a seed, and `noise_contrast` and `slow_mask` show one noise to both texts: they must
    give maps 1.. . Its 3x3 blur 'improves' nothing: with the cut at 0 it grows the mask by one cell (`blur_and_cut`); the default cleans by
    opening and closing."""
    times = way(model, s['steps'], s['noise_strength'])
    time, g = times[-1], s['guidance']
    a, text = model.schedule[time], {k: model.embed(s[f'{k}_prompt']) for k in ('reference','query')}
    got, more = {}, []
    for kind in ('fast','slow'):
        first = s.get('facts', {}).get(kind, {}).get('first_time', time)
        assert first==time, f'{kind} starts at {first}, the path at {time}'
        for k,c in text.items():
            zt = noised(t[f'{kind}.latents_{k}'], t[f'{kind}.noises_{k}'], a)
            got[f'{kind}.result_{k}'] = clean_of(zt, model.eps(zt, time, c, g), a) if kind=='fast' else denoise(model, zt, c, times, g)
        d = got[f'{kind}.difference'] = (got[f'{kind}.result_reference']-got[f'{kind}.result_query']).abs()
        for tail,maps in {'': d, '_without_map_0': d[1:]}.items():
            got |= {f'{kind}.heat{tail}': maps.mean((0,1))*len(maps), f'{kind}.mask{tail}': cut(as_heat(maps, clip=2.), .5)}
        z, e = t[f'{kind}.latents_reference'][1:], t[f'{kind}.noises_reference'][1:]
        ours = g*math.sqrt((1-a)/a)*noise_contrast(model, z, *text.values(), time, e) if kind=='fast' else slow_mask(model, z, *text.values(), times, e, g)
        more.append((f'{kind} maps from 1', ours, t[f'{kind}.difference'][1:], bound(t, f'{kind}.difference')))
    for kind in ('fast','slow'): got[f'{kind}.improved_mask'] = blur_and_cut(got[f'{kind}.mask'])
    drawn = sample(model, picture(t), t['posterior_noises_from_map_1'])
    return got, more + [('latents of maps from 1', drawn, t[f'{k}.latents_{w}'][1:], 5e-5) for k in ('fast','slow') for w in text]

def tutorial_edit(model, t, s):
    """The tutorial's loop never puts the picture back outside the mask: its background is a redrawing under the source text (`three_rows`). The
    default, `decode_masked`, keeps the inverted picture there. `strength=0` starts the tutorial at the noisiest level; `path` gives an empty way."""
    times = times_of(model, t, s['steps'], s['strength'])
    z = sample(model, picture(t), t['posterior_noise'])
    texts = model.embed(['', s['reference_prompt'], s['query_prompt']])
    start, m = noised(z, t['noise'], model.schedule[times[-1]]), t['mask'].reshape(1,1,*t['mask'].shape[-2:]).float()
    zs = [start, *(x for _,x in three_rows(model, start, texts[1:2], texts[2:], m, times, s['guidance']))]
    assert path(model.schedule, s['steps'], 0)==[CLEAN]
    return dict(source_latent=z, embeddings=texts, latents=torch.cat(zs), output_uint8=np.asarray(model.decode(zs[-1]))), []

def inpainting(model, t, s):
    """The second stage of FastDiffEdit: right as it is in diffusers, and nothing is pasted back (the default pastes). The tutorial feeds a mask
    enlarged by PIL's bicubic filter, whose soft edge is then cut again, so its corners are lost on the latent grid; `inpaint` reads a mask of the
    latents' size cell by cell, and a picture-sized one as diffusers does."""
    from diffusers import PNDMScheduler
    assert s.get('strength', 1)==1, 'inpainting starts from pure noise'
    n,c = t['embeddings'].split(1)
    noise, times, g = t['start_noise'], times_of(model, t, s['steps'], 1.), s['guidance']
    small = blur_and_cut(t['mask_raw'].numpy())
    image = picture(t)
    drawn = Image.fromarray(np.uint8(255*small)).resize(image.size)   # PIL's own filter, before the package
    hole = torch.from_numpy(np.array(drawn))[None,None]/255
    with listen(model.vae.encoder) as seen, listen(model.unet) as fed: inpaint(model, image, hole, c, times[:2], noise, g, n)
    given = torch.cat([t['latent_mask'], t['masked_latent']], 1)
    zs = [noise, *(z for _,z,_ in walk(model, noise, c, times[::-1], g, negative=n, extra=given))]
    got = dict(mask_small=small, mask_image_uint8=np.asarray(drawn), pixel_mask=(hole>=.5).float(), masked_image=seen[0], latent_mask=fed[0][:1,4:5],
               masked_latent=sample(model, seen[0], t['posterior_noise']), latents=torch.cat(zs), image=model.pixels(zs[-1]).permute(0,2,3,1))
    if 'pndm.times' in t:
        k = s['scheduler']
        pndm = PNDMScheduler(k['steps_in_training'], k['beta_start'], k['beta_end'], 'scaled_linear', skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
        pndm.set_timesteps(s['steps'])
        assert pndm.timesteps.tolist()==t['pndm.times'].tolist()
        zs = [noise]
        for time in pndm.timesteps: zs.append(pndm.step(model.eps(zs[-1], int(time), c, g, n, given), time, zs[-1]).prev_sample)
        got['pndm.latents'] = torch.cat(zs)
    return got, [('inpaint is the walk', inpaint(model, image, t['latent_mask'], c, times, noise, g, n), denoise(model, noise, c, times, g, negative=n, extra=torch.cat([t['latent_mask'], hidden(model, image, t['latent_mask'])], 1)), 1e-4)]

def hidden(model, image, mask):
    "Latents of a picture with its masked cells grey."
    px = torch.from_numpy(np.array(image)).permute(2,0,1)[None].float()/127.5-1
    return model.encode(px*(1-torch.nn.functional.interpolate(mask, px.shape[-2:])))

ITEMS = dict(mask=mask, invert=inversion, edit=edit, tutorial_mask=tutorial_mask, tutorial_edit=tutorial_edit, inpaint=inpainting)

# -- the tests

def item_of(folder, case):
    "The item's name; two families call different things `edit`, and the one that takes an order says so."
    name = case.get('item') or folder.name.rpartition('_')[0]
    return f'{name} by instruction' if 'instruction' in case.get('settings', {}) else name

def bound(t, name): return t.bounds[name]

class Tensors(dict):
    "A case's tensors by name, and the bounds of the expected ones."
    def __init__(self, folder, case):
        super().__init__(load_file(folder/'tensors.safetensors'))
        self.bounds = {k: v['max_abs'] for k,v in case['tensors'].items() if v['role']=='expected'}

def error(got, want):
    "Largest absolute difference; infinite where a value is not finite."
    got, want = (torch.as_tensor(np.array(x) if isinstance(x, np.ndarray) else x).double() for x in (got, want))
    assert got.shape==want.shape, f'shape {tuple(got.shape)}, recorded {tuple(want.shape)}'
    e = (got-want).abs().max().item()
    return e if math.isfinite(e) else math.inf

@pytest.mark.parametrize('folder', CASES, ids=lambda p: str(p.relative_to(GOLDENS)))
def test_golden(folder):
    "Every tensor a case expects, within the case's bound. The item's function says which defect of which original the default avoids."
    case = json.loads((folder/'case.json').read_text())
    item = item_of(folder, case)
    if item not in ITEMS: pytest.skip(f'no checker for item {item!r} yet')
    t = Tensors(folder, case)
    got, more = ITEMS[item](model_of(folder, case), t, case['settings'])
    assert t.bounds, f'{folder} expects nothing'
    lost = [k for k in t.bounds if k not in got]
    assert not lost, f'{item}: nothing here computes {lost}'
    claims = [(k, got[k], t[k], b) for k,b in t.bounds.items()] + more
    far = {k: (e, b) for k,x,y,b in claims if not (e := error(x, y))<=b}
    assert not far, f'{item}: (error, bound) by tensor: {far}'

def test_every_checker_names_the_defect():
    for name,f in ITEMS.items(): assert inspect.getdoc(f), name
