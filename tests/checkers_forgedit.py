"""Imagic, Forgedit and DreamBoothForgedit: training, names, embeddings and sampling, against the numbers of the original programs.

The training functions take the recorded draws; all other words come from the case."""
import numpy as np, torch
from diffusers import UNet2DConditionModel
from PIL import Image

from diffedit_lab.loops import walk
from diffedit_lab.methods.forgedit import DREAMBOOTH_STRATEGIES, STRATEGIES, dreambooth_fit, forget_names, forgedit_fit, trained_names, vp, vs
from diffedit_lab.methods.imagic import imagic_fit
from diffedit_lab.schedule import path
from diffedit_lab.tuning import differences, part, wearing
from golden_tools import bound, listen, picture, sample

def start(model, t):
    "Pixels and latents of the case's picture; the originals bring it to multiples of 32 by Lanczos."
    image, (h,w) = picture(t), t['pixels'].shape[-2:]
    image = image if image.size==(w,h) else image.resize((w,h), Image.LANCZOS)
    with listen(model.vae.encoder) as pixels: z = sample(model, image, t['posterior_noise'])
    return pixels[0], z

def originals(net): return {n: p.data.clone() for n,p in net.named_parameters()}

def after(before, learned): return {n: w+learned[n].float()/1024 if n in learned else w for n,w in before.items()}

def stats(before, now, names):
    "Per tensor: norm before, norm now, norm of the change, and the change against cos(index)."
    def row(a, b): a,b = a.double().flatten(),b.double().flatten(); d = b-a; return torch.stack([a.norm(), b.norm(), d.norm(), (d*torch.arange(len(d)).double().cos()).sum()])
    return torch.stack([row(before[n], now[n]) for n in names])

def unchanged(before, net): return [('the model got its weights back', torch.cat([p.data.flatten() for p in net.parameters()]), torch.cat([w.flatten() for w in before.values()]), 0)]

def sampling(model, t, s, c, z, negative=None):
    "Latents of every step, and the picture."
    times = path(model.schedule, s.get('sampling_steps', s.get('steps')))
    zs = [z, *(x for _,x,_ in walk(model, z, c, times[::-1], s['guidance'], negative=negative))]
    return times, torch.stack(zs), model.pixels(zs[-1]).permute(0,2,3,1)

def vanilla_train(model, t, s):
    """The original says fp16 and computes in float32, with gradients 65536 times too large on a graphics card that Adam's epsilon does not see:
    `adam_eps` says so in words. Its 400 `steps` are a budget of rows, 40 updates of ten. It draws from the global generators, unseeded; here
    every draw is local."""
    pixels, z = start(model, t)
    before, draws = originals(model.unet), lambda: zip(t['noises'], t['timesteps'])
    def run(eps): return forgedit_fit(model, z, s['source_prompt'], draws(), s['optimiser_steps'], s['unet_lr'], s['embedding_lr'], s['batch_size'], adam_eps=eps, dtype=torch.float32)
    names, got = trained_names(model.unet), {}
    for kind,eps in [('', s['eps'])] + [('scaled.', s['eps']/65536)]*('scaled.loss' in t.bounds):
        tensors, losses = run(eps)
        now = after(before, part(tensors, 'unet'))
        got |= {f'{kind}loss': torch.tensor(losses, dtype=torch.float64), f'{kind}source_embedding_final': tensors['embedding'], f'{kind}trained_stats': stats(before, now, names)}
        if not kind: got |= {f'after/{n}': now[n] for n in names}
    assert set(got)>={k for k in t if k.startswith('after/')} and {k[6:] for k in t if k.startswith('after/')}==set(names), 'other tensors were trained'
    return got | dict(pixels=pixels, image_latent=z, source_embedding_start=model.embed(s['source_prompt']), target_embedding=model.embed(s['target_prompt'])), unchanged(before, model.unet)

def imagic_train(model, t, s):
    """The original has one generator for both stages and draws from the global one; state hangs on the pipeline, and a call before training dies of a
    missing attribute. Here what was learned is a value, and the model has its weights back."""
    pixels, z = start(model, t)
    before = originals(model.unet)
    tensors, losses = imagic_fit(model, z, s['target_prompt'], zip(t['noises'], t['timesteps']), s['embedding_steps'], s['unet_steps'], s['embedding_lr'], s['unet_lr'], s['batch_size'], s['eps'], torch.float32)
    more = unchanged(before, model.unet)
    now, wish = after(before, part(tensors, 'unet')), model.embed(s['target_prompt'])
    c = torch.lerp(tensors['embedding'], wish, s['mixing_weight'])
    with wearing(model.unet, part(tensors, 'unet')): times, zs, image = sampling(model, t, s, c, t['sample_latents'][0])
    return dict(pixels=pixels, image_latent=z, target_embedding=wish, loss=torch.tensor(losses, dtype=torch.float64), optimised_embedding=tensors['embedding'], edit_embedding=c, unet_stats=stats(before, now, before),
                sample_latents=zs, sample_image=image, **{f'unet_after/{n}': w for n,w in now.items()}), more + [('sampling times', times[:0:-1], t['sample_timesteps'], 0)]

