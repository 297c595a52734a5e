"The captioner: its recipe in small, what is saved opens with transformers' own classes, and the embedded one says what held-out scenes show."
import json

import numpy as np, pytest, torch
from safetensors.torch import load_file
from transformers import BlipForConditionalGeneration, BlipProcessor

from diffedit_lab import forgedit, load, load_clip
from diffedit_lab.methods.forgedit import caption, load_captioner
from diffedit_lab.model import _MODELS
from diffedit_lab.scenes import COLOURS, OBJECTS, STYLES, heldout, random_caption, scene as of
from diffedit_lab.train.captioner import caption_accuracy, caption_loss, facing, kind, new_captioner, new_processor, say, silent, tower_weights, train_captioner, unseen
from diffedit_lab.train.codec import pixels, world

QUICK = dict(scenes=16, batch=8, width=32, layers=1, check=4, lr=.01, device='cpu')
FOLDER = _MODELS/'tiny-captioner'
PLAIN = ('object','background','style','remove','pair')

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The recipe, called twice; the global generator must not notice."
    d, rng = tmp_path_factory.mktemp('captioner'), torch.get_rng_state()
    first = train_captioner(d/'blip', d/'work'/'captioner', steps=4, **QUICK)
    log = train_captioner(d/'blip', d/'work'/'captioner', steps=40, **QUICK)
    assert torch.equal(rng, torch.get_rng_state())
    return d, first, log

@pytest.fixture(scope='module')
def look(): return new_processor()

@pytest.fixture(scope='module')
def mute(judge, look): return new_captioner(look, judge, world(8)[1])

@pytest.fixture(scope='module')
def tiny(): return BlipForConditionalGeneration.from_pretrained(FOLDER).eval()

def test_loss_falls_and_a_second_call_goes_on(made):
    d, first, log = made
    assert [r['step'] for r in log] == [4,40] and log[:1] == first and log[1]['loss'] < log[0]['loss']-.1
    assert all(len(r['said'])==4 and {'exact','silent'} <= r.keys() for r in log)
    assert json.loads((d/'work'/'captioner'/'log.json').read_text()) == log and not list(d.rglob('*.part*'))

def test_the_folder_opens_as_any_blip(made, scene):
    net, reads = BlipForConditionalGeneration.from_pretrained(made[0]/'blip'), BlipProcessor.from_pretrained(made[0]/'blip')
    assert net.dtype == torch.float32 and load_file(made[0]/'blip'/'model.safetensors')['vision_model.post_layernorm.weight'].dtype == torch.float16
    words = reads.decode(net.generate(**reads(scene.image, return_tensors='pt'), max_new_tokens=30)[0], skip_special_tokens=True)
    assert words == load_captioner(str(made[0]/'blip'))(scene.image) and '[' not in words
    assert torch.allclose(reads(scene.image, return_tensors='pt').pixel_values, pixels(np.asarray(scene.image)[None]), atol=1e-5)

# -- the parts

def test_the_processor_knows_every_caption(look):
    rng, tok = np.random.default_rng(0), look.tokenizer
    longest = f"{STYLES['black and white photo']} a purple tractor facing right and a yellow mushroom facing left in front of a brick wall"
    for text in (longest, *(random_caption(rng) for _ in range(300))):
        ids = tok(text).input_ids
        assert tok.decode(ids, skip_special_tokens=True) == text and len(ids) <= 28 and tok.unk_token_id not in ids
    assert all(len(tok.tokenize(w))==1 for w in [*OBJECTS, *COLOURS])

def test_the_tower_still_sees(judge, mute):
    "The moved tower lays pictures close to where CLIP does, and closer than to any other picture."
    ims = [c.source.image for c in heldout(16)]
    with torch.no_grad(): b = torch.nn.functional.normalize(judge.net.visual_projection(mute.vision_model(judge.pixels(ims)).last_hidden_state[:,0]), dim=-1)
    cosine = judge.image(ims)@b.T
    assert (cosine.argmax(0)==torch.arange(16)).float().mean() > .9 and cosine.diagonal().mean() > .8
    assert {k: v.shape for k,v in tower_weights(judge, world(2)[1]).items()} == {k: v.shape for k,v in mute.vision_model.state_dict().items()}

