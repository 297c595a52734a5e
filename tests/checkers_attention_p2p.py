"""The numbers of Prompt-to-Prompt's own code: words to tokens, mappers, windows, factors; edits with replacement, refinement and reweighting;
DDIM inversion. One function an item, (model, tensors, settings) -> what was reached by name, and further claims (what, got, wanted, bound)."""
import pytest, torch

from diffedit_lab.attention import carry, cross_window, equalizer, refine_mapper, replace_mapper, window, word_tokens
from diffedit_lab.loops import invert, walk
from diffedit_lab.schedule import CLEAN, path, sd_schedule

def alignment(model, t, s):
    """The published replacement mapper forgets, after the last exchanged word, by how many tokens the words so far have shifted the rest
    (`as_published=True`); the default gives the corrected mappers. Words are found there only between single blanks and letter by letter, so two
    blanks shift all later words, and a missing word silently changes nothing; here it is found in any writing, and a missing one is an error."""
    pairs, got, more = s['pairs'], {}, []
    for p in pairs:
        a,b = p['source'],p['target']
        assert model.tokenizer(a).input_ids==p['source_token_ids'] and model.tokenizer(b).input_ids==p['target_token_ids']
        if p['replacement_mapper_index'] is None:
            with pytest.raises(ValueError): replace_mapper(model, a, b, as_published=True)
        if (k := p.get('corrected_mapper_index')) is not None: more.append((f'corrected mapper, {b!r}', replace_mapper(model, a, b), t['corrected_replacement_mappers'][k], 1e-7))
        if p['target_token_count']>=p['source_token_count']: more.append((f'refinement by default, {b!r}', refine_mapper(model, a, b)[0], t['refinement_mappers'][p['refinement_index']], 0))
    def stacked(key, f):
        of = {p[key]: p for p in pairs if p[key] is not None}
        return torch.stack([f(model, of[k]['source'], of[k]['target'], as_published=True) for k in sorted(of)])
    got['replacement_mappers'] = stacked('replacement_mapper_index', replace_mapper)
    for i,name in enumerate(('refinement_mappers','refinement_alphas')): got[name] = stacked('refinement_index', lambda *a,i=i,**k: refine_mapper(*a, **k)[i])
    for q in s['word_queries']: assert word_tokens(model, q['text'], q['word'], as_published=True)==q['token_indices'], q
    for w in s['cross_windows']: got[w['tensor']] = cross_window(model, w['prompts'][1:], w['steps'], w['cross_replace_steps'], as_published=True)
    for e in s['equalizers']: got[e['tensor']] = equalizer(model, e['text'], dict(zip(e['words'], e['values'])), as_published=True)
    t.bounds = {k: 1e-7 if k=='replacement_mappers' else 0 for k in t.bounds}
    return got, more

def words_of(s):
    "A case's settings as `carry` calls them."
    lb, eq = s.get('local_blend') or {}, s.get('equalizer') or {}
    return dict(edit=s['edit'], factors=dict(zip(eq.get('words',()), eq.get('values',()))), cross=s['cross_replace_steps'], self_=s['self_replace_steps'], max_spots=s['self_replace_max_pixels'], as_published=True,
                blend=lb.get('words'), subtract=lb.get('subtract_words'), threshold=(lb.get('threshold',.3), lb.get('subtract_threshold',.3)), start=lb.get('start_blend',.2))

