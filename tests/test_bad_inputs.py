"Bad input: one line, in words, that begins with the argument (or names the file) and says what to do instead."
import json, shutil, warnings
from types import SimpleNamespace

import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file

import diffedit_lab
from diffedit_lab import diffedit, embedded, fast_diffedit, gallery, heldout, load, load_clip, load_fitted, sdedit
from diffedit_lab.masks import cut, find_heat
from diffedit_lab.model import _MODELS
from diffedit_lab.result import Edit, Fitted
from diffedit_lab.scenes import OBJECTS
from diffedit_lab.schedule import gaussian, path, read_schedule

ERRORS = ValueError, TypeError, FileNotFoundError, ConnectionError, FloatingPointError, RuntimeError
REMEDIES = 'must be', 'must hold', ': ', 'try ', 'use ', 'needs ', 'it takes', 'choose', 'give '

def one_line(f, *contains, starts=''):
    "`f` fails with one short line that begins and goes on as told, holds a remedy, and drags no other error along."
    with pytest.raises(ERRORS) as e: f()
    said = str(e.value)
    assert type(e.value) in ERRORS, f'{type(e.value).__name__}: {said}'
    assert said and '\n' not in said and '\r' not in said and len(said)<=1200, said
    assert said.startswith(starts), f'{said!r} does not begin with {starts!r}'
    for o in contains: assert o in said, f'{o!r} is not in {said!r}'
    assert any(r in said for r in REMEDIES), f'no remedy: {said!r}'
    assert e.value.__cause__ is None and (e.value.__context__ is None or e.value.__suppress_context__), said
    return said

def warned(f):
    "The texts of what `f` warns about, each said once, as a user sees them."
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('default')
        f()
    return [str(w.message) for w in ws if issubclass(w.category, UserWarning)]

@pytest.fixture(scope='module')
def image(): return Image.new('RGB', (64,48), (90,120,60))

# -- arguments of the methods

NAN, INF = float('nan'), float('inf')
WRONG = dict(
    strength=[1.2, -.1, NAN, INF, '0.5', True, [.5], None, 1+0j],
    mask_strength=[2, -1, NAN, 'half', False, None],
    threshold=[1.01, -.5, NAN, '0.5', True, None],
    guidance=[NAN, INF, 'strong', True, [7.5], None],
    steps=[0, -1, 501, 2.5, 10., '10', True, NAN, None],
    n=[0, -3, 1.5, 'ten', True, None],
    seed=[-1, .5, '0', True, [0], None],
    feather=[-1, 1.5, 'soft', True, NAN, None],
    target=['', '   ', None, 3, ['a zebra'], b'a zebra'],
    source=[None, 3, ['a horse']],
    negative=[None, 3, ['fog']],
    paste=['yes', 1, 0, None],
    as_published=['yes', 1, None])
CALLS = [(k, v) for k,vs in WRONG.items() for v in vs]

@pytest.mark.parametrize('word,value', CALLS, ids=lambda o: repr(o)[:20])
def test_argument_refused(model, image, word, value):
    "A wrong value is named before the network is asked."
    rows = model.rows
    words = dict(target='a zebra on grass', source='a horse on grass', steps=2, n=1) | {word: value}
    one_line(lambda: diffedit(model, image, **words), starts=f'{word} ')
    assert model.rows==rows

@pytest.mark.parametrize('value', [np.float32(.5), np.float64(.5), 1, 0], ids=repr)
def test_numbers_of_any_kind_are_numbers(model, image, value): assert sdedit(model, image, target='a zebra on grass', steps=2, strength=value).image.size==image.size

@pytest.mark.parametrize('value', [np.int64(2), np.uint8(2)], ids=repr)
def test_whole_numbers_of_any_kind_are_whole_numbers(model, image, value): assert sdedit(model, image, target='a zebra on grass', steps=value, seed=value, feather=value).rows==2

