"InstructPix2Pix: the method, its data and its training, on a small random network that does look at its picture."
import json, os, warnings

import numpy as np, pytest, torch
from dataclasses import replace
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image
from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel

from diffedit_lab import load, scene as make_scene
from diffedit_lab.instruct_data import *
from diffedit_lab.methods.instruct_pix2pix import ancestral, even_times, follow, instruct_pix2pix, published_size, real_times
from diffedit_lab.model import Model
from diffedit_lab.scenes import HELD_OUT, KINDS, PAINTED
from diffedit_lab.schedule import gaussian, noised
from diffedit_lab.train.codec import encode_world, fresh, world
from diffedit_lab.train.inpaint import wide_conv, widen
from diffedit_lab.train.instruct import Student, conditions, dropped, exact_pairs, folder_pairs, mixed, obeyed, train_instruct
from diffedit_lab.train.unet import new_unet, save_pipeline
from test_models import make, onto_cpu

ORDER = 'turn the horse into a zebra'

@pytest.fixture(scope='module')
def narrow(model):
    "The embedded parts around a small text-to-image UNet."
    return Model(new_unet((16,16,32)).eval().requires_grad_(False), model.vae, model.text_encoder, model.tokenizer, model.schedule, 'small')

@pytest.fixture(scope='module')
def small(narrow):
    "Widened, and with weights for the picture."
    unet = widen(narrow.unet, 8)
    with torch.no_grad(): unet.conv_in.weight[:,4:] = .1*gaussian(unet.conv_in.weight[:,4:].shape)
    return replace(narrow, unet=unet, rows=0)

def run(model, image, **words): return instruct_pix2pix(model, image, **dict(instruction=ORDER, steps=3) | words)
def pixels(im): return np.asarray(im).astype(int)
def same(a, b): return a.size==b.size and np.array_equal(pixels(a), pixels(b))

# -- two guidances

@torch.no_grad()
def test_guidance_is_linear_and_has_its_corners(small, scene):
    z, f = small.encode(scene.image), lambda t,i: follow(small, small.encode(scene.image), ORDER, t, i).eps(zt, 500)
    zt = noised(z, gaussian(z.shape), small.schedule[500])
    e = {k: small.eps(zt, 500, small.embed(text), extra=p/small.vae.config.scaling_factor) for k,(text,p) in dict(both=(ORDER,z), picture=('',z), none=('',0*z)).items()}
    close = lambda a,b: torch.allclose(a, b, atol=1e-4)
    assert not close(e['both'], e['picture']) and not close(e['picture'], e['none'])
    assert close(f(1,1), e['both']) and close(f(0,0), e['none']) and close(f(0,1), e['picture'])
    assert close(f(7.5,1.5), e['none']+1.5*(e['picture']-e['none'])+7.5*(e['both']-e['picture']))
    assert close(f(7.5,.5), (f(7.5,0)+f(7.5,1))/2)   # below 1 as above: diffusers turns all guidance off there

def test_several_pictures_and_orders_in_one_call(small, scene):
    ims, orders = [scene.image, scene.swap('snow').image], [ORDER, 'remove the horse']
    z = torch.cat([small.encode(im) for im in ims]); zt = gaussian(z.shape)
    with torch.no_grad():
        one = torch.cat([follow(small, z[i:i+1], orders[i]).eps(zt[i:i+1], 300) for i in range(2)])
        assert torch.allclose(follow(small, z, orders).eps(zt, 300), one, atol=1e-3)

@pytest.mark.parametrize('published', [False, True])
def test_rows_seeds_and_empty_masks(small, scene, published):
    words = dict(as_published=published, steps=4)
    a,b,c = (run(small, scene.image, seed=s, **words) for s in (0,0,1))
    assert a.rows==12 and same(a.image, b.image) and not same(a.image, c.image)
    empty = run(small, scene.image, mask=np.zeros((128,128)), paste=False, **words)
    assert same(empty.image, small.decode(small.encode(scene.image)))

def test_negative_fills_both_null_rows(small, scene):
    z = small.encode(scene.image); f = follow(small, z, ORDER, negative='a car')
    assert torch.equal(f.c[1:], small.embed('a car').expand(2,-1,-1)) and torch.equal(f.pictures[2:], 0*z) and torch.allclose(f.pictures[0], z[0]/small.vae.config.scaling_factor)

