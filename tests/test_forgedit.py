"Imagic, Forgedit and its DreamBooth form on a small random UNet: what is learned, kept, refused and given back."
import numpy as np, pytest, torch
from diffusers import UNet2DConditionModel

from diffedit_lab import load_fitted, scene
from diffedit_lab.methods.forgedit import DREAMBOOTH_STRATEGIES, STRATEGIES, caption, dreambooth_forgedit, forget_names, forgedit, published, suggest, trained_names, vp
from diffedit_lab.methods.imagic import imagic
from test_tuning import small

QUICK = dict(steps=2, guidance=2.)
LEARN = {forgedit: dict(source='a horse on grass', updates=2, batch=3), dreambooth_forgedit: dict(source='a horse on grass', updates=2, batch=2), imagic: dict(embedding_updates=1, unet_updates=2, batch=2)}
every = pytest.mark.parametrize('method', LEARN, ids=lambda f: f.__name__)
target = 'a zebra on grass'

def pixels(e): return np.asarray(e.image)
@pytest.fixture
def image(): return scene('a horse on grass', seed=3).image

@every
def test_learned_once_used_again(method, small, image, tmp_path):
    first = method(small, image, target=target, **LEARN[method], **QUICK)
    file = first.fitted.save(tmp_path/'horse')
    for fitted in (first.fitted, file, str(file), load_fitted(file)):
        again = method(small, image, target=target, fitted=fitted, **QUICK)
        assert np.array_equal(pixels(first), pixels(again)) and again.rows==4

@every
def test_only_what_moved_is_kept(method, small, image):
    f = method(small, image, target=target, **LEARN[method], **QUICK).fitted
    unet = {n.removeprefix('unet.') for n in f.tensors if n.startswith('unet.')}
    may = trained_names(small.unet) if method is forgedit else [n for n,_ in small.unet.named_parameters()]
    assert unet and unet<=set(may) and all(t.device.type=='cpu' for t in f.tensors.values())
    assert ('embedding' in f.tensors)==(method is not dreambooth_forgedit) and any(n.startswith('text_encoder.') for n in f.tensors)==(method is dreambooth_forgedit)
    assert len(f.facts['losses'])==sum(v for k,v in LEARN[method].items() if 'updates' in k)

