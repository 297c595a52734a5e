"""The numbers of null-text inversion, in float64 (see test_goldens.py)."""
import torch

from checkers_attention_p2p import words_of
from diffedit_lab.attention import carry
from diffedit_lab.loops import denoise, invert, walk
from diffedit_lab.methods.null_text import fit_null_text
from diffedit_lab.schedule import CLEAN, path

def pivot(model, t, c, times):
    "The inversion of z_0, or what a case gives in its place: the latents from the clean end up, or a start and the target of every step."
    given = {k: x for k,x in t.items() if k not in t.bounds}
    way = next((x for x in given.values() if x.ndim==5), None)
    if way is None: return invert(model, t['z_0'], times, c)
    start = next((x for k,x in given.items() if x.ndim==4 and k!='z_0'), None)
    if start is None and 'inversion_latents' in t.bounds: start = invert(model, t['z_0'], times, c)[times[-1]]
    zs = [*way.flip(0), start] if start is not None else [*way] if len(way)==len(times) else [t['z_0'], *way]
    return dict(zip(times, zs, strict=True))

def null_text(model, t, s):
    """The original leaves the weights learnable: 500 iterations add up gradients that nobody reads, and keep what is needed to make them (here they are frozen). It reads
    a global for the words of its blend. Its rate and tolerance are made for 50 steps: at step 100 the rate is 0 and then below. `fit_null_text` counts in shares of the path; the recorded
    numbers, which count steps, are `as_published=True`. The inversion is compared where it is the pivot."""
    e, g, times = s['edit'], s['guidance_scale'], path(model.schedule, s['steps'])
    c, texts = model.embed(s['prompt']), model.embed(['', *e['prompts']])
    up = pivot(model, t, c, times)
    top, down = up[times[-1]], times[:0:-1]
    film = list(fit_null_text(model, up, c, g, s['max_inner_iterations'], s['early_stop_epsilon'], as_published=True))
    nulls, trace = dict(zip(down, (null for _,_,null,_ in film))), torch.tensor([l for *_,losses in film for l, in losses], dtype=torch.float64)
    way = lambda nulls: torch.stack([z for _,z,_ in walk(model, top, c, times[::-1], g, negative=nulls)])
    with carry(model, e['prompts'], s['steps'], **words_of(e)) as blend: edited = denoise(model, top.expand(len(e['prompts']),-1,-1,-1), texts[1:], times, g, negative=nulls, mix=blend)
    got = dict(inversion_latents=torch.stack([*invert(model, t['z_0'], times, c).values()][1:]) if 'inversion_latents' in t.bounds else None, loss_trace=trace, inner_iterations=[len(losses) for *_,losses in film],
               uncond_embeddings=torch.cat([*nulls.values()]), reconstruction_latents=way(nulls), plain_guided_final=denoise(model, top, c, times, g), edit_latents_last=edited, text_embeddings=texts, timesteps=down)
    recorded = dict(zip(down, t['uncond_embeddings'].split(1)))
    same = len(trace)==len(t['loss_trace'])
    return got, [('losses, relative', trace/t['loss_trace'] if same else trace*float('inf'), torch.ones_like(trace), 1e-7), ('latents while learning', torch.stack([z for _,z,_,_ in film]), t['reconstruction_latents'], 1e-7),
                 ('reconstruction with the recorded null texts', way(recorded), t['reconstruction_latents'], 1e-7), ('at the clean end', film[-1][0], CLEAN, 0)]

null_text.dtype = torch.float64
null_text.bounds = dict(inversion_latents=1e-9, loss_trace=1e-7, inner_iterations=0, uncond_embeddings=1e-6, reconstruction_latents=1e-7, plain_guided_final=1e-7, edit_latents_last=1e-7, text_embeddings=1e-9, timesteps=0)

ITEMS = dict(null_text=null_text)
