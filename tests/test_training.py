"The training recipes in small: the loss falls, a second call goes on, a stop leaves no harm, and what is saved loads elsewhere."
import json

import numpy as np, pytest, torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer

from diffedit_lab.model import load, load_clip
from diffedit_lab.train.classifier import train_classifier
from diffedit_lab.train.clip import bend, new_clip, new_tokenizer, polish_clip, train_clip, wear
from diffedit_lab.train.codec import MuonAdam, encode_world, fit, new_codec, pixels, polish_codec, read_codec, train_codec, world
from diffedit_lab.train.unet import PROBE, halved, loss_weight, new_unet, train_unet

SCENES = dict(scenes=16, device='cpu')
CODEC = dict(batch=4, widths=(8,8,16), check=1)
CLIP = dict(batch=16, text=32, vision=40, layers=(1,1), check=2)
UNET = dict(batch=8, widths=(16,16,32), check=PROBE[:2])

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Every recipe, called twice; the global generator must not notice."
    d, logs = tmp_path_factory.mktemp('training'), {}
    rng = torch.get_rng_state()
    def twice(name, recipe, few, many, *args, **kwargs):
        first = recipe(d/name, *args, d/f'{name}_work', steps=few, **kwargs)
        logs[name] = first, recipe(d/name, *args, d/f'{name}_work', steps=many, **kwargs)
    twice('vae', train_codec, 8, 24, **SCENES, **CODEC)
    twice('clip', train_clip, 10, 40, **SCENES, **CLIP)
    twice('vae2', polish_codec, 10, 40, d/'vae', **SCENES, lr=.01, check=1)
    twice('clip2', polish_clip, 10, 40, d/'clip', **SCENES, batch=16, lr=3e-3, check=2)
    twice('classifier', train_classifier, 10, 40, **SCENES, batch=16, widths=(32,32), check=2)
    twice('tiny', train_unet, 8, 40, d/'vae', d/'clip', **SCENES, **UNET)
    assert torch.equal(rng, torch.get_rng_state())
    return d, logs

STEPS = dict(vae=[8,24], clip=[10,40], vae2=[10,40], clip2=[10,40], classifier=[10,40], tiny=[6,30])

@pytest.mark.parametrize('name', STEPS)
def test_loss_falls_and_a_second_call_goes_on(made, name):
    d, logs = made
    first, log = logs[name]
    assert [r['step'] for r in log] == STEPS[name] and log[:1] == first
    assert log[1]['loss'] < log[0]['loss']
    work = d/('tiny_work128' if name=='tiny' else f'{name}_work')
    assert json.loads((work/'log.json').read_text()) == log
    assert torch.load(work/'checkpoint.pt', weights_only=True)['step'] == STEPS[name][1]
    assert not list(d.rglob('*.part*'))

def test_codec_folder(made):
    vae = AutoencoderKL.from_pretrained(made[0]/'vae', low_cpu_mem_usage=False)
    z = vae.encode(pixels(world(8)[1])).latent_dist.mean*vae.config.scaling_factor
    assert z.shape == (8,4,32,32) and .8 < z.std() < 1.2
    assert load_file(made[0]/'vae'/'diffusion_pytorch_model.safetensors')['encoder.conv_in.weight'].dtype == torch.float16

def test_clip_folder(made):
    net, tok = CLIPModel.from_pretrained(made[0]/'clip'), CLIPTokenizer.from_pretrained(made[0]/'clip')
    assert tok.tokenize('a horse in front of a brick wall') == [w+'</w>' for w in 'a horse in front of a brick wall'.split()]
    assert net.config.text_config.vocab_size == len(tok)
    assert load_clip(made[0]/'clip', 'cpu').text(['a horse on grass', 'at night']).shape == (2,96)

def test_pipeline_folder(made):
    pipe = StableDiffusionPipeline.from_pretrained(made[0]/'tiny', low_cpu_mem_usage=False); pipe.set_progress_bar_config(disable=True)
    ours = load(str(made[0]/'tiny'), 'cpu')
    assert pipe('a horse on grass', num_inference_steps=2, height=128, width=128).images[0].size == (128,128)
    assert torch.allclose(ours.schedule.abar.float(), pipe.scheduler.alphas_cumprod, atol=1e-5)
    assert len(list((made[0]/'tiny_work128').glob('samples_*.jpg'))) >= 1

def changed(d, old, new, file):
    a, b = load_file(d/old/file), load_file(d/new/file)
    assert a.keys() == b.keys()
    return {k.split('.')[0] for k in a if not torch.equal(a[k], b[k])}

def test_polish_keeps_what_others_stand_on(made):
    d = made[0]
    assert {'encoder','decoder'} <= changed(d, 'vae', 'vae2', 'diffusion_pytorch_model.safetensors')
    old, new = (encode_world(read_codec(d/n, 'cpu'), world(8)[1]).astype(np.float32) for n in ('vae','vae2'))
    assert 0 < np.sqrt(np.square(new-old).mean()) < .5*old.std()
    assert changed(d, 'clip', 'clip2', 'model.safetensors') == {'vision_model','visual_projection'}
    assert read_codec(d/'vae', 'cpu').config.scaling_factor == read_codec(d/'vae2', 'cpu').config.scaling_factor

# -- the loop

