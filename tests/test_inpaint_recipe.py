"The inpainting recipe in small: new channels begin at zero, masks of every kind, the loss falls, and what is saved loads elsewhere."
import json
from dataclasses import replace

import numpy as np, pytest, torch
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel

from diffedit_lab.methods.fast_diffedit import fast_diffedit
from diffedit_lab.model import load
from diffedit_lab.scenes import scene as of
from diffedit_lab.schedule import gaussian
from diffedit_lab.train.codec import encode_world, pixels, world
from diffedit_lab.train.inpaint import MASKS, inpaint_loss, masked_latents, noise_error, random_mask, train_inpaint, widen
from diffedit_lab.train.unet import embed_captions, loss_weight, new_unet, save_pipeline

QUICK = dict(scenes=16, batch=4, check=1, device='cpu')

@pytest.fixture(scope='module')
def made(model, tmp_path_factory):
    "The recipe from a small untrained UNet, called twice; the global generator must not notice."
    d, rng = tmp_path_factory.mktemp('inpaint'), torch.get_rng_state()
    save_pipeline(d/'small', replace(model, unet=new_unet((8,16,16))))
    first = train_inpaint(d/'small-inpainting', d/'small', d/'work'/'inpaint', steps=6, **QUICK)
    log = train_inpaint(d/'small-inpainting', d/'small', d/'work'/'inpaint', steps=30, **QUICK)
    assert torch.equal(rng, torch.get_rng_state())
    return d, first, log

def test_loss_falls_and_a_second_call_goes_on(made):
    d, first, log = made
    assert [r['step'] for r in log] == [6,30] and log[:1] == first and log[1]['loss'] < log[0]['loss']
    assert {'objects','backgrounds'} <= log[0].keys() and json.loads((d/'work'/'inpaint'/'log.json').read_text()) == log
    assert len(list((d/'work'/'inpaint').glob('samples_*.jpg'))) >= 1 and not list(d.rglob('*.part*'))

def test_the_folder_opens_everywhere(made, scene):
    ours = load(made[0]/'small-inpainting', 'cpu')
    pipe = StableDiffusionInpaintPipeline.from_pretrained(made[0]/'small-inpainting', low_cpu_mem_usage=False); pipe.set_progress_bar_config(disable=True)
    assert ours.channels == pipe.unet.config.in_channels == 9
    assert pipe('a zebra on grass', image=scene.image, mask_image=scene.mask, num_inference_steps=2, height=128, width=128).images[0].size == (128,128)
    e = fast_diffedit(load(made[0]/'small', 'cpu'), scene.image, target='a zebra on grass', mask=scene.mask, inpainter=ours, steps=2)
    assert e.rows == 4

def test_a_small_model_finds_its_twin(made):
    "`sibling` looks for NAME-inpainting beside the model."
    from diffedit_lab.model import sibling
    assert sibling(load(made[0]/'small', 'cpu'), 'inpainting').channels == 9

def test_only_four_channels_begin(made):
    with pytest.raises(ValueError, match='^start: .*9 channels'): train_inpaint(made[0]/'no', made[0]/'small-inpainting', made[0]/'work'/'no', steps=1, **QUICK)

# -- channels

@pytest.mark.parametrize('channels', [8,9])
def test_new_channels_begin_at_zero(model, channels):
    net = widen(model.unet, channels); nine = replace(model, unet=net)
    z, c = gaussian((2,4,32,32)), model.embed(['a horse on grass','at night'])
    with torch.no_grad():
        old = model.eps(z, 700, c, 3.)
        new = [nine.eps(z, 700, c, 3., extra=x) for x in (torch.zeros(1,channels-4,32,32), gaussian((1,channels-4,32,32), 1))]
    assert torch.equal(*new) and (old-new[0]).abs().max() < 1e-4
    assert net.conv_in.weight is not model.unet.conv_in.weight
    assert model.unet.config.in_channels == 4 and net.config.in_channels == channels

def test_widening_half_precision_and_narrowing(model):
    half = UNet2DConditionModel.from_config(new_unet((8,8,8)).config).half()
    assert widen(half, 9).dtype == torch.float16
    with pytest.raises(ValueError, match='^channels must be more'): widen(half, 4)

# -- masks

def test_masks(scene):
    rng = np.random.default_rng(1)
    kinds = {k: [random_mask(rng, scene, k) for _ in range(40)] for k in MASKS}
    for k,ms in kinds.items(): assert all(m.shape==(128,128) and m.dtype==bool and m.any() and (m.all() if k=='full' else not m.all()) for m in ms), k
    true = np.asarray(scene.mask)>127
    assert min((m&true).sum()/true.sum() for m in kinds['object']) > .9
    cells = [np.array_equal(m, np.kron(m[::4,::4], np.ones((4,4), bool))) for m in kinds['object']]
    assert .2 < np.mean(cells) < .8
    assert abs(np.mean([random_mask(rng, scene).all() for _ in range(400)])-MASKS['full']) < .07
    assert random_mask(rng, None, 'object').any() and random_mask(rng, of('grass'), 'object').any()
    assert np.array_equal(random_mask(np.random.default_rng(3), scene), random_mask(np.random.default_rng(3), scene))

def test_masked_latents_are_what_inpaint_shows(model, scene):
    "Mask first, then the scaled latents of the picture with a grey hole; equal to one by one, whatever is in the batch."
    _, pictures = world(3)
    ms = np.stack([random_mask(np.random.default_rng(i), scene, k) for i,k in enumerate(('full','box','full'))])
    seen = masked_latents(model, pictures, ms)
    assert seen.shape == (3,5,32,32) and torch.equal(seen[0], seen[2])
    assert torch.equal(seen[:,0], torch.from_numpy(ms[:,::4,::4]).float())
    true = model.encode(pixels(pictures[1:2])*(1-torch.from_numpy(ms[1:2])[:,None].float()))
    assert (seen[1:2,1:]-true).abs().max() < .1*true.std()   # half precision

def test_noise_error_by_hand(model):
    class Net(torch.nn.Module):
        def forward(self, x, t, c): self.sample = x[:,:4]*0+1; return self
    x0, e = gaussian((2,4,8,8)), gaussian((2,4,8,8), 1)
    m = torch.zeros(2,1,8,8); m[...,:4] = 1
    w = loss_weight(model.schedule.abar[[100,800]])
    got = noise_error(Net(), x0, e, [100,800], None, model.schedule, torch.zeros(2,5,8,8), m)
    assert torch.allclose(got, (((1-e)**2)[...,:4].mean((1,2,3))*w).mean(), rtol=1e-4)
    assert torch.allclose(noise_error(Net(), x0, e, [100,800], None, model.schedule), (((1-e)**2).mean((1,2,3))*w).mean(), rtol=1e-4)

def test_batches_repeat(model):
    "The same step draws the same batch, and the global generators are left alone."
    captions, pictures = world(6)
    loss = inpaint_loss(model, pictures, encode_world(model.vae, pictures), embed_captions(model, captions), model.embed('')[0], batch=4)
    net = widen(new_unet((8,8,8)), 9); before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    with torch.no_grad(): a, b, other = (loss(net, np.random.default_rng(k)).item() for k in (1,1,2))
    assert a == b != other and np.random.get_state()[1].tolist() == before[0] and torch.equal(torch.get_rng_state(), before[1])
