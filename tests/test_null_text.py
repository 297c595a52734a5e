"""Null-text inversion where it is no lesson: rates, early stops, failures in the middle, half precision. Small latents, to be quick."""
from unittest.mock import patch

import pytest, torch

from diffedit_lab import load
from diffedit_lab.loops import denoise, invert
from diffedit_lab.methods.null_text import fit_null_text, learn_null_text
from diffedit_lab.schedule import ddim, gaussian, path

def pivot(model, steps, B=1):
    c, times = model.embed('a horse on grass'), path(model.schedule, steps)
    return invert(model, .5*gaussian((B,4,8,8), 1).to(model.device), times, c), c, times

def quiet(model): return all(p.grad is None and not p.requires_grad for net in (model.unet, model.text_encoder, model.vae) for p in net.parameters())

class Straight:
    "A model whose noise is its text: exact and quick."
    dtype = torch.float64
    def __init__(self, schedule): self.schedule = schedule
    def embed(self, text): return torch.full((1,1,1), .1*len(text), dtype=self.dtype)
    def eps(self, z, t, c, *rest): return c.mean((1,2)).reshape(-1,1,1,1).expand_as(z)

def rates(model, steps, **words):
    "Adam's rate at every step."
    m, seen, adam = Straight(model.schedule), [], torch.optim.Adam
    up = {t: torch.zeros(1,1,2,2, dtype=m.dtype) for t in path(m.schedule, steps)}
    with patch('torch.optim.Adam', lambda p, lr, **k: seen.append(lr) or adam(p, lr, **k)): list(fit_null_text(m, up, m.embed('ab'), iterations=1, **words))
    return torch.tensor(seen)

def test_rates_are_meant_for_fifty_steps(model):
    published = 1e-2*(1-torch.arange(50)/100)
    for words in ({}, dict(as_published=True)): assert torch.allclose(rates(model, 50, **words), published)
    assert torch.allclose(rates(model, 10), published[::5]) and torch.allclose(rates(model, 10, as_published=True), published[:10])
    assert len(rates(model, 150))==150 and rates(model, 150).min()>.005
    with pytest.raises(ValueError, match='as_published: the rate falls to 0 after 100 steps, got 101'): rates(model, 101, as_published=True)

def test_an_exact_answer_is_found(model):
    "One number to learn, and a step that is linear in it."
    m, times = Straight(model.schedule), path(model.schedule, 2)
    c, w, wish = m.embed('ab'), 7.5, .13
    z = torch.ones(1,1,2,2, dtype=m.dtype); up = {times[-1]: z}
    for t,s in zip(times[::-1], times[-2::-1]): z = up[s] = ddim(z, torch.full_like(z, wish+w*(.2-wish)), m.schedule[t], m.schedule[s])
    film = list(fit_null_text(m, dict(sorted(up.items())), c, w, iterations=400, tolerance=-1.))
    assert all(abs(null.item()-wish)<1e-4 for _,_,null,_ in film) and (film[-1][1]-up[times[0]]).abs().max()<1e-4

def test_early_stop_measures_before_the_step(model):
    up, c, times = pivot(model, 2)
    film = list(fit_null_text(model, up, c, iterations=5, tolerance=float('inf')))
    assert [len(losses) for *_,losses in film]==[1, 1]
    assert all((null-model.embed('')).abs().max()>1e-3 for _,_,null,_ in film)   # the one step was made all the same
    rows = model.rows; film = list(fit_null_text(model, up, c, iterations=2, tolerance=-1.))
    assert model.rows-rows==2*(2+2) and [len(losses) for *_,losses in film]==[2, 2]

def test_no_iterations_is_plain_guidance(model):
    up, c, times = pivot(model, 3, B=2)
    *_,(_,z,null,losses) = fit_null_text(model, up, c, iterations=0)
    assert losses==[] and torch.equal(null, model.embed('').expand(2,-1,-1))
    assert (z-denoise(model, up[times[-1]], c, times)).abs().max()<1e-3

@pytest.mark.parametrize('error', [KeyboardInterrupt(), RuntimeError('in the middle')], ids=repr)
def test_stopped_in_the_middle(model, error):
    "Ctrl-C while gradients are on: nothing is left on, nothing is left behind."
    up, c, _ = pivot(model, 2)
    calls = []
    def fail(*_):
        calls.append(torch.is_grad_enabled())
        if len(calls)==3: raise error
    hook = model.unet.register_forward_pre_hook(fail)
    try:
        with torch.no_grad(), pytest.raises(type(error)): list(fit_null_text(model, up, c, iterations=3))
    finally: hook.remove()
    assert calls==[False, True, True] and torch.is_grad_enabled() and quiet(model)

def test_it_learns_inside_no_grad(model):
    up, c, _ = pivot(model, 2)
    with torch.no_grad(): film = list(fit_null_text(model, up, c, iterations=3))
    assert all(losses[-1]<losses[0] for *_,losses in film) and quiet(model)
    assert not any(x.requires_grad for _,z,null,_ in film for x in (z, null))

def test_half_precision():
    "A mean would lose its gradient below float16's smallest number; the sum does not. The null texts stay in single precision."
    model = load(device='cpu', dtype=torch.float16)
    up, c, times = pivot(model, 2)
    f = learn_null_text(model, up[times[0]], 'a horse on grass', times, iterations=2)
    assert all(x.dtype==torch.float32 and torch.isfinite(x).all() for x in f.tensors.values())
    assert all(l[-1]<l[0] for l in f.facts['losses'])
    assert quiet(model)