METHOD_CALLS = dict(
    unknown_keyword=(lambda m,i: sdedit(m, i, target='a zebra', stregth=.5), ['sdedit', "'stregth'", 'strength']),
    two_unknown_keywords=(lambda m,i: diffedit(m, i, target='a zebra', foo=1, bar=2), ['diffedit', "'bar'", 'mask_strength']),
    word_of_another_method=(lambda m,i: sdedit(m, i, target='a zebra', n=10), ['sdedit', "'n'", 'it takes']),
    no_target=(lambda m,i: diffedit(m, i), ['diffedit needs target']),
    prompt_by_place=(lambda m,i: sdedit(m, i, 'a zebra on grass'), ['sdedit', 'target=']),
    no_image=(lambda m,i: sdedit(m, target='a zebra'), ['sdedit', 'image']),
    nothing=(lambda m,i: sdedit(), ['sdedit', 'model']),
    model_is_a_name=(lambda m,i: sdedit('tiny', i, target='a zebra'), ['model must be', 'load()']),
    model_is_none=(lambda m,i: sdedit(None, i, target='a zebra'), ['model must be', 'NoneType']),
    model_is_a_unet=(lambda m,i: sdedit(m.unet, i, target='a zebra'), ['model must be', 'UNet2DConditionModel']),
    swapped=(lambda m,i: sdedit(i, m, target='a zebra'), ['model must be', 'Image']),
    model_is_a_class=(lambda m,i: sdedit(diffedit_lab.Model, i, target='a zebra'), ['model must be']),
    image_is_none=(lambda m,i: sdedit(m, None, target='a zebra'), ['image must be', 'NoneType']),
    image_is_missing=(lambda m,i: sdedit(m, 'no/such/picture.png', target='a zebra'), ['image', 'no/such/picture.png', 'check the path']),
    image_is_a_list=(lambda m,i: sdedit(m, [i], target='a zebra'), ['image must be', 'list']),
    image_is_a_batch=(lambda m,i: sdedit(m, torch.zeros(2,3,8,8), target='a zebra'), ['image must be', '(2, 3, 8, 8)']),
    image_has_nan=(lambda m,i: sdedit(m, np.full((8,8,3), np.nan), target='a zebra'), ['image holds NaN']),
    image_is_0_255_floats=(lambda m,i: sdedit(m, np.full((8,8,3), 200.), target='a zebra'), ['image must hold floats in [0, 1]', '255']),
    image_is_empty=(lambda m,i: sdedit(m, np.zeros((0,8,3), np.uint8), target='a zebra'), ['image is empty']),
    mask_of_another_aspect=(lambda m,i: sdedit(m, i, target='a zebra', mask=np.ones((64,64))), ['mask is 64x64', '64x48']),
    mask_turned=(lambda m,i: diffedit(m, i, target='a zebra', mask=Image.new('L', (48,64))), ['mask is 48x64', '64x48']),
    mask_has_nan=(lambda m,i: diffedit(m, i, target='a zebra', mask=np.full((48,64), np.nan)), ['mask holds NaN']),
    mask_out_of_range=(lambda m,i: diffedit(m, i, target='a zebra', mask=np.full((48,64), 1.5)), ['mask must hold floats in [0, 1]']),
    mask_is_a_number=(lambda m,i: diffedit(m, i, target='a zebra', mask=1), ['mask must be', 'int']),
    mask_is_a_colour_picture=(lambda m,i: diffedit(m, i, target='a zebra', mask=Image.new('RGB', (64,48), 'red')), ['mask is a colour picture']),
    mask_is_a_missing_file=(lambda m,i: diffedit(m, i, target='a zebra', mask='no/mask.png'), ['mask', 'no/mask.png', 'check the path']),
    mask_of_an_edit_without_one=(lambda m,i: diffedit(m, i, target='a zebra', mask=SimpleNamespace(mask=None)), ['mask must be']),
    no_noise_to_contrast=(lambda m,i: diffedit(m, i, target='a zebra', mask_strength=0), ['mask_strength', 'use 0.5']),
    too_few_steps_for_a_contrast=(lambda m,i: diffedit(m, i, target='a zebra', steps=1), ['steps']),
    inpainter_is_a_name=(lambda m,i: fast_diffedit(m, i, target='a zebra', mask=np.ones((48,64)), inpainter='tiny-inpainting', steps=2), ['inpainter', 'load(']),
    inpainter_of_four_channels=(lambda m,i: fast_diffedit(m, i, target='a zebra', mask=np.ones((48,64)), inpainter=m, steps=2), ['inpainter', '4 channels', '9']))