def edit(model, t, s):
    """The program keeps one list for the maps it stores and the maps it edits, so its local blend sees the edited ones by accident; `carry` stores
    what `watch` sees inside the edit, in memory of its own. Its layers, sizes and latents are literals (five maps of 16x16 by their place in a list),
    its shares must be floats, its cross window counts one step too many (`as_published=True`), its hooks stay after the run."""
    texts, T, g, how = s['prompts'], s['steps'], s['guidance_scale'], words_of(s)
    times, c, z = path(model.schedule, T), model.embed(texts), t['start_latent'].to(model.dtype)
    before = model.unet.attn_processors
    with carry(model, texts, T, **how): first = model.eps(z.expand(len(texts),-1,-1,-1), times[-1], c, g)
    latents, masks = [], []
    with carry(model, texts, T, **how) as blend:
        for _,x,_ in walk(model, z.expand(len(texts),-1,-1,-1), c, times[::-1], g, mix=blend):
            latents.append(x)
            masks.append(torch.zeros_like(x[:,:1], dtype=torch.bool) if blend.mask is None else blend.mask)
    assert all(a is b for a,b in zip(before.values(), model.unet.attn_processors.values()))
    maps = blend.maps.mean()
    refined = [torch.stack(o) for o in zip(*(refine_mapper(model, texts[0], o, as_published=True) for o in texts[1:]))]
    got = dict(timesteps=torch.tensor(times[:0:-1]), text_embeddings=model.embed(['', *texts]), latents=torch.stack(latents), guided_noise_first_step=first, average_cross_maps=maps[...,:t['average_cross_maps'].shape[-1]],
               cross_window=cross_window(model, texts[1:], T, how['cross'], as_published=True), refinement_mapper=refined[0], refinement_alphas=refined[1], equalizer=equalizer(model, texts[1:2], how['factors'], as_published=True), blend_mask=torch.stack(masks))
    if s['edit']=='replace': got['replacement_mapper'] = torch.stack([replace_mapper(model, texts[0], o, as_published=True) for o in texts[1:]])
    for text,words in zip(texts, s.get('token_indices_per_prompt', [])):
        for w,at in words.items(): assert word_tokens(model, text, w, as_published=True)==at, (text, w)
    if 'self_window_steps' in s: assert list(window(T, how['self_'], as_published=True))==list(s['self_window_steps'])
    scale = t['latents'].abs().max().item()
    t.bounds = {k: 0 for k in t.bounds} | {k: b for k,b in dict(text_embeddings=1e-6, latents=1e-6*scale, guided_noise_first_step=1e-6*scale, average_cross_maps=1e-6, replacement_mapper=1e-7).items() if k in t.bounds}
    return got, []

def ddim_inversion(model, t, s):
    """diffusers' inverse scheduler pairs times and levels differently; this is the formula of the paper's program: the network is asked at the noisier
    end of each step, the clean end has alpha-bar 0, and there is no guidance. It is `invert` with the source text."""
    n = s['image_size']//t['image_small'].shape[0]
    px = t['image_small'].repeat_interleave(n, 0).repeat_interleave(n, 1).permute(2,0,1)[None].to(model.vae.dtype)/127.5-1
    z, times, c = model.encode(px), path(model.schedule, s['steps']), model.embed(['', s['prompt']])
    seen = (model.pixels(z)[0].permute(1,2,0)*255).byte()                        # cut off, as the program does
    t.bounds = {k: 0 for k in t.bounds} | dict(latents=1e-9, vae_reconstruction=1, text_embeddings=1e-9)
    got = dict(latents=torch.stack([*invert(model, z, times, c[1:], s['guidance_scale']).values()]), vae_reconstruction=seen, timesteps=torch.tensor(times[:0:-1]), text_embeddings=c, alphas_cumprod=model.schedule.abar.float())
    off = (seen!=t['vae_reconstruction']).double().mean()
    return got, [('share of grey values that differ', off, 0*off, 1e-3), ("the package's own table", sd_schedule().abar, t['alphas_cumprod'], 1e-6), ('the clean end', torch.tensor(model.schedule[CLEAN]), t['alphas_cumprod'][0], 1e-9)]

edit.dtype = ddim_inversion.dtype = torch.float64
ITEMS = dict(alignment=alignment, p2p_replace=edit, p2p_refine=edit, p2p_reweight=edit, ddim_inversion=ddim_inversion)
