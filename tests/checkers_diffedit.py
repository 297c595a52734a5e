"""The numbers of DiffEdit, FastDiffEdit and their well-known programs: one function an item, (model, tensors, settings) -> what was reached by
name, and further claims (what, got, wanted, bound). The docstrings say which defect of which original each default avoids."""
import math

import numpy as np, torch
from PIL import Image

from diffedit_lab.loops import denoise, invert, walk
from diffedit_lab.masks import as_heat, cut, noise_contrast
from diffedit_lab.methods.diffedit import decode_masked, slow_mask, three_rows
from diffedit_lab.methods.fast_diffedit import blur_and_cut, inpaint
from diffedit_lab.schedule import CLEAN, clean_of, noised, path
from golden_tools import bound, listen, picture, sample, times_of, way

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