def dreambooth_train(model, t, s):
    """The original shifts every field of its save path by one, so that pictures with one prompt overwrite each other; it saves a whole pipeline. Here the
    changes of both networks are one value that knows its picture and its base."""
    pixels, z = start(model, t)
    nets = dict(unet=model.unet, text_encoder=model.text_encoder)
    before = {k: originals(net) for k,net in nets.items()}
    tensors, losses = dreambooth_fit(model, z, s['source_prompt'], zip(t['noises'], t['timesteps']), s['optimiser_steps'], s['unet_lr'], s['text_encoder_lr'], s['batch_size'], s['eps'], torch.float32)
    more = [c for k,net in nets.items() for c in unchanged(before[k], net)]
    now = {k: after(before[k], part(tensors, k)) for k in nets}
    with wearing(model.text_encoder, part(tensors, 'text_encoder')): texts = {f'{k}_embedding_after': model.embed(p) for k,p in dict(source=s['source_prompt'], target=s['target_prompt'], empty='').items()}
    return dict(pixels=pixels, image_latent=z, loss=torch.tensor(losses, dtype=torch.float64), **texts, **{f'{k}_stats': stats(before[k], now[k], before[k]) for k in nets},
                **{f'unet_after/{n}': w for n,w in now['unet'].items()}, **{f'text_after/{n}': w for n,w in now['text_encoder'].items()}), more

def interpolation(model, t, s):
    """An unknown word leaves the original's source embedding as it is, a reconstruction without a word; `forgedit` raises."""
    wish = model.embed(s['target_prompt']) if 'target_embedding' in t.bounds else t['target_embedding']
    source = t['source_embedding']
    return dict(target_embedding=wish, empty_embedding=model.embed(''), vs=torch.cat([vs(source, wish, g) for g in s['vs_gamma']]), vp=torch.cat([vp(source, wish, a, b) for a,b in s['vp_alpha_beta']])), []

def forgetting(model, t, s):
    """To the originals an unknown strategy means "forget nothing", and `encoderkv` means opposite things in the two; here unknown ones raise, and the
    DreamBooth form's is called `noencoderkv`."""
    vanilla, k = s['pipeline_kind']=='vanilla', s['sd1_configuration']
    known = STRATEGIES if vanilla else DREAMBOOTH_STRATEGIES
    with torch.device('meta'): sd1 = UNet2DConditionModel(sample_size=64, block_out_channels=k['block_channels'], layers_per_block=k['layers_per_block'], cross_attention_dim=k['text_width'])
    got = {}
    for net,unet in dict(tiny=model.unet, sd1=sd1).items():
        names = [n for n,_ in unet.named_parameters()]
        number = {n: i for i,n in enumerate(names)}
        got[f'{net}.trained'] = torch.tensor([number[n] for n in (trained_names(unet) if vanilla else names)])
        for key in (k for k in t.bounds if k.startswith(f'{net}.reset.')):
            word = key.removeprefix(f'{net}.reset.')
            ours = 'noencoderkv' if word=='encoderkv' and not vanilla else word
            try: gone = forget_names(names, ours, known)
            except ValueError as e: gone = []; assert all(o in str(e) for o in known), 'an unknown strategy lists the known'
            got[key] = torch.tensor([number[n] for n in gone], dtype=torch.int64)
    return got, []

def forgedit_sample(model, t, s):
    """The original makes a fresh copy of the network for every call, three in memory at once, and blends 0*learned + 1*pretrained, which keeps a NaN; here
    what is forgotten is simply not put on."""
    base = {n: p.data for n,p in model.unet.named_parameters()}
    tuned = {k.removeprefix('finetuned/'): w for k,w in t.items() if k.startswith('finetuned/')}
    learned, kept, got, more = differences(tuned, base, torch.float32), originals(model.unet), {}, []
    for run in s['runs']:
        words, name = {k: run[k] for k in ('gamma','alpha','beta') if k in run}, run['name']
        c = (vs if run['mode']=='vs' else vp)(t['source_embedding'], t['target_embedding'], **words)
        gone = set(forget_names(learned, run['strategy']))
        with wearing(model.unet, learned, lambda n: run['degree'] if n in gone else 1.): times, zs, image = sampling(model, t, s, c, t[f'latents.{name}'][0], t['empty_embedding'])
        got |= {f'latents.{name}': zs, f'image.{name}': image}
        more.append(('sampling times', times[:0:-1], t['timesteps'], 0))
    return got, more + unchanged(kept, model.unet)

ITEMS = dict(vanilla_train=vanilla_train, imagic_train=imagic_train, dreambooth_train=dreambooth_train, interpolation=interpolation, forgetting=forgetting, forgedit_sample=forgedit_sample)
