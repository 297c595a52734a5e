"Borrowed weights, the fit loop and what is kept of it, on a small random UNet."
from dataclasses import replace

import pytest, torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from diffedit_lab.schedule import gaussian, noised
from diffedit_lab.tuning import batches, borrowed, differences, fit, generate, has_bfloat16, in_single, learning, noise_loss, numbers, rates, recomputed, wearing

def small_unet(width=8, text=96):
    "A UNet in Stable Diffusion's shape with random weights."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(sample_size=32, block_out_channels=(width,2*width,2*width), layers_per_block=1, norm_num_groups=4, attention_head_dim=4, cross_attention_dim=text,
            down_block_types=('DownBlock2D','CrossAttnDownBlock2D','CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D','CrossAttnUpBlock2D','UpBlock2D')).eval().requires_grad_(False)

def small_vae():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(down_block_types=('DownEncoderBlock2D',)*3, up_block_types=('UpDecoderBlock2D',)*3, block_out_channels=(4,4,4), norm_num_groups=2, latent_channels=4).eval().requires_grad_(False)

@pytest.fixture
def small(model): return replace(model, unet=small_unet(), vae=small_vae(), rows=0)

def state(net): return [(n, p.data_ptr(), p.dtype, p.requires_grad, p.grad, p.clone()) for n,p in net.named_parameters()], [m.training for m in net.modules()]
def same(a, b): return a[1]==b[1] and all(x[:4]==y[:4] and (x[4] is y[4]) and torch.equal(x[5], y[5]) for x,y in zip(a[0], b[0]))

@pytest.mark.parametrize('error', [None, RuntimeError, KeyboardInterrupt])
def test_borrowed_weights_come_back(error):
    net = small_unet(); net.conv_in.train(); net.conv_out.weight.requires_grad_(True); net.conv_out.weight.grad = torch.ones_like(net.conv_out.weight)
    before = state(net)
    def ruin():
        with borrowed(net) as weights:
            net.train().requires_grad_(True)
            for p in weights.values(): p.data.mul_(2); p.grad = torch.ones_like(p)
            assert not same(before, state(net))
            if error: raise error
    if error:
        with pytest.raises(error): ruin()
    else: ruin()
    assert same(before, state(net))

def test_borrowing_in_borrowing():
    net = small_unet(); before = state(net)
    with borrowed(net, ['conv_in.bias']) as outer:
        outer['conv_in.bias'].data += 1; inside = state(net)
        with borrowed(net) as inner:
            for p in inner.values(): p.data.zero_()
        assert same(inside, state(net))
    assert same(before, state(net))

def test_unknown_names_are_told():
    with pytest.raises(ValueError, match="no parameter 'nose'"):
        with borrowed(small_unet(), ['nose']): pass

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_learns_in_single(dtype):
    net = small_unet().to(dtype); before, names = state(net), ['conv_out.weight','conv_out.bias']
    with in_single(net): assert {p.dtype for p in net.parameters()}=={torch.float32}
    with learning(net, names) as weights:
        assert {p.dtype for p in net.parameters()}=={torch.float32} and [n for n,p in net.named_parameters() if p.requires_grad]==list(weights)==names
    assert same(before, state(net))

def test_double_precision_stays():
    net = small_unet().double()
    with learning(net, ['conv_out.bias']) as weights: assert {p.dtype for p in net.parameters()}=={torch.float64} and len(weights)==1

def run(model, updates=2, batch=6, micro=2, seed=0, **words):
    "Train the decoder's last block and an embedding; losses, both afterwards."
    z, names = gaussian((1,4,16,16), 3), [n for n,_ in model.unet.named_parameters() if 'up_blocks.2' in n]
    e = torch.nn.Parameter(model.embed('a horse on grass').clone())
    with learning(model.unet, names) as weights:
        losses = fit(noise_loss(model, z, lambda: e), [(weights.values(), 1e-3), ([e], 1e-2)], batches(z.shape, batch, seed), updates, micro, **words)
        return losses, torch.cat([p.detach().flatten() for p in weights.values()]), e.detach()

def test_portions_give_the_same_step(small):
    whole, *others = [run(small, micro=m) for m in (6, 1, 4)]
    for o in others:
        assert max(abs(a-b) for a,b in zip(whole[0], o[0]))<1e-5
        assert (whole[1]-o[1]).abs().median()<1e-6 and (whole[2]-o[2]).abs().median()<1e-5
    assert small.rows==3*2*6

def test_large_attention_is_computed_twice_for_the_same_gradient_and_only_inside():
    net, calls = small_unet().requires_grad_(True), []
    blocks = [m for n,m in net.named_modules() if n.endswith('transformer_blocks.0')] # over 8 x 8 places: three; over 4 x 4: three
    for m in blocks: m.register_forward_pre_hook(lambda m, x: calls.append(x[0].shape[1]))
    x, c = gaussian((1,4,16,16), 3), gaussian((1,8,96), 4)
    def gradient():
        calls.clear(); net.zero_grad(); net(x, 500, c).sample.square().mean().backward()
        return sorted(calls), {n: p.grad.clone() for n,p in net.named_parameters()}
    once, plain = gradient()
    with recomputed(net, 64): twice, again = gradient()
    assert twice==sorted(once+[n for n in once if n>=64]) and 0<once.count(64)<len(once)
    assert all(torch.equal(plain[n], again[n]) for n in plain)
    with pytest.raises(KeyboardInterrupt), recomputed(net, 1): raise KeyboardInterrupt
    assert not net.is_gradient_checkpointing and gradient()[0]==once