def test_empty_order_returns_the_input(small, scene):
    for words in ('', '  \n'):
        e = run(small, scene.image, instruction=words)
        assert same(e.image, scene.image) and e.rows==0

def test_unknown_words_are_named(small, scene):
    known = replace(small, name='tiny')
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always'); run(known, scene.image, instruction='turn the horse into a dragon', steps=1)
    said = [str(x.message) for x in w if 'never learned' in str(x.message)]
    assert len(said)==1 and "'dragon'" in said[0] and 'zebra' in said[0] and "'turn'" not in said[0]

def test_a_model_without_eyes_is_refused(narrow, scene):
    with pytest.raises(ValueError, match=r"4 channels and instruct_pix2pix needs 8: try load\('tiny-instruct'\)"): run(narrow, scene.image)

@pytest.mark.parametrize('error', [RuntimeError('third'), KeyboardInterrupt()])
def test_published_path_gives_the_schedule_back(small, scene, error):
    calls, before = [], small.schedule
    def fail(*_):
        calls.append(1)
        if len(calls)==3: raise error
    hook = small.unet.register_forward_pre_hook(fail)
    with pytest.raises(type(error)): run(small, scene.image, as_published=True)
    hook.remove()
    assert small.schedule is before

def test_real_times(small):
    with real_times(small):
        t = even_times(small.schedule, 5); a = [small.schedule[x] for x in t]
        assert t[0]==999 and t[-2:]==[0,-1] and a==sorted(a) and a[-1]==1
        assert abs(small.schedule[500]-small.schedule.abar[500])<1e-12 and small.schedule[500.5]<small.schedule[500]
    assert even_times(small.schedule, 1)==[999,-1]

def test_ancestral_noise_has_unit_variance(small):
    "With the true noise told, the walk keeps the level it says: noise in, picture 0."
    class Oracle:
        schedule = small.schedule
        def eps(self, z, t, *_): return z/np.sqrt(1-small.schedule[t])
    times = list(range(981, 0, -20))
    z = noised(torch.zeros(1,4,64,64), gaussian((1,4,64,64)), small.schedule[981])
    for t,z,_ in ancestral(Oracle(), z, None, times, (gaussian(z.shape, i+1) for i in range(60))):
        assert abs(z.std().item()-np.sqrt(1-small.schedule[t]))<.03

@pytest.mark.parametrize('size, out', [((768,512),(576,384)), ((1000,510),(576,320)), ((300,900),(192,576)), ((2000,100),(1280,64)), ((71,86),(448,512)), ((86,71),(512,448)), ((512,512),(512,512))], ids=str)
def test_published_sizes(size, out): assert published_size(size)==out

def test_resolution_is_the_only_way_to_another_size(small, scene):
    im, rows = scene.image.resize((200,130)), small.rows
    seen = []; hook = small.unet.register_forward_pre_hook(lambda m,a: seen.append(tuple(a[0].shape)))
    assert run(small, im).image.size==(200,130)
    e = run(small, im, resolution=128, mask=np.ones((130,200)), steps=2)
    hook.remove()
    assert e.image.size==e.mask.size==(192,128) and seen[-1]==(3,8,32,48) and e.rows==6 and small.rows-rows==9+6 and e.settings['resolution']==128
    with pytest.raises(ValueError, match='resolution must be'): run(small, im, resolution=12.5)

def test_in_stable_diffusions_shape(tmp_path):
    "A folder like timbrooks/instruct-pix2pix: 8 channels, an Euler-ancestral scheduler, 77 tokens."
    folder = make(tmp_path, channels=8); f = folder/'scheduler'/'scheduler_config.json'
    f.write_text(json.dumps(json.loads(f.read_text()) | dict(_class_name='EulerAncestralDiscreteScheduler', timestep_spacing='linspace')))
    m = onto_cpu(folder)
    e = run(m, Image.new('RGB', (100,80), 'red'), instruction='make it blue', steps=2, as_published=True)
    assert m.channels==8 and e.rows==6 and e.image.size==(100,80)

