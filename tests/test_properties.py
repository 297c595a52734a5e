"""What is true of every method, whatever it learns or draws.

The methods are found in `diffedit_lab.methods`: a new one joins by itself. What it needs beyond `target` goes into `WORDS`."""
import importlib, inspect, math, pkgutil, random
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import cache

import numpy as np, pytest, torch
from PIL import Image

import diffedit_lab.methods
from diffedit_lab import embedded, load, paste
from diffedit_lab.model import sibling
from diffedit_lab.masks import find_heat, noise_draws
from diffedit_lab.methods.diffedit import slow_mask, three_rows
from diffedit_lab.schedule import gaussian, path
from diffedit_lab.train.inpaint import widen

def _methods():
    "Name -> public function, for everything that `@editor` made in `diffedit_lab.methods`."
    found = {}
    for m in pkgutil.iter_modules(diffedit_lab.methods.__path__, 'diffedit_lab.methods.'):
        for name,f in vars(importlib.import_module(m.name)).items():
            if inspect.isfunction(f) and f.__module__==m.name and {'image','paste','feather'} <= set(inspect.signature(f).parameters): found[name] = f
    return found

METHODS = _methods()
QUICK = dict(target='a zebra on grass', source='a horse on grass', instruction='turn the horse into a zebra', steps=5, n=2, seed=0) # given to methods that know the word
WORDS = dict(                             # method -> further words it needs to be quick, or to run at all
    repaint=dict(jump=2, resamples=2), null_text=dict(iterations=1), style_diffusion=dict(steps=2, inner=1),
    imagic=dict(embedding_updates=1, unet_updates=1, batch=2), forgedit=dict(updates=2, batch=2), dreambooth_forgedit=dict(updates=2, batch=2))
MODELS = dict(instruct_pix2pix='tiny-instruct') # method -> the embedded model it needs, where that is not `tiny`
DRAWS = dict(diffedit='heat')             # method -> what its seed decides, where that is not the picture
ROWS = dict(                              # method -> [(words, rows)], as the paper counts
    sdedit=[(dict(steps=50, strength=.6), 60), (dict(steps=10, strength=.6, guidance=1.), 6)],
    diffedit=[(dict(steps=50, strength=.8, n=10), 20+40+80), (dict(steps=5, strength=.8, n=3, mask='full'), 4+8), (dict(steps=5, strength=.8, n=3, guidance=1.), 6+4+4)],
    fast_diffedit=[(dict(steps=20, n=20), 40+40), (dict(steps=5, mask='full'), 10)],
    prompt_to_prompt=[(dict(steps=50), 50+4*50), (dict(steps=5, guidance=1.), 5+2*5), (dict(steps=5, target=['a zebra on grass','a cow on grass']), 5+6*5)],
    instruct_pix2pix=[(dict(steps=10), 30)], null_text=[(dict(steps=5, iterations=1), 5+15+20)], style_diffusion=[(dict(steps=3, inner=2), 27)],
    imagic=[(dict(embedding_updates=1, unet_updates=1, batch=2, steps=4), 4+8)], forgedit=[(dict(updates=2, batch=3, steps=4), 6+8)],
    dreambooth_forgedit=[(dict(updates=2, batch=2, steps=4), 4+8)])

def knows(method, *words): return set(words) <= set(inspect.signature(METHODS[method]).parameters)
every = pytest.mark.parametrize('method', METHODS)
def those_with(*words): return pytest.mark.parametrize('method', [m for m in METHODS if knows(m, *words)])

@cache
def _other(name):
    "The embedded model, or `tiny` with more input channels where that model does not ship."
    if name in embedded(): return load(name, device='cpu', dtype=torch.float32)
    m = load('tiny', device='cpu', dtype=torch.float32)
    return replace(m, unet=widen(m.unet, 8).eval().requires_grad_(False))

@pytest.fixture
def parts(method, model):
    "The method's model."
    return _other(MODELS[method]) if method in MODELS else model

