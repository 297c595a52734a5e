"Prompt-to-Prompt: the picture is kept where it should be, words are checked before anything is walked, drawn and given pictures."
import numpy as np, pytest, torch

from diffedit_lab.attention import carry
from diffedit_lab.loops import denoise, invert
from diffedit_lab.methods.prompt_to_prompt import generate_and_edit, prompt_to_prompt, walk_together
from diffedit_lab.schedule import CLEAN, gaussian, path

HORSE, ZEBRA, T = 'a horse on grass', 'a zebra on grass', 4

@pytest.fixture(scope='module')
def way(model, scene):
    "The path of the scene: times, latents on the way up."
    times = path(model.schedule, T)
    return times, invert(model, model.encode(scene.image), times, model.embed(HORSE))

def walked(model, way, texts, up=None, **how):
    times, known = way
    return walk_together(model, carry(model, texts, T, **how), known if up is None else up, model.embed(texts), times)

def pixels(im): return np.asarray(im).astype(int)

def test_the_source_row_is_the_picture_and_the_blend_keeps_the_rest(model, way):
    z,seen = walked(model, way, [HORSE, ZEBRA, 'a horse on snow'], blend=('horse','zebra'), threshold=.6)
    z0 = way[1][CLEAN]
    assert torch.equal(z[:1], z0) and seen.mask.shape==(3,1,*z0.shape[2:]) and not seen.mask.all()
    for k in (1,2): assert torch.equal(torch.where(seen.mask[k], z0[0], z[k]), z0[0]) and (z[k]-z0[0])[:,seen.mask[k,0]].abs().max()>1e-3

def test_one_text_twice_is_one_picture(model, way):
    "A target equal to its source has the source's maps and becomes the source, whatever is carried."
    top = {way[0][-1]: way[1][way[0][-1]]}
    z,_ = walked(model, way, [HORSE, HORSE], top, cross=1, self_=1)
    assert (z[0]-z[1]).abs().max()<1e-3
    assert (denoise(model, top[way[0][-1]], model.embed(HORSE), way[0])-z[:1]).abs().max()<.02*z.abs().max()

def test_carrying_changes_the_target_alone(model, way):
    top = {way[0][-1]: way[1][way[0][-1]]}
    free,_ = walked(model, way, [HORSE, ZEBRA], top, cross=0, self_=0)
    for how in (dict(self_=0), dict(cross=0), dict(cross={'default_':0, 'zebra':1}, self_=0), dict(cross=0, self_=0, empty=1), dict(factors={'zebra':3}, self_=0)):
        z,_ = walked(model, way, [HORSE, ZEBRA], top, **how)
        assert (z[0]-free[0]).abs().max()<1e-3<(z[1]-free[1]).abs().max(), how

def test_several_targets_are_one_batch(model, scene):
    texts = [ZEBRA, 'a watercolor of a horse on grass']
    e = prompt_to_prompt(model, scene.image, source=HORSE, target=texts, steps=T, blend='horse')
    assert e.rows==T+2*3*T and e.variants[0] is e and [v.settings['target'] for v in e.variants]==texts
    assert e.mask is not None and 0<=e.heat.min() and e.heat.max()<=1 and (pixels(e.variants[0].raw)!=pixels(e.variants[1].raw)).any()
    assert np.array_equal(pixels(e.recut(threshold=.3).mask), pixels(e.mask))

def test_without_guidance_half_the_rows(model, scene):
    assert prompt_to_prompt(model, scene.image, source=HORSE, target=ZEBRA, steps=T, guidance=1.).rows==T+2*T

@pytest.mark.parametrize('words,what', [
    (dict(self_=1.2), '^self_ must be a share'), (dict(cross=(.5,.2)), '^cross must be a share'), (dict(cross={'zebra':2}), '^cross must be'), (dict(cross={'cow':.5}), "^no word 'cow' in"),
    (dict(edit='swap'), "^edit must be 'auto'"), (dict(edit='replace', target='a big zebra on grass'), '^replace needs texts of equally many words'), (dict(factors={'cow':2}), "^no word 'cow' in"),
    (dict(factors={'zebra':'2'}), "^the factor of 'zebra' must be"), (dict(factors=[{}]*2), '^factors must be one dict'), (dict(factors=2), '^factors must be a dict'), (dict(blend='cow'), "^no word 'cow' in"), (dict(blend=''), '^blend must be a word'),
    (dict(subtract='grass'), '^subtract takes words out of a blend'), (dict(target=[]), '^target must be a text such as'), (dict(target=[ZEBRA, 3]), '^target must be'), (dict(drawn=-1), '^drawn must be'), (dict(start=2), '^start must be in'), (dict(threshold=2), '^threshold must be')])
def test_wrong_words_are_told_before_anything_is_walked(model, scene, words, what):
    before = model.rows
    with pytest.raises(ValueError, match=what): prompt_to_prompt(model, scene.image, **dict(source=HORSE, target=ZEBRA)|words)
    assert model.rows==before

def test_what_the_original_forgives_as_published(model, scene):
    "Missing words change nothing; whole shares stop the original, not us."
    old = [prompt_to_prompt(model, scene.image, source=HORSE, target=ZEBRA, steps=2, as_published=True, **w) for w in ({}, dict(factors={'cow':9}, cross={'cow':.1, 'default_':.8}))]
    assert np.array_equal(pixels(old[0].raw), pixels(old[1].raw))
    prompt_to_prompt(model, scene.image, source=HORSE, target='A  Zebra, on grass', steps=2, cross=1, self_=0, factors={'zebra':2}, blend=('HORSE','zebra'))

def test_drawn_pictures(model, scene):
    e = generate_and_edit(model, source=HORSE, target=[ZEBRA], seed=5, steps=T, blend=('horse','zebra'))
    times = path(model.schedule, T)
    z = denoise(model, gaussian((1,4,32,32), 5), model.embed(HORSE), times)
    assert np.array_equal(pixels(e.source_image), pixels(model.decode(z))) and e.rows==2*2*T and e.settings['drawn']==5 and e.method=='prompt_to_prompt'
    again = generate_and_edit(model, source=HORSE, target=[ZEBRA], seed=5, steps=T, blend=('horse','zebra'))
    assert np.array_equal(pixels(e.raw), pixels(again.raw))
    with pytest.raises(ValueError, match='^drawn=5: with this seed'): prompt_to_prompt(model, 255-pixels(e.source_image).astype(np.uint8), source=HORSE, target=ZEBRA, drawn=5, steps=T)
