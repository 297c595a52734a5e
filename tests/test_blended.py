"Blended Latent Diffusion: what is no lesson, and what the notebook does not try."
from contextlib import closing

import numpy as np, pytest, torch
from PIL import Image

from diffedit_lab import scene as make
from diffedit_lab.loops import denoise
from diffedit_lab.masks import noise_draws
from diffedit_lab.methods.blended_latents import (blended_latents, diversity, masked_view, nearest_cells, poisson, put_back, rank, reconstruct_background, seam_error, shrink_masks,
                                                  shrink_schedule, touched, tune_background)
from diffedit_lab.schedule import CLEAN, noised, path

TARGET = 'a zebra on grass'
def array(im): return np.asarray(im).astype(int)
def box(w=128, h=128):
    m = np.zeros((h,w), np.float32); m[h//4:3*h//4, w//4:3*w//4] = 1
    return m

@pytest.fixture(scope='module')
def z(model): return model.encode(make('a horse on grass', seed=3).image)

@pytest.fixture(scope='module')
def draft(model, scene): return blended_latents(model, scene.image, target=TARGET, mask=box(), n=1, steps=3)

# -- the loop

def walked(model, z, mask, as_published=False):
    times = path(model.schedule, 4); n = noise_draws((len(times),*z.shape[1:]), 1)[:,None]
    start = noised(z, n[0], model.schedule[times[-1]])
    mix = put_back(model.schedule, z, [mask]*4, n[1:], times, as_published)
    return start, times, denoise(model, start, model.embed(TARGET), times, mix=mix)

def test_zeros_keep_the_latents_bit_for_bit_and_ones_are_plain_denoising(model, z):
    off = torch.zeros(1, 1, *z.shape[-2:])
    assert torch.equal(walked(model, z, off)[2], z)
    start, times, end = walked(model, z, 1-off)
    assert torch.equal(end, denoise(model, start, model.embed(TARGET), times))

def test_as_published_leaves_the_noise_of_the_last_level(model, z):
    _,times,end = walked(model, z, torch.zeros(1, 1, *z.shape[-2:]), as_published=True)
    assert (end-z).std().item()==pytest.approx((1-model.schedule[times[1]])**.5, rel=.1)

def test_a_prediction_does_not_depend_on_how_many_there_are(model, scene):
    words = dict(target=TARGET, mask=box(), steps=2)
    many, one = (blended_latents(model, scene.image, **words, **w) for w in (dict(n=3, seed=5), dict(n=1, seed=7)))
    assert min(abs(array(v.raw)-array(one.raw)).max() for v in many.variants)<=2 and one.score is None
    assert sorted(v.score for v in many.variants)[::-1]==[v.score for v in many.variants]

def test_paint_outside_the_mask_never_leaks(model, scene):
    clean, dirty = scene.image.copy(), scene.image.copy()
    for im in (clean, dirty): im.paste('gold', (40,40,88,88))
    dirty.paste('black', (0,0,128,20)) # and the codec's normalisation looks everywhere
    words = dict(target=TARGET, mask=box(), n=1, steps=4, strength=.5)
    a,b,plain = (blended_latents(model, scene.image, **words, start=s) for s in (clean, dirty, 'source'))
    assert np.array_equal(array(a.raw), array(b.raw)) and not np.array_equal(array(a.raw), array(plain.raw))

@pytest.mark.parametrize('start', ['source','noise'])
def test_published_loops_differ_and_run(model, scene, start):
    words = dict(target=TARGET, mask=box(), n=1, steps=3, start=start, shrink=1)
    assert not np.array_equal(*(array(blended_latents(model, scene.image, **words, as_published=p).raw) for p in (False, True)))

# -- masks

def test_the_true_mask_is_always_reached():
    for steps in range(1, 61):
        for masks in range(1, 41):
            s = shrink_schedule(steps, masks)
            assert len(s)==steps and s[-1]==masks-1 and s==sorted(s) and s[0]>=0
            if masks<=steps: assert s==[min(masks-1, i*masks//steps) for i in range(steps)]

@pytest.mark.parametrize('steps, masks, reached', [(50,4,True), (50,5,True), (50,10,False), (40,8,False), (20,3,True), (10,4,True)])
def test_the_published_rule(steps, masks, reached):
    s = shrink_schedule(steps, masks, as_published=True)
    assert (s[-1]==masks-1)==reached and s==[i//(steps//masks+1) for i in range(steps)]

def test_shrinking_masks_are_nested():
    m = torch.zeros(1,1,9,12); m[0,0,4,5] = 1
    got = shrink_masks(m, 3)
    assert got.shape==(4,1,9,12) and got.sum((1,2,3)).tolist()==[49,25,9,1] and (got[:-1]>=got[1:]).all()
    assert torch.equal(shrink_masks(m, 0), m)

def test_touched_sees_strokes_and_no_dust():
    stroke = torch.zeros(1,1,4,4); stroke[0,0,1,1] = 1/64
    assert touched(stroke, 8).sum()==1 and not touched(torch.full((1,1,4,4), 1.5/255), 8).any()
    m = np.zeros((16,24)); m[4,12] = 1
    assert nearest_cells(m, torch.zeros(1,4,2,3))[0,0].tolist()==[[0,1,0],[0,0,0]]

# -- ranking

@pytest.mark.parametrize('size', [(128,128),(300,100),(90,240)])
def test_the_view_holds_the_mask(size):
    w,h = size; im = Image.new('RGB', size); m = np.zeros((h,w), np.float32); m[-20:,:15] = 1
    im.paste('white', (0,h-20,15,h))
    view = array(masked_view(im, m))
    assert view.shape[0]==view.shape[1] and (view==255).all(-1).sum()==20*15
    assert masked_view(im, 0*m).size==(max(size),)*2 and masked_view(im, m, as_published=True).size==size

def test_rank_and_diversity(judge, scene):
    order = rank(judge, [scene.remove().image, scene.image], 'a horse on grass', scene.mask)
    assert [i for i,_ in order]==[1,0] and order[0][1]>order[1][1]
    assert diversity([1,2,4], lambda a,b: abs(a-b))==2. and diversity([1], None)==0.

# -- background

def weights(model): return {k: v.clone() for k,v in model.vae.state_dict().items()}
def unchanged(model, before): return all(torch.equal(v, before[k]) for k,v in model.vae.state_dict().items()) and not any(p.requires_grad or p.grad is not None for p in model.vae.parameters())

@pytest.mark.parametrize('how', ['weights','latents','poisson','paste'])
def test_any_edit_gets_its_background_back(model, scene, draft, how):
    before, words = weights(model), dict(steps=4) if how in ('weights','latents') else {}
    r = reconstruct_background(model, draft, how=how, **words)
    assert unchanged(model, before) and torch.is_grad_enabled()
    assert r.image.size==scene.image.size and r.rows==draft.rows and r.settings['background']==how and r.method==draft.method and len(r._repr_png_())>1000
    assert how!='paste' or r.paste['after']==np.inf

def test_a_bare_picture_of_any_size(model):
    im = Image.fromarray(np.random.default_rng(0).integers(0,256,(60,100,3),dtype=np.uint8)).resize((200,120))
    r = reconstruct_background(model, im, source=im, mask=box(200,120), how='weights', steps=1)
    assert r.image.size==im.size and r.raw.size==im.size

@pytest.mark.parametrize('error', [RuntimeError('the third call'), KeyboardInterrupt()], ids=['exception','ctrl-c'])
def test_the_decoder_is_given_back_after_a_failure(model, scene, draft, error):
    before, calls = weights(model), []
    def fail(*_):
        calls.append(1)
        if len(calls)==3: raise error
    hook = model.vae.decoder.register_forward_pre_hook(fail)
    try:
        with pytest.raises(type(error)): reconstruct_background(model, draft, steps=5)
    finally: hook.remove()
    assert unchanged(model, before)

def test_the_decoder_is_given_back_when_the_film_is_left(model, scene, draft):
    before = weights(model)
    with closing(tune_background(model, draft.raw, scene.image, box(), steps=5)) as film:
        next(film), next(film)
        assert not unchanged(model, before)
    assert unchanged(model, before)

@pytest.mark.parametrize('spot', [(0,0,40,50),(30,40,90,128),(0,0,128,128),(50,50,51,51)])
def test_poisson_is_aligned(scene, spot):
    m = np.zeros((128,128), np.float32); x0,y0,x1,y1 = spot; m[y0:y1,x0:x1] = 1
    assert abs(array(poisson(scene.image, scene.image, m))-array(scene.image)).max()<=2
    assert np.array_equal(poisson(scene.image, scene.image, 0*m), scene.image)

def test_seam_error():
    edit, m = Image.new('RGB', (32,32), (100,100,100)), box(32,32)
    assert seam_error(edit, edit, m)==0 and seam_error(Image.new('RGB', (32,32)), edit, m)==0 # all of one piece
    pasted = array(edit); pasted[m==0] += 7
    assert seam_error(Image.fromarray(pasted.astype(np.uint8)), edit, m)==7 and seam_error(edit, edit, 0*m)==0