@pytest.mark.parametrize('kind', METHOD_CALLS)
def test_call_refused(model, image, kind):
    f, contains = METHOD_CALLS[kind]
    rows = model.rows
    one_line(lambda: f(model, image), *contains)
    assert model.rows==rows

@pytest.mark.parametrize('channels,name', [(9,'sdedit'), (9,'diffedit'), (9,'fast_diffedit'), (8,'sdedit'), (8,'diffedit')])
def test_model_of_another_kind(image, channels, name):
    other = SimpleNamespace(eps=None, channels=channels)
    one_line(lambda: getattr(diffedit_lab, name)(other, image, target='a zebra'), f'{channels} channels', f'{name} needs 4', "load('tiny')", starts='model: ')

# -- the verbs of a model

VERBS = dict(
    embed_number=(lambda m: m.embed(3), 'text must be'), embed_none=(lambda m: m.embed(None), 'text must be'), embed_empty_list=(lambda m: m.embed([]), 'text must be'), embed_mixed=(lambda m: m.embed(['a', 3]), 'text must be'),
    encode_odd_sides=(lambda m: m.encode(Image.new('RGB', (63,64))), 'image sides must be multiples of 4, got 63x64'), encode_name=(lambda m: m.encode('horse.png'), 'image must be'),
    eps_channels=(lambda m: m.eps(torch.zeros(1,9,8,8), 1, m.embed('')), "this model's UNet takes 4 channels, got 9"))

@pytest.mark.parametrize('kind', VERBS)
def test_verb_refuses(model, kind): one_line(lambda: VERBS[kind][0](model), starts=VERBS[kind][1])

def test_numbers_that_blow_up_are_named(model, image, monkeypatch):
    "Half precision that overflows gives a line, not a black picture."
    with pytest.raises(FloatingPointError) as e: model.decode(torch.full((1,4,8,8), NAN))
    assert str(e.value).startswith('decode gave NaN') and 'float32' in str(e.value) and '\n' not in str(e.value)
    with pytest.raises(FloatingPointError, match='encode gave NaN.*float32'): model.encode(torch.full((1,3,16,16), NAN))

# -- prompts the model cannot follow: a warning, and the edit goes on

def test_word_the_tiny_model_never_learned(model):
    said = warned(lambda: model.embed('a wombat on grass'))
    assert len(said)==1 and '\n' not in said[0]
    assert "'wombat'" in said[0] and "'grass'" not in said[0]
    for o in (*OBJECTS, 'brick wall', 'purple', 'watercolor'): assert o in said[0]

def test_words_of_the_tiny_world_are_known(model):
    assert warned(lambda: model.embed(['', 'a horse on grass', 'a pencil sketch of a red car facing left in front of a brick wall', 'an apple and grapes at night', 'A Zebra, on snow.']))==[]

def test_unknown_word_of_an_edit_is_said_once(model, image):
    said = warned(lambda: diffedit(model, image, target='a quokka on grass', source='a horse on grass', steps=2, n=1))
    assert len(said)==1 and "'quokka'" in said[0]

def test_prompt_longer_than_the_tokenizer(model):
    n = model.tokenizer.model_max_length
    said = warned(lambda: model.embed(' '.join(['grass']*(n+3)+['zebra'])))
    assert len(said)==1 and '\n' not in said[0] and f'{n} tokens' in said[0] and 'zebra' in said[0]
    assert warned(lambda: model.embed(' '.join(['grass']*(n-2))))==[]