def test_the_loss_repeats_and_ignores_padding(look, mute):
    captions, pictures = world(12)
    loss = caption_loss(captions, pictures, look.tokenizer, batch=6); before = torch.get_rng_state()
    with torch.no_grad():
        a, b, other = (loss(mute, np.random.default_rng(k)).item() for k in (1,1,2))
        assert a == b != other and torch.equal(torch.get_rng_state(), before)
        short = caption_loss(['grass']*12, pictures, look.tokenizer, batch=1)(mute, np.random.default_rng(0)).item()
        mixed = look.tokenizer(['grass','a horse on a wooden table'], padding=True, return_tensors='pt')
        x = pixels(pictures[:1]).repeat(2,1,1,1)
        rows = mute(pixel_values=x, **mixed).logits, mute(pixel_values=x[:1], **look.tokenizer(['grass'], return_tensors='pt')).logits
    assert short < 8 and torch.allclose(rows[0][:1,:3], rows[1], atol=1e-4)

def test_kinds():
    wanted = dict(facing='a red car facing left on grass', style='a watercolor of a cat and a dog on sand', empty='a wooden table', colour='a blue gift at night') | {'two objects': 'a cat and a dog on sand', 'one object': 'grapes on sand'}
    assert all(kind(of(c))==k for k,c in wanted.items())
    assert silent('a cat facing left and a dog facing right on sand') == 'a cat and a dog on sand' and silent('a cat on sand') == 'a cat on sand'
    scenes = unseen(300)
    assert {kind(s) for s in scenes} == set(wanted) and min(s.seed for s in scenes) > 10_000_000 and len({s.seed for s in scenes}) == 300

def test_accuracy_counts(mute, look, monkeypatch):
    "Exact, but for the direction, and by kind: on answers that are known."
    import diffedit_lab.train.captioner as lib
    scenes = [of(c) for c in ('a cat on sand','a dog on snow','a cat facing left on sand','grass')]
    monkeypatch.setattr(lib, 'say', lambda *_: ['a cat on sand','a cat on snow','a cat on sand','grass'])
    got = caption_accuracy(mute, look.tokenizer, scenes)
    assert got.pop('asked') in (0,1) and got == {'exact': .5, 'silent': .75, 'one object': .5, 'facing': 1, 'empty': 1}
    assert facing(mute, look.tokenizer, scenes[:2]) == []

# -- the embedded one

def test_it_is_small_and_whole():
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) < 6e6
    net, info = BlipForConditionalGeneration.from_pretrained(FOLDER, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys'] and all(p.isfinite().all() for p in net.parameters())

@pytest.mark.parametrize('what', PLAIN)
def test_it_says_what_held_out_scenes_show(tiny, look, what):
    cases = heldout(30, what)
    said = say(tiny, look.tokenizer, [c.source.image for c in cases])
    assert np.mean([t==c.source.caption for t,c in zip(said, cases)]) >= .9

def test_it_reads_scenes_of_all_kinds(tiny, look):
    got = caption_accuracy(tiny, look.tokenizer, unseen(100))
    assert got['silent'] >= .9 and got['empty'] >= .9 and got['asked'] >= .7
    assert say(tiny, look.tokenizer, [of('a horse on grass', seed=3).image], 'a horse facing')[0].startswith('a horse facing ')

def test_forgedit_asks_it(model, scene):
    asked = [caption(model, scene.image), caption(model, scene.image.resize((200,200))), caption(model, scene.image, 'A photo of a zebra.')]
    assert asked == ['a horse on grass', 'a horse on grass', 'A photo of a horse on grass']
    e = forgedit(model, scene.image, target='a zebra on grass', updates=1, batch=1, steps=1)
    assert e.fitted.facts['source'] == 'a horse on grass'

def test_it_does_not_draw():
    for f,name,says in ((load, 'tiny-captioner', 'forgedit asks it'), (load_clip, 'tiny-captioner', "use load_clip('tiny-clip')"), (load, 'tiny-classifier', 'use load_classifier()')):
        with pytest.raises(ValueError, match=name) as e: f(name)
        assert '\n' not in str(e.value) and says in str(e.value)
