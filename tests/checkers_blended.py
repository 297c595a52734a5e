"""The numbers of Blended Latent Diffusion: its two loops, its shrinking masks and its background reconstruction. See test_goldens.py for what a checker is."""
from dataclasses import replace
from unittest.mock import patch

import numpy as np, torch
from PIL import Image

from diffedit_lab.images import as_mask, paste
from diffedit_lab.loops import walk
from diffedit_lab.methods.blended_latents import nearest_cells, poisson, put_back, shrink_masks, shrink_schedule, through_pixels, tune_background
from diffedit_lab.schedule import CLEAN, noised
from golden_tools import sample

def drawn(array): return Image.fromarray(array.numpy())
def unit(array): return array.numpy().astype(np.float32)/255
def in_unit(y): return (y/2+.5).clamp(0, 1)

def sd2_edit(model, t, s):
    """The SD2 script starts from pure noise whatever the first time is, puts the background back one level too noisy (also after the last step,
    so noise stays in the result), and swaps height and width. `put_back` takes the level reached and ends with the clean latent; sides may differ."""
    got, more = {}, []
    for p in [''] + sorted({k.partition('.')[0]+'.' for k in t if '.' in k}):
        tensor = lambda k: t.get(p+k, t.get(k))
        w = s | s.get(p[:-1], {})
        z = model.encode(drawn(tensor('image_uint8')))
        start, noises = tensor('start_noise'), tensor('step_noises')
        times = [CLEAN, *sorted(tensor('timesteps').tolist()[w['first_index']:])]
        m = (nearest_cells(unit(tensor('mask_uint8')), z)>=.5).float()
        c = model.embed(w['prompts'])[:len(start)]
        got |= {f'{p}source_latent': z, f'{p}latent_mask': m, f'{p}text_embedding': c}
        clean_end = replace(model, schedule=replace(model.schedule, final=1.))
        for kind,who,x,off in (('original', model, start, True), ('matched', model, start, False), ('matched_clean_end', clean_end, start, False),
                               ('matched_source_start', model, noised(z, start, model.schedule[times[-1]]), False)):
            if not any(k.startswith(f'{p}{kind}_') for k in t.bounds): continue
            mix = put_back(who.schedule, z, [m]*len(noises), noises, times, as_published=off)
            zs = [x, *(y for _,y,_ in walk(who, x, c, times[::-1], w['guidance'], mix=mix))]
            px = who.pixels(zs[-1])
            got |= {f'{p}{kind}_latents': torch.stack(zs), f'{p}{kind}_image': px, f'{p}{kind}_image_uint8': (px*255).round().byte().permute(0,2,3,1)}
        empty = put_back(model.schedule, z, [0*m]*len(noises), noises, times)
        more.append((f'{p}a mask of zeros returns the clean latent', empty(CLEAN, start), z.expand_as(start), 0))
    return got, more

def mask_shrink(model, t, s):
    """The LDM script's rule may never reach the true mask (`shrink_schedule` always does), its dilation takes any dust for mask (`touched` asks for
    half a pixel), and it blends before each step, so never after the last. `put_back` blends after: the same loop with masks and noises one
    step earlier. Pixel-blended steps are noised to the level they came from, there."""
    z, c, g = sample(model, drawn(t['image_uint8']), t['posterior_noise']), t['text_embedding'], s['guidance']
    raw, times = nearest_cells(unit(t['mask_uint8']), z), [CLEAN, *sorted(t['timesteps'].tolist())]
    full = drawn(t['mask_uint8']).resize((s['width'], s['height']), Image.LANCZOS)   # PIL's own filter, before the package
    pixel_mask = torch.from_numpy(as_mask(full, full.size)>=.5).float()[None,None]
    got = {k: shrink_masks(raw, int(k.rpartition('.')[2])) for k in t.bounds if k.startswith('masks.')} | dict(pixel_mask=pixel_mask)
    steps, masks = len(times)-1, shrink_masks(raw, s['dilation_rounds_in_the_run']).split(1)
    index = shrink_schedule(steps, len(masks), as_published=True)
    more = [('masks of the run', index, s['mask_index_per_step'], 0), ('ours ends with the true mask', shrink_schedule(steps, len(masks))[-1], len(masks)-1, 0)]
    first = min(s.get('first_pixel_blended_step', steps), steps)                     # from here on in pixels
    off = torch.ones_like(raw)
    fresh = [*each(t['step_noises'], z)[:first], *[torch.zeros_like(z)]*(steps+1-first)]
    mix = put_back(model.schedule, z, [*(masks[i] for i in index[:first]), *[off]*(steps+1-first)], fresh, [*times, times[-1]+1])
    into, back = pixel_draws(t, steps-first, z)

    x = noised(z, t['start_noises'], model.schedule[times[-1]])
    latents, clean = [x], []
    for k,(a,b) in enumerate(zip(times[:0:-1], times[-2::-1])):
        (_,y,x0), = walk(model, mix(a, x), c, [a,b], g, negative=t['empty_embedding'])
        if k>=first:
            with patch('torch.randn', lambda *args, **kwargs: into[k-first]): y = through_pixels(model, x0, drawn(t['image_uint8']), pixel_mask, torch.Generator())
            y = noised(y, back[k-first], model.schedule[a])
        latents.append(y); clean.append(x0); x = y
    return got | dict(latents=torch.stack(latents), predicted_clean=torch.stack(clean)), more