def edit(method, model, image, **words):
    "Run a method quickly."
    quick = {k: v for k,v in QUICK.items() if knows(method, k)} | WORDS.get(method, {}) | words
    if knows(method, 'mask') and inspect.signature(METHODS[method]).parameters['mask'].default is inspect.Parameter.empty: quick = dict(mask=box(*image.size)) | quick
    return METHODS[method](model, image, **quick)

def pixels(im): return np.asarray(im).astype(int)
def same(a, b): return a.size==b.size and a.mode==b.mode and np.array_equal(pixels(a), pixels(b))
def picture(w, h, seed=0):
    "A smooth coloured picture of any size."
    a = np.random.default_rng(seed).integers(0, 256, (6,6,3), dtype=np.uint8)
    return Image.fromarray(a).resize((w,h), Image.BICUBIC)
def box(w, h):
    "A float mask with a hole off the centre."
    m = np.zeros((h,w), np.float32); m[h//4:h//2,w//2:-w//8] = 1
    return m
def round_trip(e, model):
    "What the codec alone makes of the source, on the grid the edit used."
    return e.geometry.undo(model.decode(model.encode(e.geometry.image(e.source_image))))

def test_the_methods_are_found():
    assert {'sdedit','diffedit','fast_diffedit'} <= set(METHODS)
    for name,f in METHODS.items(): assert f.__name__==name and f.__doc__, name
    for book in (WORDS, MODELS, DRAWS, ROWS): assert set(book) <= set(METHODS) | {'instruct_pix2pix'}

# -- nothing asked, nothing changed

@those_with('mask')
def test_empty_mask_returns_the_input(method, parts, scene):
    e = edit(method, parts, scene.image, mask=np.zeros((128,128)))
    assert same(e.image, scene.image)
    assert same(e.raw, round_trip(e, parts))
    assert not pixels(e.mask).any() and e.paste['after']==math.inf

@those_with('mask')
def test_empty_mask_off_the_grid(method, parts):
    im = picture(97, 67)
    assert same(edit(method, parts, im, mask=Image.new('L', (97,67))).image, im)

@those_with('strength')
def test_strength_zero_is_the_round_trip(method, parts, scene):
    words = dict(mask=np.ones((128,128)), paste=False) if knows(method, 'mask') else dict(paste=False)
    e = edit(method, parts, scene.image, strength=0, **words)
    assert same(e.image, round_trip(e, parts)) and e.rows==0

@those_with('mask')
def test_only_the_mask_and_its_feather_change(method, parts):
    import cv2
    im, m = picture(128, 128), box(128, 128)
    e = edit(method, parts, im, mask=m, feather=4)
    far = cv2.distanceTransform(np.uint8(m==0), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)>4
    assert np.array_equal(pixels(e.image)[far], pixels(im)[far])
    assert np.array_equal(pixels(e.image)[m==1], pixels(e.raw)[m==1])
    assert same(e.image, paste(e.raw, im, m, 4))

# -- seeds

@those_with('seed')
def test_seed_decides(method, parts, scene):
    a,b,other = (edit(method, parts, scene.image, seed=s) for s in (0,0,99)) # far apart: some methods draw several pictures, from seed, seed + 1, ...
    assert same(a.image, b.image) and same(a.raw, b.raw)
    assert (a.heat is None)==(b.heat is None) and (a.heat is None or np.array_equal(a.heat, b.heat))
    if DRAWS.get(method)=='heat': assert not np.array_equal(a.heat, other.heat)
    else: assert not same(a.raw, other.raw)

def test_seed_zero_is_a_seed():
    "The tutorial's `if seed:` left seed 0 unseeded."
    assert torch.equal(gaussian((1,4,8,8), 0), gaussian((1,4,8,8), 0))
    d = noise_draws((1,4,8,8), 3, 0)
    assert torch.equal(d, noise_draws((1,4,8,8), 3, 0)) and len({tuple(x.flatten()[:4].tolist()) for x in d})==3

# -- everything comes back as it was

NETS = 'unet','vae','text_encoder'

def state(model):
    "All that a method could leave behind: weights, flags, processors, hooks, and three generators."
    s = dict(torch=torch.get_rng_state().tolist(), numpy=repr(np.random.get_state()), random=random.getstate(), grad=torch.is_grad_enabled(), default=torch.get_default_dtype(), threads=torch.get_num_threads(),
             processors=[(k, id(v)) for k,v in model.unet.attn_processors.items()], schedule=id(model.schedule), name=model.name)
    for n in NETS:
        net = getattr(model, n)
        s |= {f'{n}.training': [m.training for m in net.modules()], f'{n}.dtype': net.dtype, f'{n}.device': str(net.device), f'{n}.id': id(net),
              f'{n}.hooks': [len(h) for m in net.modules() for k,h in sorted(vars(m).items()) if k.endswith('_hooks') and h is not None],
              f'{n}.forwards': [k for k,m in net.named_modules() if 'forward' in vars(m)], f'{n}.grad': [(k, p.requires_grad, p.grad is None) for k,p in net.named_parameters()]}
    return s

def weights(model): return {(n,k): v.clone() for n in NETS for k,v in getattr(model, n).state_dict().items()}

@contextmanager
def unchanged(model):
    before, w = state(model), weights(model)
    yield
    after = state(model)
    assert [k for k in before if before[k]!=after[k]]==[]
    new = weights(model)
    assert new.keys()==w.keys() and [k for k,v in new.items() if v.dtype!=w[k].dtype or not torch.equal(v, w[k])]==[]

def unets(model):
    "The model's UNet, and that of its inpainting twin where it has one."
    return [m.unet for m in (model, sibling(model, 'inpainting')) if m]

@contextmanager
def failing(nets, error, at):
    "The networks raise at their `at`-th call."
    calls = []
    def fail(*_):
        calls.append(1)
        if len(calls)==at: raise error
    hooks = [net.register_forward_pre_hook(fail) for net in nets]
    try: yield
    finally:
        for h in hooks: h.remove()

@every
def test_nothing_is_left_changed(method, parts, scene):
    torch.manual_seed(7); np.random.seed(7); random.seed(7)
    with unchanged(parts): edit(method, parts, scene.image)

@every
@pytest.mark.parametrize('error', [RuntimeError('the third call'), KeyboardInterrupt()], ids=['exception','ctrl-c'])
def test_nothing_is_left_changed_after_a_failure(method, parts, scene, error):
    with unchanged(parts):
        with failing(unets(parts), error, 3), pytest.raises(type(error)): edit(method, parts, scene.image)
        assert not parts.unet._forward_pre_hooks

@those_with('mask')
def test_the_caller_keeps_his_picture_and_mask(method, parts, scene):
    im, a = scene.image, box(128, 128)
    t, p, b = torch.from_numpy(a.copy()), Image.fromarray(np.uint8(255*a)), a>.5
    for m in (a, t, p, b):
        was = np.asarray(m).copy()
        edit(method, parts, im, mask=m, steps=2)
        assert np.array_equal(np.asarray(m), was)
    assert same(im, scene.image)

# -- the result

@every
@pytest.mark.parametrize('size', [(97,67), (640,480), (1200,300)], ids=str)
def test_output_has_the_size_of_the_input(method, parts, size):
    im = picture(*size)
    e = edit(method, parts, im, steps=2, **(dict(n=1) if knows(method, 'n') else {}))
    assert e.image.size==e.source_image.size==e.raw.size==size and e.image.mode=='RGB'
    assert e.mask is None or (e.mask.size==size and e.mask.mode=='L')
    assert e.picture().height>0 and len(e._repr_png_())>1000

@every
def test_result_holds_no_tensor_and_no_model(method, parts, scene):
    e = edit(method, parts, scene.image)
    def held(x, seen):
        if id(x) in seen or isinstance(x, (str,bytes,int,float,bool,type(None),np.ndarray,Image.Image)): return []
        seen.add(id(x))
        if torch.is_tensor(x) or isinstance(x, torch.nn.Module) or hasattr(x, 'eps'): return [type(x).__name__]
        inside = [*x.keys(), *x.values()] if isinstance(x, dict) else list(x) if isinstance(x, (list,tuple,set)) else list(vars(x).values()) if hasattr(x, '__dict__') else []
        return [o for y in inside for o in held(y, seen)]
    assert is_dataclass(e)
    for f in fields(e):
        if f.name!='fitted': assert held(getattr(e, f.name), set())==[], f.name
    if e.fitted is not None: assert all(t.device.type=='cpu' for t in e.fitted.tensors.values())
    assert e.method==method and e.method in repr(e) and '\n' not in repr(e) and e.seconds>0
    if e.heat is not None: assert e.heat.ndim==2 and e.heat.min()>=0 and e.heat.max()<=1

@every
def test_recut_leaves_the_model_alone(method, parts, scene):
    e = edit(method, parts, scene.image)
    rows = parts.rows
    if e.heat is None:
        with pytest.raises(ValueError, match='recut'): e.recut(threshold=.5)
        return
    with failing([*unets(parts), parts.vae.decoder], AssertionError('recut asked a network'), 1):
        low, same_cut, high = (e.recut(threshold=t) for t in (0., e.settings['threshold'], 1.))
    assert parts.rows==rows
    assert pixels(low.mask).sum()>=pixels(same_cut.mask).sum()>=pixels(high.mask).sum()==0
    assert same(high.image, e.source_image) and low.settings['threshold']==0. and e.settings['threshold']==same_cut.settings['threshold']
    assert same(low.raw, e.raw) and low.rows==e.rows

@those_with('mask')
def test_a_mask_goes_back_in(method, parts, scene):
    "An edit, its mask, and the mask's array are one and the same to `mask=`."
    first = edit(method, parts, scene.image, mask=box(128, 128), steps=2)
    again = [edit(method, parts, scene.image, mask=m, steps=2) for m in (first, first.mask, pixels(first.mask)/255)]
    for e in again: assert same(e.image, first.image) and same(e.mask, first.mask)

# -- rows

@contextmanager
def counting(nets):
    "Rows that truly went through UNets."
    seen = []
    hooks = [net.register_forward_pre_hook(lambda m, args, kwargs: seen.append(len(args[0] if args else kwargs['sample'])), with_kwargs=True) for net in nets]
    try: yield seen
    finally:
        for h in hooks: h.remove()

@every
def test_rows_are_counted_exactly(method, parts, scene):
    for words,rows in ROWS.get(method, [({}, None)]):
        words = {k: np.ones((128,128)) if isinstance(v, str) and k=='mask' else v for k,v in words.items()}
        before = parts.rows
        with counting(unets(parts)) as seen: e = edit(method, parts, scene.image, **words)
        assert e.rows==parts.rows-before==sum(seen)>0
        assert rows is None or e.rows==rows, words

def test_rows_of_the_masks(model, scene):
    "A map costs two rows; the tutorial's slow one, four a step; its loop, three a step."
    z, before = model.encode(scene.image), model.rows
    find_heat(model, z, 'a horse on grass', 'a zebra on grass', n=20)
    assert model.rows-before==40
    texts, noise, before = model.embed(['a horse on grass', 'a zebra on grass']), gaussian((2,*z.shape[1:])), model.rows
    times = path(model.schedule, 6, .5)
    slow_mask(model, z, texts[:1], texts[1:], times, noise)
    assert model.rows-before==4*2*(len(times)-1)
    before = model.rows
    list(three_rows(model, z, texts[:1], texts[1:], torch.ones(1,1,32,32), times))
    assert model.rows-before==3*(len(times)-1)
