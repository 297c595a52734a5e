"""The numbers of StyleDiffusion's own code: the training of its mapping networks, and an edit with given networks. One function an item,
(model, tensors, settings) -> what was reached by name, and further claims (what, got, wanted, bound)."""
import math

import torch

from diffedit_lab.attention import carry, edit_attention, equalizer, refine_mapper, replace_mapper, window
from diffedit_lab.loops import denoise, walk
from diffedit_lab.methods.style_diffusion import fit_mappings, inner_steps, invert_with_maps, mapped, style_values, text_values
from diffedit_lab.schedule import path

def nets_of(t, prefix): return {k.removeprefix(prefix): v.double() for k,v in t.items() if k.startswith(prefix)}

def train(model, t, s):
    """The program leaves every weight of UNet and CLIP ready to learn and asks CLIP and the network anew in each cross-attention layer; its batch norm
    never leaves the training mode, so its running statistics are saved and never used; the list of target maps is overwritten by its own sum at
    position 0. `fit_mappings` asks gradients for the network alone, makes the values once, and norms each row."""
    times, c, features = path(model.schedule, s['steps']), model.embed(['', s['prompt']]), t['image_features'].double()
    up, maps = invert_with_maps(model, t['z_0'], times, c[1:])
    wide = t['loss_terms'].shape[1] if 'loss_terms' in t else 6
    words = dict(guidance=s['guidance_scale'], inner=s['num_inner_steps'], epochs=s['num_epoch'], stop=s['early_stop_epsilon'], weight=s.get('attention_loss_weight', 1.) if s['attention_loss'] else 0.)
    done = list(fit_mappings(model, up, maps if wide>1 else {}, c[1:], features, nets_of(t, 'initial_'), **words))
    trace, last = torch.tensor([x for *_,x in done for x in x], dtype=torch.float64), done[-s['steps']:]
    total, terms = trace[:,0], trace[:,1:]
    scale, shift = mapped({k: torch.stack([net[k] for _,_,net,_ in last]) for k in last[0][2]}, features).chunk(2, 1)
    got = dict(text_embeddings=c, timesteps=torch.tensor(times[:0:-1]), inversion_latents=torch.stack([up[x] for x in times[1:]]), loss_terms=terms, total_loss=total,
               inner_iterations=torch.tensor([len(x) for *_,x in done]).unflatten(0, (s['num_epoch'], s['steps'])), gamma=scale, beta=shift, reconstruction_latents=torch.stack([z for _,z,_,_ in last]),
               mean_target_maps=torch.stack([torch.stack(maps[x]).mean((0,1,2)) for x in times[1:]])[...,:t['mean_target_maps'].shape[-1] if 'mean_target_maps' in t else None])
    most = [math.ceil(s['num_inner_steps']*math.exp(-.1*i)) for i in range(s['steps'])]
    ratio = lambda x, y: x/y if x.shape==y.shape else x
    t.bounds = {k: dict(text_embeddings=1e-9, timesteps=0, inversion_latents=1e-9, inner_iterations=0, gamma=1e-5, beta=1e-5, reconstruction_latents=1e-6, mean_target_maps=1e-7,
                        total_loss=1e-8*t['total_loss'].max().item(), loss_terms=1e-6*t['loss_terms'].max().item())[k] for k in t.bounds}
    return got, [(f'{k}, relative', ratio(got[k], t[k]), torch.ones_like(t[k]), b) for k,b in dict(total_loss=1e-8, loss_terms=1e-6).items()] + [
        ('the first iteration, relative', ratio(terms[:1], t['loss_terms'][:1]), torch.ones_like(t['loss_terms'][:1]), 1e-10), ('the schedule', torch.tensor([inner_steps(s['num_inner_steps'], i) for i in range(s['steps'])]), torch.tensor(most), 0)]

def edit(model, t, s):
    """The program gives the target's words the learned scales of whatever word of the source stood at their place (`as_published=True`), and lets
    `tau_v` alone round up; its switch for the empty prompt's rows does nothing unless the passes run one by one (`carry(empty=...)` works in one batch)."""
    texts, T, g, lb, eq = s['prompts'], s['steps'], s['guidance_scale'], s.get('local_blend') or {}, s.get('equalizer') or {}
    times, c, features, nets = path(model.schedule, T), model.embed(['', *texts]), t['image_features'].double(), nets_of(t, 'net_')
    factors = dict(zip(eq.get('words',()), eq.get('values',())))
    rows = mapped(nets, features)
    v, span, z = text_values(model, texts, rows, as_published=True), (0, math.ceil(T*s['tau_v'])), t['start_latent'].to(model.dtype)
    assert [i for i in range(T) if i<span[1]]==list(s['value_steps_target'])
    assert list(window(T, s['tau_u'], as_published=True))==list(s['uncond_self_window_steps']) and list(window(T, s['tau_s'], as_published=True))==list(s['self_window_steps'])
    block = carry(model, texts, T, edit=s['edit'], factors=factors, cross=s['cross_replace_steps'], self_=s['self_replace_steps'], empty=s['uncond_self_replace_steps'], max_spots=s['self_replace_max_pixels'],
                  blend=lb.get('words'), subtract=lb.get('subtract_words'), threshold=(lb.get('threshold',.3), lb.get('subtract_threshold',.3)), start=lb.get('start_blend',.2), as_published=True)
    latents, masks = [], []
    with block as seen, edit_attention(model, values=style_values(v, span)):
        for _,x,_ in walk(model, z.expand(len(texts),-1,-1,-1), c[1:], times[::-1], g, mix=seen):
            latents.append(x)
            masks.append(torch.zeros_like(x[:,:1], dtype=torch.bool) if seen.mask is None else seen.mask)
    with edit_attention(model, values=style_values(v[:,:1])): alone = denoise(model, z, c[1:2], times, g)
    scale, shift = rows.chunk(2, 1)
    got = dict(gamma=scale, beta=shift, latents=torch.stack(latents), reconstruction_last=alone, average_cross_maps=seen.maps.mean()[...,:t['average_cross_maps'].shape[-1]], timesteps=torch.tensor(times[:0:-1]),
               text_embeddings=c, equalizer=equalizer(model, texts[1:2], factors, as_published=True), blend_mask=torch.stack(masks))
    if s['edit']=='replace': got['replacement_mapper'] = torch.stack([replace_mapper(model, texts[0], o, as_published=True) for o in texts[1:]])
    for name,o in zip(('refinement_mapper','refinement_alphas'), zip(*(refine_mapper(model, texts[0], o, as_published=True) for o in texts[1:]))): got[name] = torch.stack(o)
    t.bounds = {k: dict(latents=1e-9, reconstruction_last=1e-9, gamma=2e-6, beta=2e-6, average_cross_maps=1e-7, text_embeddings=1e-6, replacement_mapper=1e-7).get(k, 0) for k in t.bounds}
    return got, []

train.dtype = edit.dtype = torch.float64
ITEMS = dict(stylediffusion_train=train, stylediffusion_edit=edit)
