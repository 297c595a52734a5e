"""The numbers of InstructPix2Pix: its sampler, its pair generator and its training inputs. See test_goldens.py for what a checker is."""
import math
from pathlib import Path

import torch

from diffedit_lab.attention import Layer
from diffedit_lab.instruct_data import pair_walk, share_first
from diffedit_lab.methods.instruct_pix2pix import ancestral, even_times, follow, real_times
from diffedit_lab.schedule import noised
from diffedit_lab.train.instruct import conditions, dropped
from diffedit_lab.train.inpaint import wide_conv, widen
from golden_tools import _load, picture, sample

def in_sigmas(z, a):
    "Latents in k-diffusion's scaling, where the signal stays and the noise grows."
    return z/math.sqrt(a)

def levels(model, steps): return [model.schedule[t] for t in even_times(model.schedule, steps)]
def sigmas(model, steps): return torch.tensor([math.sqrt((1-a)/a) for a in levels(model, steps)])

def edit(model, t, s):
    """The original's CFGDenoiser works on a batch of exactly 1 and diffusers turns *all* guidance off where image_guidance < 1; `Follower` does
    neither. `original_*` is k-diffusion's interpolation of sigma, `latents` diffusers'. The picture's latents are not scaled."""
    z = model.encode(picture(t))
    f = follow(model, z, s['instruction'], s['text_guidance'], s['image_guidance'], s.get('negative_prompt', ''))
    got = dict(image_latent=f.pictures[:1], text_embedding=f.c[:1], null_embedding=f.c[1:2])
    for kind,straight in {'': True, 'original_': False}.items():
        with real_times(model, straight):
            times, a = even_times(model.schedule, s['steps']), levels(model, s['steps'])
            start = noised(0*t['start_noise'], t['start_noise'], a[0])
            film = [start, *(z for _,z,_ in ancestral(f, start, None, times, t['step_noises'].split(1)))]
            got |= {f'{kind}sigmas': sigmas(model, s['steps']), f'{kind}latents': torch.stack([in_sigmas(z, b) for z,b in zip(film, a)])}
        if straight: got |= dict(times=torch.tensor(times[:-1]), image=model.pixels(film[-1]).permute(0,2,3,1))
    return got, [('no text and no picture rows differ from the start', f.pictures[2:], 0*f.pictures[2:], 0)]

def pair_generation(model, t, s):
    """The original draws everything from the global generator; `pair_walk` takes its noises. Sharing is a step's share of steps-1, compared with >."""
    c, got, more = model.embed(s['captions']), {}, []
    for run in s['runs']:
        p, n = run['threshold'], s['steps']
        film = torch.stack([z for _,z,_ in pair_walk(model, c, p, s['guidance'], [t['start_noise'], *t['step_noises'].split(1)], n)])
        with real_times(model): a, sig = levels(model, n), sigmas(model, n)
        got[f'latents.{p}'] = torch.stack([in_sigmas(z, b) for z,b in zip(film, a)])
        fn, probs = share_first(p, n), torch.arange(4.).reshape(4,1,1,1)
        shares = [bool((fn(probs, Layer('up', 'up', False, 1, 1, 1, 0, i))!=probs).any()) for i in range(n)]
        more.append((f'shared steps at {p}', torch.tensor(shares), torch.tensor(run['shared_steps']), 0))
    return got | dict(sigmas=sig, text_embeddings=c), more

def dropout_widen(model, t, s):
    """diffusers' training script forgets the bias of the first convolution when it widens it, and flips the two pictures of a pair independently
    in some releases; `wide_conv` keeps the bias. The null picture is zeros and the conditioning latent is unscaled, the target scaled."""
    code = lambda u: (lambda text,image: text.to(torch.uint8)+2*image.to(torch.uint8))(*dropped(u, s['dropout']))
    scale = model.vae.config.scaling_factor
    c, pictures = conditions(t['u_edge'], model.embed(s['texts']), model.embed(''), model.encode(t['source_images'])/scale, s['dropout'])
    conv = torch.nn.Conv2d(4, len(t['conv_in.bias']), 3, padding=1)
    with torch.no_grad(): conv.weight.copy_(t['conv_in.weight']); conv.bias.copy_(t['conv_in.bias'])
    wide = wide_conv(conv, 8)
    got = {'edge_code': code(t['u_edge']), 'many_code': code(t['u_many']), 'target_latents': sample(model, t['target_images'], t['posterior_noise']),
           'text_condition': c, 'image_condition': pictures, 'widened.weight': wide.weight.detach(), 'widened.bias': wide.bias.detach()}
    if 'probe.latent' in t:
        narrow = _load(Path(model.name).parent/'model_pair', torch.float32).unet
        with torch.no_grad():
            got['probe.noise_prediction'] = widen(narrow, 8)(torch.cat([t['probe.latent'], t['probe.image_latent']], 1), t['probe.times'], t['probe.embedding']).sample
            own = narrow(t['probe.latent'], t['probe.times'], t['probe.embedding']).sample
        return got, [('the narrow network says the same', got['probe.noise_prediction'], own, 1e-5)]
    return got, []

ITEMS = {'edit by instruction': edit, 'pair_generation': pair_generation, 'dropout_widen': dropout_widen}
