"RePaint's path and levels, and ControlNet-inpainting against diffusers' own pipeline."
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np, pytest, torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetInpaintPipeline, UNet2DConditionModel
from PIL import Image

from diffedit_lab.inpainters import control_picture, controlled, controlnet_inpaint, read_controlnet
from diffedit_lab.loops import redraw
from diffedit_lab.masks import on_latents
from diffedit_lab.methods.repaint import jump_path, repaint, repaint_walk
from diffedit_lab.model import load
from diffedit_lab.schedule import CLEAN, Schedule, gaussian, path, sd_schedule

def looks(way): return sum(b<a for a,b in pairwise(way))

# -- the path

@pytest.mark.parametrize('words,down,up', [((250,10,10),2410,2160), ((100,10,10),910,810), ((50,10,10),410,360), ((20,5,3),50,30), ((7,10,10),7,0), ((50,10,1),50,0)])
def test_counts(words, down, up):
    way = jump_path(*words)
    assert looks(way) == down and len(way)-1-down == up
    assert way[0] == words[0]-1 and way[-1] == -1 and all(abs(a-b)==1 for a,b in pairwise(way))

def test_tiny_list():
    assert jump_path(10,2,2) == [9,8,7,6,7,8,7,6,5,4,5,6,5,4,3,2,3,4,3,2,1,0,1,2,1,0,-1]
    assert jump_path(250,10,10).index(231)+1 == jump_path(250,10,10).index(230) == 19 and jump_path(250,10,10)[20] == 231   # the first jump is at 230

@pytest.mark.parametrize('start', [0.,.3,.5,.99,1.])
def test_start_bounds_the_climbs(start):
    way = jump_path(40,5,3,start)
    tops = [b for a,b in pairwise(way) if b>a]
    assert not tops or max(tops) <= 40*start
    assert looks(jump_path(40,5,3,0.)) == 40 and looks(way) <= looks(jump_path(40,5,3))

@pytest.mark.parametrize('levels', [0,1,2,3])
def test_short_paths(levels): assert jump_path(levels,1,1) == [*range(levels-1,-2,-1)]

# -- the walk

def hole(z): m = torch.zeros(1,1,*z.shape[-2:]); m[...,8:20,10:24] = 1; return m

@pytest.fixture(scope='module')
def z(model): return model.encode(Image.fromarray(np.random.default_rng(0).integers(0,255,(8,8,3),dtype=np.uint8)).resize((128,128), Image.BICUBIC))

def last(film): *_, (_,z,_) = film; return z

def test_one_resample_is_redraw_bit_for_bit(model, z):
    c, none, m = model.embed('a horse on grass'), model.embed('at night'), .5*hole(z)
    for strength in (.5,1.):
        times = path(model.schedule, 4, strength)
        got = last(repaint_walk(model, z, c, times, jump_path(len(times)-1, 2, 1), m, 9, 3., none))
        assert torch.equal(got, redraw(model, z, c, times, gaussian(z.shape, 9), 3., none, m))

def test_outside_is_the_picture_at_every_level(model, z):
    "Whatever the network says, the noise outside is unit normal, and it changes on the way up only."
    class Wild: # a network that is always wrong
        def eps(self, z, t, *a): return 3*torch.ones_like(z)
        schedule = sd_schedule()
        def embed(self, text): return torch.zeros(1,1,1)
    big = z.repeat(1,1,4,4); m = torch.zeros(1,1,*big.shape[-2:]); m[...,:10] = 1
    times, way = path(Wild.schedule, 12), jump_path(12,3,3)
    noise = None
    for (k,l),(_,x,_) in zip(pairwise(way), repaint_walk(Wild(), big, None, times, way, m, 1, 2.)):
        if l<0: assert torch.equal(x[...,10:], big[...,10:]); continue
        a = Wild.schedule[times[l+1]]; e = ((x-a**.5*big)/(1-a)**.5)[...,10:]
        if l>0: assert abs(e.std()-1) < .03 and abs(e.mean()) < .03
        if noise is not None and 0<l<k: assert (e-noise).abs().max() < 2e-2
        if noise is not None and l>k: assert (e-noise).abs().max() > .05
        noise = e if l>0 else None

@pytest.mark.parametrize('final', [None, 1.])
def test_up_steps_are_exact_for_any_spacing(final):
    "A walk that is only told the truth ends at the truth, jumps or not: the levels of up and down agree."
    x0 = gaussian((1,4,64,64), 3)
    class Oracle:
        schedule = replace(sd_schedule(), final=final)
        def eps(self, z, t, *a): a = self.schedule[t]; return (z-a**.5*x0)/(1-a)**.5
        def embed(self, text): return None
    for steps in (7,50,333):
        times = path(Oracle.schedule, steps); film = [*repaint_walk(Oracle(), torch.zeros_like(x0), None, times, jump_path(steps, 3, 2), torch.ones(1,1,64,64), 0, 2.)]
        for l,x,_ in film[:-1]:
            a = Oracle.schedule[times[l+1]]; e = (x-a**.5*x0)/(1-a)**.5
            if a<.99: assert abs(e[:, :].std()-1) < .05, (steps, l)
        assert (film[-1][1]-x0).abs().max() < (1e-3 if final else .2)

def test_nothing_to_fill(model, z):
    times = path(model.schedule, 3)
    assert torch.equal(last(repaint_walk(model, z, model.embed('at night'), times, jump_path(3,1,2), 0*hole(z))), z)