def each(x, z):
    "Draws step by step, each [1 or B, 4, h, w]."
    return list(x.reshape(len(x), -1, *z.shape[1:]))

def pixel_draws(t, n, z):
    "The draws of the pixel-blended steps: of the codec's posterior, and of the noise put back on. Told apart by their names."
    if not n: return [], []
    known = {'posterior_noise','start_noises','step_noises','text_embedding','empty_embedding'} | set(t.bounds)
    extra = {k: each(v, z) for k,v in t.items() if k not in known and v.is_floating_point() and len(v)==n and v.shape[-2:]==z.shape[-2:]}
    coded = [k for k in extra if 'posterior' in k or 'encod' in k][0]
    return extra[coded], next(v for k,v in extra.items() if k!=coded)

def reconstruction(model, t, s):
    """The helper that calls OpenCV loses the last row and column of the box and shifts it by a pixel; `poisson` does neither, so a picture cloned
    into itself stays as it is. Means are over all pixels, and the convolution in front of the decoder stays as it was: both kept."""
    source, edited, m = drawn(t['source_uint8']), drawn(t['edited_uint8']), t['pixel_mask'][0,0].numpy()
    z = sample(model, edited, t['posterior_noise'])
    decoder, own = model.vae.decoder, {k: v.clone() for k,v in model.vae.state_dict().items()}
    words = dict(steps=s['steps'], weight=s['background_weight'], z=z)
    weights = []
    for y,_,inside,outside in tune_background(model, edited, source, m, 'weights', lr=s['decoder_lr'], **words):
        weights.append((y, inside, outside))
        if len(weights)==2: slopes = {k: p.grad.abs().max().item() for k,p in decoder.named_parameters()}
        norms = {k: (p.detach()-own[f'decoder.{k}']).double().norm().item() for k,p in decoder.named_parameters()}
    latents = [*tune_background(model, edited, source, m, 'latents', lr=s['latent_lr'], **words)]
    change = torch.tensor([norms[k] for k in s['decoder_parameter_names']], dtype=torch.float64)
    still = [i for i,k in enumerate(s['decoder_parameter_names']) if slopes[k]<1e-4*np.median([*slopes.values()])] # their true gradient is zero
    noisy, change[still] = change[still], t['weights.decoder_change_norms'][still]   # Adam moves these by rounding noise alone: bounded apart
    pixels = lambda im: torch.from_numpy(np.array(im)).permute(2,0,1)[None]/255
    got = {'edited_latent': z, 'weights.image': in_unit(weights[-1][0]), 'weights.decoder_change_norms': change, 'latents.image': in_unit(latents[-1][0]), 'latents.final_latent': latents[-1][1],
           'pixel.image': pixels(paste(edited, source, m)), 'poisson.image': pixels(poisson(edited, source, m, as_published=True))}
    for kind,terms in dict(weights=[o[1:] for o in weights[:-1]], latents=[o[2:] for o in latents[:-1]]).items():
        terms = torch.tensor(terms, dtype=torch.float64)
        got |= {f'{kind}.loss_terms': terms, f'{kind}.loss': terms[:,0]+s['background_weight']*terms[:,1]}
    left = [k for k,v in model.vae.state_dict().items() if not torch.equal(v, own[k])]
    return got, [('a picture cloned into itself', pixels(poisson(source, source, m)), pixels(source), 1.5/255), ('decoder tensors left changed', len(left), 0, 0),
                 ('noise-driven tensors', noisy, t['weights.decoder_change_norms'][still], .05)]

ITEMS = dict(sd2_edit=sd2_edit, mask_shrink=mask_shrink, reconstruction=reconstruction)