def test_an_interrupted_download_is_named(tmp_path, small):
    save_pipeline(tmp_path/'m', replace(small, vae=small.vae), StableDiffusionInstructPix2PixPipeline)
    f = tmp_path/'m'/'unet'/'diffusion_pytorch_model.safetensors'; b = f.read_bytes()
    assert load(str(tmp_path/'m'), 'cpu').channels==8
    f.write_bytes(b[:len(b)//2])
    with pytest.raises(ValueError, match='diffusion_pytorch_model.safetensors is truncated or damaged .*: delete it and get it again'): load(str(tmp_path/'m'), 'cpu')

# -- widening and dropout

@torch.no_grad()
def test_widened_network_says_the_same(narrow):
    rng = torch.get_rng_state(); wide = widen(narrow.unet, 8)
    z, p, c = gaussian((2,4,16,16)), gaussian((2,4,16,16), 1), gaussian((2,7,96), 2)
    assert torch.allclose(wide(torch.cat([z,p],1), 7, c).sample, narrow.unet(z, 7, c).sample, atol=1e-5)
    assert wide.config.in_channels==8 and narrow.unet.config.in_channels==4 and torch.equal(rng, torch.get_rng_state())
    assert torch.equal(wide_conv(narrow.unet.conv_in, 8).bias, narrow.unet.conv_in.bias)
    with pytest.raises(ValueError, match='^channels must be more than the 8'): widen(wide, 8)

@pytest.mark.parametrize('q', [.05, .1, .3])
def test_dropout_partition(q):
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(1)); text, picture = dropped(u, q)
    for share in (text&~picture, text&picture, ~text&picture): assert abs(share.float().mean()-q)<.005
    text, picture = dropped(torch.tensor([0., q, 2*q, 3*q]), q)
    assert text.tolist()==[True,True,False,False] and picture.tolist()==[False,True,True,False]

# -- words

def orders(): return [draw_pair(make_scene(seed=i), k, np.random.default_rng([i,1])) for i in range(60) for k in kinds_of(make_scene(seed=i))]

def test_orders_use_known_words_only(model):
    texts = {t for p in orders() for q in (p, p.back) if q for t in q.order.texts}
    assert len(texts)>500 and all('  ' not in t and t==t.strip() and '{' not in t for t in texts)
    assert not [w for w in {w for t in texts for w in t.split()} if len(model.tokenizer(w).input_ids)>3]

def test_there_and_back():
    for p in orders():
        assert p.after!=p.before and p.order.texts
        if p.back: assert p.back.before==p.after and p.back.after==p.before and p.back.order.texts
        if p.order.kind!='colour': assert p.back
        if len(p.before.things)>1: assert not any('it' in t.split() for t in p.order.texts) or p.order.kind in ('background','style')

def test_heldout_orders():
    seen = {p.before.seed for k in ORDER_KINDS for p,_ in heldout_orders(40, k)}
    assert len(seen)==200 and min(seen)>=HELD_OUT and not {HELD_OUT+1000*i+j for i in range(len(KINDS)) for j in range(1000)} >= seen
    assert all(p.after.things[0].colour and p.after.things[0].name in PAINTED for p,_ in heldout_orders(9, 'colour'))
    with pytest.raises(ValueError, match='^kind must be'): heldout_orders(1, 'pair')

def test_triplet_files(tmp_path):
    ts = [dict(input='a cat – big', edit='make it a dog', output='a dog', url='u')]
    for key in ('input','caption'):
        f = write_triplets(tmp_path/'d'/f'{key}.jsonl', ts, key)
        assert read_triplets(f)==ts and key in json.loads(f.read_text(encoding='utf-8'))
    (tmp_path/'x.jsonl').write_text('{"caption": "a", "edit": "b"}\n')
    with pytest.raises(ValueError, match='line 1 needs'): read_triplets(tmp_path/'x.jsonl')
    assert clean_triplets(ts*2+[dict(input='A cat!', edit='-', output='a cat ')])==ts

class Letters:
    "A tokenizer of single characters."
    eos_token_id = 0
    def __call__(self, text, return_tensors): ids = torch.tensor([[ord(c)%128 for c in text]]); return BatchEncoding(dict(input_ids=ids, attention_mask=torch.ones_like(ids)))
    def decode(self, ids, skip_special_tokens): return ''.join(chr(i) for i in ids if i)

def test_a_language_model_is_asked():
    lm, state = fresh(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=128, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))), torch.get_rng_state()
    assert ask(lm, Letters(), 'a lighthouse', tries=2, tokens=8) is None and torch.equal(state, torch.get_rng_state())
    says, calls = 'make it night\n%%\na lighthouse at night\nEND nonsense', []
    def generate(self, input_ids, **words):
        calls.append(words); tail = says if len(calls)==3 else 'rubbish'
        return torch.cat([input_ids, torch.tensor([[ord(c) for c in tail]])], 1)
    lm.generate = generate.__get__(lm)
    assert ask(lm, Letters(), 'a lighthouse')==dict(input='a lighthouse', edit='make it night', output='a lighthouse at night')
    assert len(calls)==3 and calls[0]['temperature']==.7 and calls[0]['max_new_tokens']==256