def test_rows_and_defaults(model, scene):
    e = repaint(model, scene.image, target='a zebra on grass', mask=scene.mask, steps=6, jump=2, resamples=2, guidance=1.)
    assert e.rows == looks(jump_path(6,2,2)) == 10 and e.settings['resamples'] == 2
    assert repaint(model, scene.image, target='a zebra on grass', mask=scene.mask, steps=6, jump=1, resamples=2, strength=.5).rows == 2*looks(jump_path(3,1,2))

@pytest.mark.parametrize('words', [dict(jump=0), dict(jump=2.5), dict(resamples=0), dict(resamples=True), dict(start=-.1), dict(steps=0), dict(strength=2)], ids=str)
def test_bad_words(model, scene, words):
    with pytest.raises(ValueError, match=f'^{list(words)[0]} must be'): repaint(model, scene.image, target='a zebra on grass', mask=scene.mask, **words)

# -- ControlNet

def wake(net): # a branch that says something
    for p in (*net.controlnet_down_blocks.parameters(), *net.controlnet_mid_block.parameters(), *net.controlnet_cond_embedding.conv_out.parameters()): torch.nn.init.normal_(p, std=.2)
    return net.eval().requires_grad_(False)

@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    "A small random pipeline, as diffusers saves it."
    d = tmp_path_factory.mktemp('control')/'pipe'
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = UNet2DConditionModel.from_config(dict(model.unet.config) | dict(block_out_channels=(16,16,32)))
        branch = wake(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8,8,16)))
    scheduler = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    StableDiffusionControlNetInpaintPipeline(vae=model.vae, text_encoder=model.text_encoder, tokenizer=model.tokenizer, unet=unet, controlnet=branch, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(d)
    return d

BOX = np.pad(np.ones((64,48), np.float32), ((40,24),(16,64)))

@pytest.mark.parametrize('guidance,scale', [(5.,.7), (1.,1.)])
def test_controlnet_equals_diffusers(folder, scene, guidance, scale):
    mine, pipe = load(folder, 'cpu'), StableDiffusionControlNetInpaintPipeline.from_pretrained(folder, low_cpu_mem_usage=False); pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(5); z = mine.encode(scene.image, rng); noise = torch.randn(z.shape, generator=rng); m = on_latents(BOX, z); see = control_picture(scene.image, m)
    with controlled(mine, read_controlnet(folder, mine), see, scale): ours = redraw(mine, z, mine.embed('a zebra on grass'), path(mine.schedule, 4, .8), noise, guidance, mine.embed(''), m)
    with torch.no_grad(): theirs = pipe('a zebra on grass', image=scene.image, mask_image=Image.fromarray(np.uint8(255*BOX)), control_image=see, height=128, width=128, strength=.8, num_inference_steps=4,
        guidance_scale=guidance, controlnet_conditioning_scale=scale, generator=torch.Generator().manual_seed(5), output_type='latent').images
    assert (ours-theirs).abs().max() < 1e-3*theirs.std()

def test_controlnet_inpaint_by_its_folder(folder, scene):
    mine = load(folder, 'cpu')
    a, b, c = (controlnet_inpaint(mine, scene.image, target='a zebra on grass', mask=BOX, steps=2, **w) for w in ({}, dict(control=str(folder/'controlnet')), dict(scale=0.)))
    assert a.rows == 4 and np.array_equal(np.asarray(a.raw), np.asarray(b.raw)) and not np.array_equal(np.asarray(a.raw), np.asarray(c.raw))
    assert a.paste['after'] == math.inf and not mine.unet._forward_pre_hooks
    assert controlnet_inpaint(mine, scene.image.resize((97,67)), target='a zebra on grass', mask=np.ones((67,97)), steps=2).image.size == (97,67)

def test_controlled_leaves_no_trace(folder, scene):
    mine, branch = load(folder, 'cpu'), read_controlnet(folder, load(folder, 'cpu')); see = control_picture(scene.image, torch.ones(1,1,32,32))
    assert (see==-1).all() and control_picture(scene.image, torch.zeros(1,1,32,32)).min()>=0
    with pytest.raises(KeyboardInterrupt):
        with controlled(mine, branch, see): raise KeyboardInterrupt
    assert not mine.unet._forward_pre_hooks
    with pytest.raises(RuntimeError, match='nothing was steered'):
        with controlled(mine, branch, see): pass
    assert not mine.unet._forward_pre_hooks

def test_bad_controls(model, folder, scene, tmp_path):
    words = dict(target='a zebra on grass', mask=BOX, steps=2)
    with pytest.raises(ValueError, match="^control: 'tiny' holds no ControlNet"): controlnet_inpaint(model, scene.image, **words)
    with pytest.raises(ValueError, match='^control: .*made for it'): controlnet_inpaint(model, scene.image, control=folder, **words)
    with pytest.raises(ValueError, match='^control: .*shrinks its picture 8 times'): controlnet_inpaint(load(folder,'cpu'), scene.image, control=ControlNetModel.from_unet(load(folder,'cpu').unet, conditioning_embedding_out_channels=(8,8,8,8)), **words)
    with pytest.raises(ValueError, match='^control must be'): controlnet_inpaint(model, scene.image, control=1, **words)
    (tmp_path/'controlnet').mkdir()
    with pytest.raises(ValueError, match='^control: .*no ControlNet'): controlnet_inpaint(model, scene.image, control=tmp_path, **words)