def test_source_and_target_alike(model, image):
    "No contrast: an empty mask and one warning, where diffusers edits everything."
    edits = []
    said = warned(lambda: edits.append(diffedit(model, image, target='a horse on grass', source='a horse on grass', steps=2, n=1)))
    assert len(said)==1 and 'the mask is empty' in said[0] and '\n' not in said[0]
    assert np.array_equal(np.asarray(edits[0].image), np.asarray(image)) and not np.asarray(edits[0].mask).any()

# -- scenes

SCENES = dict(
    stranger=(lambda s: s('a wombat on grass'), ['a wombat on grass', 'horse', 'on grass']), nowhere=(lambda s: s('a horse on the moon'), ['a horse on the moon', 'on sand']), empty=(lambda s: s(''), ['caption']), number=(lambda s: s(3), ['caption must be text', 'int']),
    unpaintable=(lambda s: s('a red horse on grass'), ['a red horse on grass', 'car']), three=(lambda s: s('a cat and a dog and a cow on grass'), ['caption']), twins=(lambda s: s('a cat and a cat on grass'), ['caption']),
    seed_negative=(lambda s: s('a cat on grass', seed=-1), ['seed must be', '-1']), seed_float=(lambda s: s('a cat on grass', seed=1.5), ['seed must be', '1.5']), seed_bool=(lambda s: s('a cat on grass', seed=True), ['seed must be']), seed_text=(lambda s: s('a cat on grass', seed='1'), ['seed must be']),
    swap_stranger=(lambda s: s('a cat on grass').swap('wombat'), ['wombat', 'horse']), swap_colour=(lambda s: s('a cat on grass').swap('red'), ['red']), swap_number=(lambda s: s('a cat on grass').swap(3), ['3', 'horse']), swap_which=(lambda s: s('a cat and a dog on grass').swap('cow'), ['of: ', 'cat or dog']),
    swap_absent=(lambda s: s('a cat on grass').swap('cow', of='dog'), ['of: ', 'no dog']), swap_twin=(lambda s: s('a cat and a dog on grass').swap('dog', of='cat'), ['word: ', 'choose another']), swap_nothing=(lambda s: s('grass').swap('cow'), ['of: ', 'no object']),
    remove_which=(lambda s: s('a cat and a dog on grass').remove(), ['of: ', 'cat or dog']), remove_absent=(lambda s: s('a cat on grass').remove('dog'), ['of: ', 'no dog']), remove_nothing=(lambda s: s('grass').remove(), ['of: ']),
    kind=(lambda s: heldout(2, kind='colour'), ['kind must be', 'background']), many=(lambda s: heldout('all'), ['n must be']), fewer=(lambda s: heldout(-1), ['n must be']))

@pytest.mark.parametrize('kind', SCENES)
def test_scene_refuses(kind): one_line(lambda: SCENES[kind][0](diffedit_lab.scene), *SCENES[kind][1])

# -- load

LOADS = dict(
    empty=(dict(name=''), ['name must be', 'tiny']), none=(dict(name=None), ['name must be', 'tiny']), number=(dict(name=3), ['name must be']), stranger=(dict(name='huge'), ["'huge'", 'tiny', 'owner/model']),
    no_folder=(dict(name='./no/such/folder'), ['./no/such/folder', 'tiny']), a_file=(dict(name=__file__), ['test_bad_inputs.py', 'tiny']), judge=(dict(name='tiny-clip'), ['tiny-clip', 'load_clip()']), captioner=(dict(name='tiny-captioner'), ['tiny-captioner', 'forgedit']),
    device=(dict(device='gpu'), ["device 'gpu'", "'cuda'"]), device_number=(dict(device=1.5), ['device', 'cuda']), dtype_text=(dict(dtype='float16'), ['dtype must be', 'torch.float32']), dtype_int=(dict(dtype=torch.int8), ['dtype must be', 'torch.float32']))