# -- pairs

def test_twins(narrow):
    c, draws = narrow.embed(['a horse on grass']*2), [gaussian((1,4,16,16), k) for k in range(5)]
    before, processors = narrow.schedule, narrow.unet.attn_processors
    for p in (0., 1.):
        film = [z for _,z,_ in pair_walk(narrow, c, p, 7.5, draws, 4)]
        assert len(film)==5 and all(torch.allclose(z[0], z[1], atol=1e-4) for z in film)
    walk = pair_walk(narrow, narrow.embed(['a horse on grass','night']), .5, 7.5, draws, 4); next(walk); next(walk); walk.close()
    assert narrow.schedule is before and {k: id(v) for k,v in narrow.unet.attn_processors.items()}=={k: id(v) for k,v in processors.items()}

def test_one_seed_draws_all(narrow):
    state = torch.get_rng_state()
    (a,b),facts = generate_pair(narrow, ('a horse on grass','a zebra on grass'), 3, 2); (c,d),again = generate_pair(narrow, ('a horse on grass','a zebra on grass'), 3, 2)
    assert same(a,c) and same(b,d) and not same(a,b) and facts==again and .1<=facts['p2p_threshold']<=.9 and 7.5<=facts['cfg_scale']<=15
    assert torch.equal(state, torch.get_rng_state())

ALL = dict(image=-1., direction=-1., caption=-1., seeds=2, steps=1)
def threes(n=3): return [dict(input=f'a horse {p}', edit='make it a zebra', output=f'a zebra {p}') for p in ('on grass','on snow','at night')[:n]]

def test_pair_folder_goes_on_after_a_stop(narrow, judge, tmp_path, monkeypatch):
    import diffedit_lab.instruct_data as lib
    real, calls = lib.generate_pair, []
    def stopping(*args):
        calls.append(1)
        if len(calls)==4: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(lib, 'generate_pair', stopping)
    with pytest.raises(KeyboardInterrupt): make_pairs(narrow, judge, threes(), tmp_path, **ALL)
    assert [d.name for d in sorted(tmp_path.iterdir())]==['0000000']
    make_pairs(narrow, judge, threes(), tmp_path, **ALL, most=1)
    assert len(calls)==8 and json.loads((tmp_path/'seeds.json').read_text())==[[f'{i:07d}', s] for i,(_,s) in enumerate(index_pairs(tmp_path))]
    rows = [json.loads(l) for l in (tmp_path/'0000000'/'metadata.jsonl').read_text().splitlines()]
    assert len(rows)==2 and set(rows[0])=={'seed','p2p_threshold','cfg_scale','clip_sim_0','clip_sim_1','clip_sim_dir','clip_sim_image'} and rows[0]['clip_sim_dir']>=rows[1]['clip_sim_dir']
    assert len(list((tmp_path/'0000001').glob('*.jpg')))==2 and Image.open(tmp_path/'0000001'/'prompt.json'.replace('prompt.json', f'{index_pairs(tmp_path)[1][1][0]}_0.jpg')).size==(128,128)
    entries = read_pairs(tmp_path, 'all')
    assert [e['input'] for e in entries]==[t['input'] for t in threes()] and all(f.exists() for e in entries for fs in e['files'] for f in fs)
    assert json.loads((tmp_path/'0000000'/'prompt.json').read_text())['caption']=='a horse on grass'