@every
def test_what_was_learned_elsewhere_is_refused(method, small, model, image, tmp_path):
    f = method(small, image, target=target, **LEARN[method], **QUICK).fitted
    with pytest.raises(ValueError, match='another base model'): method(model, image, target=target, fitted=f)
    with pytest.raises(ValueError, match='another picture'): method(small, image.rotate(90), target=target, fitted=f)
    other = imagic if method is not imagic else forgedit
    with pytest.raises(ValueError, match='learned by'): other(small, image, target=target, fitted=f)
    file = f.save(tmp_path/'x'); file.write_bytes(file.read_bytes()[:len(file.read_bytes())//2])
    with pytest.raises(ValueError, match='truncated or damaged'): method(small, image, target=target, fitted=file)

@every
@pytest.mark.parametrize('at', [1, 3, 5])
def test_ctrl_c_leaves_the_model_unchanged(method, small, image, at):
    nets = small.unet, small.text_encoder
    before, calls = [(p.data_ptr(), p.clone()) for net in nets for p in net.parameters()], []
    def press(*_):
        calls.append(1)
        if len(calls)==at: raise KeyboardInterrupt
    hook = small.unet.register_forward_pre_hook(press)
    with pytest.raises(KeyboardInterrupt): method(small, image, target=target, micro=1, **LEARN[method], **QUICK)
    hook.remove()
    for (q,w),p in zip(before, (p for net in nets for p in net.parameters())): assert p.data_ptr()==q and torch.equal(p, w) and not p.requires_grad and p.grad is None

def test_half_precision_models_learn(small, image):
    small.unet.half()
    try: f = forgedit(small, image, target=target, **LEARN[forgedit], **QUICK)
    except RuntimeError as e: pytest.skip(f'no half precision on this CPU: {e}')
    assert small.dtype==torch.float16 and all(np.isfinite(f.fitted.facts['losses']))

def test_strengths_are_variants(small, image):
    e = forgedit(small, image, target=target, interpolation='vp', alpha=[.8,.9], beta=[1.,1.2,1.4], **LEARN[forgedit], **QUICK)
    assert [(v.settings['alpha'], v.settings['beta']) for v in e.variants]==[(a,b) for a in (.8,.9) for b in (1.,1.2,1.4)] and e.rows==6+6*4
    one = forgedit(small, image, target=target, interpolation='vp', alpha=.9, beta=1., fitted=e.fitted, **QUICK)
    assert np.abs(pixels(one).astype(int)-pixels(e.variants[3])).max()<=1
    g = imagic(small, image, target=target, eta=[0,1], **LEARN[imagic], **QUICK)
    assert [v.settings['eta'] for v in g.variants]==[0,1]

def test_forgetting_everything_is_the_pretrained_network(small, image):
    "`noencoder` with a fitted that learned in the encoder only."
    f = forgedit(small, image, target=target, **LEARN[forgedit], **QUICK).fitted
    f.tensors = {n: t for n,t in f.tensors.items() if 'up_blocks' not in n}
    bare = forgedit(small, image, target=target, fitted=f, forget='noencoder', **QUICK)
    f.tensors = {'embedding': f.tensors['embedding']}
    assert np.array_equal(pixels(bare), pixels(forgedit(small, image, target=target, fitted=f, **QUICK)))

def test_strategies_name_what_exists(small):
    names = [n for n,_ in small.unet.named_parameters()]
    with pytest.raises(ValueError) as e: forget_names(names, 'encoder')
    assert all(k in str(e.value) for k in STRATEGIES)
    with pytest.raises(ValueError, match='noencoderkv'): forget_names(names, 'encoderkv', DREAMBOOTH_STRATEGIES)
    assert len(STRATEGIES)==8 and all(suggest(k) in STRATEGIES for k in ('facing','object','style','remove'))

def test_stable_diffusion_counts_of_the_dreambooth_form():
    with torch.device('meta'): names = [n for n,_ in UNet2DConditionModel(sample_size=64, block_out_channels=(320,640,1280,1280), layers_per_block=2, cross_attention_dim=768).named_parameters()]
    counts = {k: len(forget_names(names, k, DREAMBOOTH_STRATEGIES)) for k in DREAMBOOTH_STRATEGIES}
    assert counts=={'donotforget': 0, 'noencoder': 246, 'encoderattn': 186, 'encoderattn+encoder1': 130, 'decoderattn': 294, 'nodecoder': 384, 'noencoderkv': 12}

def test_projection_survives_zero_and_parallel_tokens():
    s, t = torch.tensor([[[0.,0,0],[1,2,2],[1,2,2]]]), torch.tensor([[[1.,2,3],[1,2,2],[-2,-4,-4]]])
    assert torch.allclose(vp(s, t, .5, 1.), torch.tensor([[[1.,2,3],[.5,1,1],[.5,1,1]]]), atol=1e-6)

def test_captions(small, image):
    seen = []
    def captioner(im): seen.append(im.size); return 'a horse on grass'
    e = forgedit(small, image, target='A photo of a zebra on grass', captioner=captioner, updates=1, batch=1, **QUICK)
    assert e.fitted.facts['source']=='A photo of a horse on grass' and seen==[(128,128)]
    with pytest.raises(ValueError, match="source: .*give source="): caption(small, image, captioner='/no/such/folder')

def test_flags():
    assert published(textsteps=400, bsz=4)['updates']==100 and published(gammastart=5, gammaend=8)['gamma']==[.5,.6,.7]

@pytest.mark.parametrize('words,says', [(dict(forget='x'), 'forget must be one of'), (dict(interpolation='x'), "'vs' or 'vp'"), (dict(gamma=[]), 'gamma must be'), (dict(degree=2), 'degree must be'), (dict(updates=0), 'updates must be'),
                                        (dict(micro=0), 'micro must be'), (dict(unet_lr=-1), 'unet_lr must be'), (dict(fitted=3), 'fitted must be')], ids=lambda o: str(o)[:20])
def test_bad_words(small, image, words, says):
    with pytest.raises(ValueError, match=says): forgedit(small, image, target=target, source='', **words)
