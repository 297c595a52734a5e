"Stable Diffusion's own shapes, other people's folders, the hub, devices and dtypes; and diffusers' pipeline as a witness."
import json, warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import diffedit_lab.model as lib
from diffedit_lab import diffedit, fast_diffedit, load, sdedit
from diffedit_lab.loops import denoise, invert
from diffedit_lab.model import MIRRORS, best_device, check_weights, embedded
from diffedit_lab.schedule import CLEAN, gaussian, path

METHODS = dict(sdedit=sdedit, diffedit=diffedit, fast_diffedit=fast_diffedit)
LETTERS = 'abcdefghijklmnopqrstuvwxyz0123456789'

# -- small random folders in Stable Diffusion's shapes

def tokenizer(folder, pad):
    "CLIP's tokenizer with letters for words, 77 tokens."
    words = [*LETTERS, *(f'{o}</w>' for o in LETTERS), '!', '!</w>', '<|startoftext|>', '<|endoftext|>']
    folder.mkdir(parents=True)
    (folder/'vocab.json').write_text(json.dumps({w: i for i,w in enumerate(words)}))
    (folder/'merges.txt').write_text('#version: 0.2\n')
    facts = dict(tokenizer_class='CLIPTokenizer', model_max_length=77, bos_token='<|startoftext|>', eos_token='<|endoftext|>', unk_token='<|endoftext|>', pad_token=pad)
    (folder/'tokenizer_config.json').write_text(json.dumps(facts))
    return CLIPTokenizer.from_pretrained(folder), len(words)

def make(folder, prediction='epsilon', sd2=False, channels=4):
    "Save a random model in the shape of SD 1.x or 2.x: four levels, a factor-8 codec, 77 tokens."
    torch.manual_seed(0)
    tok, n = tokenizer(folder/'made', '!' if sd2 else '<|endoftext|>')
    width = 48 if sd2 else 32
    unet = UNet2DConditionModel(sample_size=16, in_channels=channels, out_channels=4, block_out_channels=(32,32,64,64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=width,
        down_block_types=('CrossAttnDownBlock2D',)*3+('DownBlock2D',), up_block_types=('UpBlock2D',)+('CrossAttnUpBlock2D',)*3, attention_head_dim=(2,2,4,4) if sd2 else 4, use_linear_projection=sd2)
    vae = AutoencoderKL(block_out_channels=(8,8,16,16), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=128, down_block_types=('DownEncoderBlock2D',)*4, up_block_types=('UpDecoderBlock2D',)*4)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=n, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=77, hidden_act='gelu' if sd2 else 'quick_gelu',
        bos_token_id=n-2, eos_token_id=n-1, pad_token_id=tok.pad_token_id))
    sched = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction)
    pipe = StableDiffusionPipeline(vae, text, tok, unet, sched, None, None, requires_safety_checker=False)
    pipe.save_pretrained(folder/'model')
    return folder/'model'

SHAPES = dict(sd15={}, sd15_v=dict(prediction='v_prediction'), sd21=dict(prediction='v_prediction', sd2=True), sd21_base=dict(sd2=True))

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Shape -> folder, made when asked for."
    made = {}
    def get(shape, **words):
        if shape not in made: made[shape] = make(tmp_path_factory.mktemp(shape), **(words or SHAPES[shape]))
        return made[shape]
    return get

def onto_cpu(folder, **words): return load(folder, device='cpu', **{'dtype': torch.float32, **words})
def picture(w, h): return Image.fromarray(np.random.default_rng(0).integers(0, 256, (4,5,3), dtype=np.uint8)).resize((w,h), Image.BICUBIC)
def warned(f):
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        out = f()
    return out, [str(w.message) for w in ws if issubclass(w.category, UserWarning)]
def one_line(f, error, *contains):
    with pytest.raises(error) as e: f()
    said = str(e.value)
    assert '\n' not in said and all(o in said for o in contains), said

@pytest.mark.parametrize('shape', SHAPES)
def test_shapes_of_stable_diffusion(folders, shape):
    m = onto_cpu(folders(shape))
    assert (m.channels, m.factor, m.multiple, m.area)==(4, 8, 64, 128*128)
    assert m.schedule.prediction==SHAPES[shape].get('prediction', 'epsilon') and len(m.schedule)==1000 and m.schedule.offset==1
    c = m.embed(['', 'a zebra'])
    assert c.shape[:2]==(2,77) and c.shape[2]==m.unet.config.cross_attention_dim
    z = m.encode(picture(128, 192))
    assert z.shape==(1,4,24,16) and m.decode(z).size==(128,192)
    assert not any(p.requires_grad for n in (m.unet, m.vae, m.text_encoder) for p in n.parameters()) and not m.unet.training