@pytest.mark.parametrize('able', [False, True])
def test_mixed_precision_where_the_device_has_it(small, monkeypatch, able):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: dict(avx512_bf16=able), raising=False)
    assert has_bfloat16(torch.device('cpu'))==able and not has_bfloat16(torch.device('meta'))
    z, c = gaussian((1,4,16,16), 3), small.embed('a horse on grass'); e, t = next(batches(z.shape, 4))
    exact, mixed = (noise_loss(small, z, lambda: c, m)(e, t) for m in (False, True))
    assert mixed.dtype==torch.float32 and (exact!=mixed)==able and abs(exact-mixed)<.01*exact

def test_seeds_repeat_and_the_global_generator_is_left_alone(small):
    torch.manual_seed(5); before = torch.get_rng_state()
    a,b,c = run(small), run(small), run(small, seed=1)
    assert torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) and a[0]==b[0] and not torch.equal(a[1], c[1])
    assert torch.equal(torch.get_rng_state(), before)

def test_learns_for_a_caller_without_gradients(small):
    with torch.no_grad(): losses, weights, _ = run(small)
    assert torch.equal(weights, run(small)[1])

def test_learning_lowers_the_loss(small):
    losses, *_ = run(small, updates=40, batch=8, micro=8)
    assert sum(losses[-5:]) < .9*sum(losses[:5])

@pytest.mark.parametrize('batch,budget,losses,updates', [(10,400,37,36), (4,400,89,88), (10,500,37,36), (10,350,35,35)])
def test_early_stop_as_recorded(batch, budget, losses, updates):
    "Below 0.03 and past 350 rows, before the update: recorded from the original with its loss held near zero."
    w = torch.nn.Parameter(torch.zeros(1)); steps = []
    def loss(noise, times): steps.append(w.item()); return 1e-3*w.sum()
    assert len(fit(loss, [([w], 1.)], batches((1,1,2,2), batch), budget//batch, batch, stop=(.03,350)))==losses
    assert round(-w.item())==updates

def test_v_prediction_is_fitted_as_noise(small):
    v = replace(small, schedule=replace(small.schedule, prediction='v_prediction'))
    z, (e,t) = gaussian((1,4,16,16), 3), next(batches((1,4,16,16), 3))
    c, a = v.embed(''), v.schedule[t].float()
    zt = noised(z, e, a)
    with torch.no_grad(): out = v.unet(zt, t, c.expand(3,-1,-1)).sample
    assert torch.allclose(noise_loss(v, z, lambda: c)(e, t), ((a.sqrt()*out+(1-a).sqrt()*zt-e)**2).mean(), atol=1e-6)

def test_differences_are_put_on_and_taken_off():
    net = small_unet(); before = {n: p.data for n,p in net.named_parameters()}
    with learning(net, ['conv_in.weight','conv_in.bias','conv_out.bias']) as w:
        w['conv_in.weight'].data += 3e-3*torch.randn(w['conv_in.weight'].shape, generator=torch.Generator().manual_seed(0)); w['conv_out.bias'].data += 1e-6
        tuned, learned = {n: p.detach().clone() for n,p in w.items()}, differences(w, before)
    assert list(learned)==['conv_in.weight','conv_out.bias'] and {d.dtype for d in learned.values()}=={torch.float16}
    kept = state(net)
    with wearing(net, learned):
        for n in learned: assert ((net.get_parameter(n)-tuned[n]).abs() <= (tuned[n]-before[n]).abs()*2**-10+1e-8).all()
    with wearing(net, learned, lambda n: 0): assert same(kept, state(net))
    with wearing(net, learned, lambda n: .3 if 'in' in n else 0):
        assert torch.allclose(net.conv_in.weight, .3*tuned['conv_in.weight']+.7*before['conv_in.weight'], atol=1e-6) and torch.equal(net.conv_out.bias, before['conv_out.bias'])
    assert same(kept, state(net))

def test_what_is_forgotten_may_be_broken():
    "The original computes 0*learned + 1*pretrained, which keeps a NaN."
    net = small_unet()
    with wearing(net, {'conv_in.bias': torch.full((8,), float('nan'))}, lambda n: 0.): assert net.conv_in.bias.isfinite().all()

def test_rates_of_stable_diffusion_are_its_own(model):
    wide = replace(model, unet=type('UNet', (), dict(config=type('C', (), dict(block_out_channels=(320,640,1280,1280), cross_attention_dim=768))))())
    assert rates(wide, 6e-5, 1e-3)==(6e-5, 1e-3)

def test_generate_is_one_picture_an_embedding(small):
    c = small.embed(['a horse on grass','a zebra on grass','a cat on sand','a dog on sand','a car at night'])
    z = generate(small, (1,4,16,16), c, 2, 3.)
    assert z.shape==(5,4,16,16) and small.rows==5*2*2
    assert (z[4:]-generate(small, (1,4,16,16), c[4:], 2, 3.)).abs().max()<1e-4

def test_numbers():
    rule, _ = numbers(0, 2)
    assert [rule(x) for x in (1, 0., [.1,2], (1,), [], 3, [1,3], True, None, 'x', ['x'])]==[True]*4+[False]*7