def points(net, rng): x = torch.from_numpy(rng.standard_normal((8,2), dtype=np.float32)); return ((net(x)-x.sum(1, keepdim=True))**2).mean()
def line(): torch.manual_seed(0); return torch.nn.Linear(2,1)
def adam(ps): return torch.optim.AdamW(ps, .05)

@pytest.mark.parametrize('stop', [1,7,19])
def test_interrupted_run_ends_with_the_same_weights(tmp_path, stop):
    whole, broken, calls = line(), line(), []
    def stopping(net, rng):
        calls.append(1)
        if len(calls)>stop: raise KeyboardInterrupt
        return points(net, rng)
    fit(whole, points, tmp_path/'a', steps=20, optimizer=adam)
    with pytest.raises(KeyboardInterrupt): fit(broken, stopping, tmp_path/'b', steps=20, optimizer=adam)
    log = fit(broken, points, tmp_path/'b', steps=20, optimizer=adam)
    assert [r['step'] for r in log] == [stop,20] and torch.equal(whole.weight, broken.weight)

def test_failure_keeps_the_last_checkpoint(tmp_path):
    fit(line(), points, tmp_path, steps=5, optimizer=adam)
    with pytest.raises(FloatingPointError, match='lower the learning rate'): fit(line(), lambda net,rng: points(net,rng)*float('nan'), tmp_path, steps=9, optimizer=adam)
    assert [r['step'] for r in fit(line(), points, tmp_path, steps=7, optimizer=adam)] == [5,7]

def test_frozen_parameters_stay_out_of_the_optimizer(tmp_path):
    net, seen = line(), []
    net.bias.requires_grad_(False); bias = net.bias.clone()
    def optimizer(ps): seen.extend(ps); return adam(seen)
    fit(net, points, tmp_path, steps=5, optimizer=optimizer)
    assert len(seen) == 1 and seen[0] is net.weight and torch.equal(net.bias, bias)

def test_minutes_are_a_budget_too(tmp_path):
    log = fit(line(), points, tmp_path, minutes=.005, optimizer=adam, report=lambda net,minutes: dict(seen=minutes))
    assert log[-1]['minutes'] >= .005 and log[-1]['seen'] == log[-1]['minutes']
    assert fit(line(), points, tmp_path, minutes=.005, optimizer=adam) == log

def test_bad_budgets_and_foreign_checkpoints(tmp_path):
    with pytest.raises(ValueError, match='^minutes: '): fit(line(), points, tmp_path, optimizer=adam)
    fit(line(), points, tmp_path, steps=1, optimizer=adam)
    with pytest.raises(ValueError, match='^work: '): fit(torch.nn.Linear(3,1), points, tmp_path, steps=2, optimizer=adam)

# -- the parts

def test_world_is_kept_and_drawn_alike(tmp_path):
    captions, pictures = world(5, tmp_path)
    again, kept = world(5, tmp_path)
    assert captions == again == world(5)[0] and np.array_equal(pictures, kept) and pictures.shape == (5,128,128,3)

def test_latents_of_another_codec_are_replaced(tmp_path):
    _, pictures = world(5)
    a, b = new_codec((8,8,8)), new_codec((8,8,16))
    first = np.array(encode_world(a, pictures, tmp_path/'z.npy'))
    assert np.array_equal(first, encode_world(a, pictures, tmp_path/'z.npy'))
    assert not np.array_equal(first, encode_world(b, pictures, tmp_path/'z.npy'))
    assert len(encode_world(b, pictures[:4], tmp_path/'z.npy')) == 4

def test_muon_moves_convolutions_in_place():
    net = new_unet((32,32,32)); opt = MuonAdam(net.parameters())
    before = {n: p.detach().clone() for n,p in net.named_parameters()}
    net(torch.ones(1,4,8,8), 3, torch.ones(1,2,96)).sample.pow(2).mean().backward(); opt.step()
    still = {n for n,p in net.named_parameters() if p.grad.abs().max()>0 and torch.equal(p, before[n])}
    assert not still and len(opt.big) > 20
    with pytest.raises(ValueError, match='channels_last'): MuonAdam(torch.nn.Conv2d(64,64,3).parameters())

def test_running_codecs_layout():
    "The names in a checkpoint: those of the real run's nets."
    assert {'encoder.conv_in.weight','quant_conv.weight','decoder.conv_out.weight'} <= new_codec().state_dict().keys()
    assert {'text_projection.weight','visual_projection.weight','logit_scale'} <= new_clip(new_tokenizer()).state_dict().keys()

def test_loss_weight_is_continuous_and_bounded():
    ab = torch.linspace(.001, .999, 2000)
    w = loss_weight(ab)
    assert w.max() <= 10 and (w[1:] <= w[:-1]+1e-6).all() and torch.allclose(loss_weight(ab, boost=1), (5*(1-ab)/ab).clamp(max=1))

def test_damage_and_halved():
    _, pictures = world(3)
    x, rng = pixels(pictures).contiguous(), np.random.default_rng
    assert torch.allclose(bend(x, rng(0), turn=0, grow=0, shift=0, wave=0), x, atol=1e-4)
    assert torch.equal(wear(bend(x, rng(0)), rng(1)), wear(bend(x, rng(0)), rng(1))) and (wear(x, rng(1))-x).abs().max() > .01
    assert halved(pictures).shape == (3,64,64,3) and np.array_equal(halved(np.repeat(np.repeat(pictures,2,1),2,2)), pictures)