@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('size', [(128,128), (97,67), (200,80)], ids=str)
def test_methods_on_the_shapes(folders, shape, name, size):
    m, words = onto_cpu(folders(shape)), dict(target='a zebra', steps=3)
    if name!='sdedit': words |= dict(source='a horse', n=1)
    e, said = warned(lambda: METHODS[name](m, picture(*size), **words))
    assert e.image.size==size and e.rows>0 and said==[]

@pytest.mark.parametrize('shape', ['sd15', 'sd21'])
def test_inversion_comes_back(folders, shape):
    "One row a step, the clean latent kept; and with the same prediction at each level, up and down is the identity."
    m = onto_cpu(folders(shape))
    z, times = m.encode(picture(128, 128)), path(m.schedule, 10, .5)
    up = invert(m, z, times)
    assert list(up)==times and torch.equal(up[CLEAN], z) and m.rows==len(times)-1 and all(torch.isfinite(x).all() for x in up.values())
    fixed = SimpleNamespace(schedule=m.schedule, eps=lambda x, t, *_: gaussian(x.shape, t))
    up = invert(fixed, z, times, m.embed(''))
    assert (denoise(fixed, up[times[-1]], m.embed(''), times, 1.)-z).abs().max()<1e-4

# -- the same folder in diffusers' pipeline

def in_diffusers(folder, m, prompt, z, steps, guidance, negative=None):
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, negative_prompt=negative, latents=z.clone(), num_inference_steps=steps, guidance_scale=guidance, height=z.shape[2]*m.factor, width=z.shape[3]*m.factor, output_type='latent').images

@pytest.mark.parametrize('prompt,guidance,negative,size', [('a horse on grass', 7.5, None, (32,32)), ('a red car at night', 3., 'snow', (16,48))], ids=['square','wide'])
def test_pipeline_agrees_on_the_embedded_model(model, prompt, guidance, negative, size):
    "`StableDiffusionPipeline.from_pretrained(folder)` loads it, and draws what `denoise` draws."
    z = gaussian((1,4,*size), 3)
    theirs = in_diffusers(lib._MODELS/'tiny', model, prompt, z, 4, guidance, negative)
    ours = denoise(model, z, model.embed(prompt), path(model.schedule, 4), guidance, negative=model.embed(negative or ''))
    assert (ours-theirs).abs().max()<1e-3

@pytest.mark.parametrize('shape', SHAPES)
def test_pipeline_agrees_on_the_shapes(folders, shape):
    m, z = onto_cpu(folders(shape)), gaussian((1,4,8,16), 1)
    theirs = in_diffusers(folders(shape), m, 'a zebra', z, 6, 7.5, 'fog')
    ours = denoise(m, z, m.embed('a zebra'), path(m.schedule, 6), 7.5, negative=m.embed('fog'))
    assert (ours-theirs).abs().max()<1e-3*max(1., float(theirs.abs().max()))

def test_the_embedded_folder_runs_in_diffusers_as_it_is():
    "No dtype asked for: the parts must agree on one, whatever the files hold."
    pipe = StableDiffusionPipeline.from_pretrained(lib._MODELS/'tiny', local_files_only=True)
    assert pipe.text_encoder.dtype==pipe.unet.dtype==pipe.vae.dtype
    assert pipe('a horse on grass', num_inference_steps=1).images[0].size==(128,128)

# -- nine channels

def test_an_inpainter_fills_the_mask(folders):
    m, fill = onto_cpu(folders('sd15')), onto_cpu(folders('nine', channels=9))
    assert fill.channels==9
    im, mask = picture(128, 128), np.zeros((128,128)); mask[32:96,32:96] = 1
    e = fast_diffedit(m, im, target='a zebra', mask=mask, steps=3, inpainter=fill)
    assert e.rows==6==fill.rows and e.image.size==im.size
    assert not any(hasattr(v, 'eps') or isinstance(v, torch.nn.Module) for v in e.settings.values()), 'the result keeps the inpainter alive'
    for f in METHODS.values(): one_line(lambda: f(fill, im, target='a zebra'), ValueError, '9 channels', f"{f.__name__} needs 4", "load('tiny')")

# -- names on the hub, none of them asked

@pytest.fixture
def hub(monkeypatch):
    "A hub that has what is put into the dictionary, and a list of the names it was asked for."
    has, asked = {}, []
    def fetch(name, **words):
        asked.append(name)
        if name not in has: raise OSError(f'404 Client Error.\n\nRepository Not Found for url: https://huggingface.co/api/models/{name}.')
        return str(has[name])
    monkeypatch.setattr(lib, 'snapshot_download', fetch)
    return has, asked