@pytest.mark.parametrize('kind', LOADS)
def test_load_refuses(kind): one_line(lambda: load(**LOADS[kind][0]), *LOADS[kind][1])

@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has CUDA')
def test_device_that_is_not_here(): one_line(lambda: load(device='cuda'), 'device', 'cuda', 'cpu')

def test_clip_refuses(tmp_path):
    one_line(lambda: load_clip(''), starts='name ')
    one_line(lambda: load_clip(None), starts='name ')
    one_line(lambda: load_clip('tiny'), 'tiny', 'load_clip')
    one_line(lambda: load_clip(str(tmp_path)), str(tmp_path))

@pytest.fixture
def folder(tmp_path):
    "A copy of the embedded model that may be damaged; the weights are shared until they are."
    to = tmp_path/'copy'
    shutil.copytree(_MODELS/'tiny', to, copy_function=lambda a,b: (shutil.copy(a, b) if not a.endswith('.safetensors') else __import__('os').symlink(a, b)))
    return to

UNET, VAE, TEXT = 'unet/diffusion_pytorch_model.safetensors', 'vae/diffusion_pytorch_model.safetensors', 'text_encoder/model.safetensors'

def damage(file, data=None):
    "Replace a file by its first half, or by other bytes."
    was = file.read_bytes()
    file.unlink()
    file.write_bytes(was[:len(was)//2] if data is None else data)

@pytest.mark.parametrize('part', ['unet','vae','text_encoder','tokenizer','scheduler'])
def test_folder_without_a_part(folder, part):
    shutil.rmtree(folder/part)
    one_line(lambda: load(folder, device='cpu'), str(folder), f'{part}/')

@pytest.mark.parametrize('file', [UNET, VAE, TEXT])
@pytest.mark.parametrize('how', ['half', 'empty', 'text', 'pickle', 'missing'])
def test_damaged_weights(folder, file, how):
    file = folder/file
    if how=='missing': file.unlink()
    else: damage(file, dict(half=None, empty=b'', text=b'<html>Not found</html>', pickle=b'PK\x03\x04'+bytes(400))[how])
    one_line(lambda: load(folder, device='cpu'), str(file), 'get ')

@pytest.mark.parametrize('file', [UNET, VAE, TEXT])
def test_weights_of_another_model(folder, file):
    "Whole files whose tensors are not the ones the configuration wants."
    file = folder/file
    t = load_file(file); k = max(t, key=lambda o: t[o].numel()); file.unlink()
    save_file({**t, k: t[k].flatten()[:8].clone()}, file, dict(format='pt'))
    one_line(lambda: load(folder, device='cpu'), str(file.parent))
    save_file({n: v for n,v in t.items() if n!=k}, file, dict(format='pt'))
    one_line(lambda: load(folder, device='cpu'), str(file.parent))

@pytest.mark.parametrize('file', ['unet/config.json', 'vae/config.json', 'text_encoder/config.json', 'scheduler/scheduler_config.json', 'tokenizer/tokenizer.json'])
@pytest.mark.parametrize('how', ['half', 'missing'])
def test_damaged_settings(folder, file, how):
    file = folder/file
    file.unlink() if how=='missing' else damage(file)
    one_line(lambda: load(folder, device='cpu'), str(file.parent))

@pytest.mark.parametrize('file,words,contains', [('unet/config.json', dict(addition_embed_type='text_time'), 'SDXL'), ('scheduler/scheduler_config.json', dict(prediction_type='sample'), "prediction_type 'sample'"),
    ('scheduler/scheduler_config.json', dict(beta_schedule='squaredcos_cap_v2'), "beta_schedule 'squaredcos_cap_v2'")], ids=['sdxl','predicts_pictures','cosine'])
def test_models_of_other_kinds(folder, file, words, contains):
    c = json.loads((folder/file).read_text())
    (folder/file).write_text(json.dumps(c | words))
    one_line(lambda: load(folder, device='cpu'), contains)

# -- what was fitted, and results

def test_fitted_refuses(tmp_path):
    f = Fitted('imagic', 'tiny', dict(a=torch.zeros(100)), dict(steps=3)).save(tmp_path/'good')
    assert load_fitted(tmp_path/'good').facts==dict(steps=3)
    one_line(lambda: load_fitted(tmp_path/'nothing'), 'path: ', 'nothing.safetensors')
    one_line(lambda: load_fitted(None), starts='path')
    one_line(lambda: load_fitted(''), starts='path')
    save_file(dict(a=torch.zeros(3)), tmp_path/'foreign.safetensors')
    one_line(lambda: load_fitted(tmp_path/'foreign'), 'path: ', 'foreign.safetensors', 'edit.fitted.save')
    damage(f)
    one_line(lambda: load_fitted(f), 'path: ', 'good.safetensors', 'fit it again')

@pytest.mark.parametrize('name', ['horse', 'horse.safetensors', 'horse.0.5', 'v1.2/horse'])
def test_fitted_keeps_the_name_it_is_given(tmp_path, name):
    "Only the ending is added: 'horse.0.5' and 'horse.0.7' are two files."
    f = Fitted('imagic', 'tiny', dict(a=torch.zeros(3)))
    assert f.save(tmp_path/name)==tmp_path/(name if name.endswith('.safetensors') else f'{name}.safetensors')
    assert load_fitted(tmp_path/name).method=='imagic'

@pytest.fixture(scope='module')
def result(image):
    "An edit made without a model."
    from diffedit_lab.images import Fit
    fit = Fit(image.size, 128*128, 16)
    return Edit(image, Image.new('L', image.size), np.zeros((8,8), np.float32), image, 'diffedit', dict(target='a zebra', threshold=.5), 1., 4, raw=image, geometry=fit)

@pytest.mark.parametrize('value', [1.5, -.1, NAN, '0.5', True, None], ids=repr)
def test_recut_refuses(result, value): one_line(lambda: result.recut(threshold=value), starts='threshold ')

def test_results_refuse(result, tmp_path):
    one_line(lambda: result.recut(feather=-1), starts='feather ')
    from dataclasses import replace
    one_line(lambda: replace(result, heat=None).recut(), 'diffedit', 'leave mask out', starts='recut')
    one_line(gallery, starts='edits')
    one_line(lambda: gallery(result, None), starts='edits')
    one_line(lambda: result.picture(height=0), starts='height ')
    (tmp_path/'file').write_text('x')
    one_line(lambda: result.save(tmp_path/'file'), str(tmp_path/'file'), starts='folder')

# -- the ground floor

FLOOR = dict(
    path_steps=(lambda m: path(m.schedule, 0), 'steps must be'), path_many=(lambda m: path(m.schedule, 501), 'steps must be'), path_strength=(lambda m: path(m.schedule, 10, 1.5), 'strength must be'), path_nan=(lambda m: path(m.schedule, 10, NAN), 'strength must be'),
    gaussian=(lambda m: gaussian((1,4,8,8), -1), 'seed must be'), gaussian_float=(lambda m: gaussian((1,4,8,8), 1.), 'seed must be'), cut=(lambda m: cut(np.zeros((4,4)), 2), 'threshold must be'), cut_nan=(lambda m: cut(np.zeros((4,4)), NAN), 'threshold must be'),
    schedule=(lambda m: read_schedule(dict(beta_schedule='cosine')), "beta_schedule 'cosine'"), contrast=(lambda m: find_heat(m, torch.zeros(1,4,8,8), '', 'a zebra on grass', strength=.01), 'mask_strength'))

@pytest.mark.parametrize('kind', FLOOR)
def test_ground_floor_refuses(model, kind): one_line(lambda: FLOOR[kind][0](model), starts=FLOOR[kind][1])

def test_there_are_many_kinds():
    assert len(CALLS)+len(METHOD_CALLS)+len(VERBS)+len(SCENES)+len(LOADS)+len(FLOOR)>=45 and 'tiny' in embedded()