def test_processes_share_the_work(narrow, judge, tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    for rank in ('1','0'):
        monkeypatch.setenv('RANK', rank); make_pairs(narrow, judge, threes(), tmp_path, **ALL)
        if rank=='1': assert [d.name for d in tmp_path.iterdir() if d.is_dir()]==['0000001']
    assert [n for n,_ in index_pairs(tmp_path)]==['0000000','0000001','0000002']

def test_a_triplet_without_good_pairs_is_done_but_not_listed(narrow, judge, tmp_path):
    make_pairs(narrow, judge, threes(1), tmp_path, seeds=1, steps=1, caption=.99)
    assert json.loads((tmp_path/'seeds.json').read_text())==[] and (tmp_path/'0000000'/'prompt.json').exists()

def test_published_filter():
    row = lambda **k: dict(clip_sim_0=.3, clip_sim_1=.3, clip_sim_dir=.3, clip_sim_image=.8) | k
    bad = [row(clip_sim_0=.19), row(clip_sim_1=.1), row(clip_sim_dir=.1), row(clip_sim_image=.74)]
    good = [row(clip_sim_dir=d) for d in (.2,.5,.3,.9,.4)]
    assert [r['clip_sim_dir'] for r in best_pairs(bad+good)]==[.9,.5,.4,.3] and len(best_pairs(bad, image=.7))==1

def test_splits_by_triplet(tmp_path):
    for i in range(40):
        d = tmp_path/f'{i:07d}'; d.mkdir(); (d/'prompt.json').write_text(json.dumps(dict(caption=str(i), edit='e', output='o'))); (d/'metadata.jsonl').write_text('{"seed": 5}\n')
    assert len(index_pairs(tmp_path))==40
    parts = [[e['input'] for e in read_pairs(tmp_path, s)] for s in ('train','val','test')]
    assert [len(p) for p in parts]==[36,2,2] and sum(parts, [])==[str(i) for i in range(40)]

def test_both_pictures_move_alike(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (32,32,3), dtype=np.uint8); Image.fromarray(a).save(tmp_path/'0.png'); Image.fromarray(255-a).save(tmp_path/'1.png')
    entry = dict(edit='make it a dog', files=[(tmp_path/'0.png', tmp_path/'1.png')]); seen = set()
    for k in range(12):
        x,y,_ = training_item(entry, np.random.default_rng(k), 24, (32,32))
        assert np.array_equal(pixels(x), 255-pixels(y)); seen.add(x.tobytes())
    assert len(seen)>6

# -- training

@pytest.fixture(scope='module')
def trained(narrow, tmp_path_factory):
    d = tmp_path_factory.mktemp('instruct'); save_pipeline(d/'base', narrow); rng = torch.get_rng_state()
    words = dict(scenes=12, batch=8, check=1, device='cpu')
    first = train_instruct(d/'out', d/'base', d/'work', steps=4, **words)
    log = train_instruct(d/'out', d/'base', d/'work', steps=24, **words)
    assert torch.equal(rng, torch.get_rng_state())
    return d, first, log

def test_training_goes_on_and_learns(trained):
    d, first, log = trained
    assert [r['step'] for r in log]==[4,24] and log[:1]==first and log[1]['loss']<log[0]['loss'] and {*ORDER_KINDS} <= log[1].keys()
    assert len(list((d/'work').glob('samples_*.jpg')))>=1 and (d/'answers_12.npy').exists()

def test_trained_folder_opens_here_and_there(trained, narrow):
    m = load(str(trained[0]/'out'), 'cpu')
    assert m.channels==8 and m.unet.conv_in.weight[:,4:].abs().max()>0
    mine, theirs = (next(x.text_encoder.parameters()) for x in (m, narrow)); assert not torch.equal(mine.float(), theirs.float())
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(trained[0]/'out', low_cpu_mem_usage=False); pipe.set_progress_bar_config(disable=True)
    assert pipe('at night', image=Image.new('RGB', (128,128)), num_inference_steps=1).images[0].size==(128,128)

def test_exact_pairs(model):
    captions, pictures = world(6); ps = exact_pairs(model.vae, 6)
    assert len(ps.texts)==len(ps.kinds)==len(ps.before)==len(ps.after) and np.array_equal(ps.latents[:6], encode_world(model.vae, pictures))
    n = sum(b<6 for b in ps.before)
    back = [(a,b) for b,a in zip(ps.before[n:], ps.after[n:])]
    assert set(back) <= set(zip(ps.before[:n], ps.after[:n])) and len(ps.latents)==6+n
    both = mixed(ps, ps); assert np.array_equal(both.latents[both.after[len(ps.texts):]], ps.latents[ps.after])

def test_the_judge_knows_right_from_untouched(judge):
    for k in ORDER_KINDS:
        ps = [p for p,_ in heldout_orders(4, k)]
        assert np.mean(obeyed(judge, [p.after.image for p in ps], ps))>=.75 and np.mean(obeyed(judge, [p.before.image for p in ps], ps))<=.25, k