@pytest.mark.parametrize('gone', MIRRORS)
def test_a_gone_name_falls_back(hub, folders, gone):
    has, asked = hub
    mirror = MIRRORS[gone][-1]
    has[mirror] = folders('sd15')
    m, said = warned(lambda: load(gone, device='cpu', dtype=torch.float32))
    assert m.channels==4 and asked==[gone, *MIRRORS[gone]]
    assert len(said)==1 and '\n' not in said[0] and gone in said[0] and mirror in said[0]

def test_a_name_that_answers_says_nothing(hub, folders):
    has, asked = hub
    has['someone/model'] = folders('sd15')
    m, said = warned(lambda: load('someone/model', device='cpu'))
    assert said==[] and asked==['someone/model'] and m.name=='someone/model'

@pytest.mark.parametrize('name', ['runwayml/stable-diffusion-v1-5', 'someone/nothing'])
def test_no_network_is_one_line(hub, name):
    one_line(lambda: load(name), ConnectionError, name, 'tiny', 'local', 'folder', *MIRRORS.get(name, ()))
    assert hub[1]==[name, *MIRRORS.get(name, ())]

def test_a_download_cut_short_is_named(hub, folders, tmp_path):
    import shutil
    to = tmp_path/'half'
    shutil.copytree(folders('sd15'), to)
    file = to/'unet/diffusion_pytorch_model.safetensors'
    file.write_bytes(file.read_bytes()[:-1000])
    hub[0]['someone/half'] = to
    one_line(lambda: load('someone/half', device='cpu'), ValueError, str(file), 'truncated', 'get it again')
    one_line(lambda: check_weights(file), ValueError, str(file), 'truncated')
    one_line(lambda: load(to, device='cpu'), ValueError, str(file))

def test_names_embedded_folders_and_paths(folders, monkeypatch, hub):
    "An embedded name, a path as text, a Path, a relative path: none of them asks the hub."
    assert 'tiny' in embedded() and 'tiny-clip' in embedded()
    folder = folders('sd15')
    monkeypatch.chdir(folder.parent)
    for name in (str(folder), folder, 'model', './model', Path('model')): assert onto_cpu(name).factor==8
    assert hub[1]==[]

def test_a_folder_called_tiny_is_not_the_tiny_model(folders, monkeypatch):
    "Only the embedded family has a list of words it knows."
    folder = folders('sd15')
    monkeypatch.chdir(folder.parent)
    Path('tiny-of-mine').symlink_to(folder, target_is_directory=True)
    assert warned(lambda: onto_cpu('tiny-of-mine').embed('a wombat'))[1]==[]

# -- devices and dtypes

@pytest.mark.parametrize('cuda,mps,best', [(True,True,'cuda'), (False,True,'mps'), (False,False,'cpu')])
def test_best_device(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
    assert best_device()==best

def test_defaults(folders, monkeypatch):
    m = load(folders('sd15'), device='cpu')
    assert m.device==torch.device('cpu') and m.dtype==torch.float32 and m.vae.dtype==torch.float32 and m.rows==0
    monkeypatch.setattr(lib, 'best_device', lambda: 'cpu')
    assert load(folders('sd15')).device.type=='cpu'
    asked = []
    monkeypatch.setattr(lib, 'best_device', lambda: 'cuda')
    monkeypatch.setattr(lib, '_read_folder', lambda folder, name, device, dtype: asked.append((device.type, dtype)))
    load(folders('sd15')); load(folders('sd15'), dtype=torch.float32); load(folders('sd15'), device='cpu')
    assert asked==[('cuda',torch.float16), ('cuda',torch.float32), ('cpu',torch.float32)]

@pytest.mark.parametrize('name', METHODS)
def test_bfloat16_on_the_cpu(folders, name):
    m = onto_cpu(folders('sd15'), dtype=torch.bfloat16)
    assert m.dtype==torch.bfloat16 and m.text_encoder.dtype==torch.bfloat16 and m.vae.dtype==torch.float32
    e = METHODS[name](m, picture(97, 67), target='a zebra', steps=3, **({} if name=='sdedit' else dict(n=1)))
    assert e.image.size==(97,67) and (e.heat is None or e.heat.dtype==np.float32)
    assert m.dtype==torch.bfloat16

def test_loading_leaves_no_trace(folders):
    "Neither the generators nor diffusers' verbosity change."
    from diffusers.utils import logging
    level, state = logging.get_verbosity(), torch.get_rng_state()
    onto_cpu(folders('sd15'))
    assert logging.get_verbosity()==level and torch.equal(torch.get_rng_state(), state)
