"Attention: what the original programs recorded, the defects that must not come back, bad inputs."
import copy, json, os, unicodedata
from difflib import SequenceMatcher
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from PIL import Image
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from diffedit_lab.attention import (cross_window, edit_attention, equalizer, inject, local_blend, refine_maps, refine_mapper, replace_maps,
                                    replace_mapper, watch, window, word_heat, word_maps, word_tokens)
from diffedit_lab.attention import _spans
from diffedit_lab.schedule import ddim, guide, read_schedule

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = Path(os.environ.get('DIFFEDIT_LAB_GOLDENS') or ROOT.parent/'shared'/'goldens')
TINY = ROOT/'diffedit_lab'/'models'/'tiny'/'tokenizer'

def cases(item): return sorted(p for p in GOLDENS.rglob(f'{item}_*') if (p/'case.json').exists()) or [pytest.param(None, marks=pytest.mark.skip(f'no {item} goldens under {GOLDENS}'))]
def read(case): return json.loads((case/'case.json').read_text())['settings'],load_file(case/'tensors.safetensors')
def named(case): return case.name if isinstance(case, Path) else None

@pytest.fixture(scope='module')
def tok(): return CLIPTokenizer.from_pretrained(TINY, local_files_only=True)

@pytest.fixture(scope='module')
def unet():
    "Three levels, cross-attention on all of them, heads that differ by level."
    torch.manual_seed(0)
    net = UNet2DConditionModel(sample_size=16, block_out_channels=(8,16,16), layers_per_block=1, cross_attention_dim=12, attention_head_dim=(2,4,4), norm_num_groups=4,
        down_block_types=('CrossAttnDownBlock2D',)*2+('DownBlock2D',), up_block_types=('UpBlock2D',)+('CrossAttnUpBlock2D',)*2)
    return net.eval().requires_grad_(False)

def noise(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
def call(unet, rows=2, h=16, w=16, n=9, seed=0): return unet(noise(rows,4,h,w, seed=seed), 100, encoder_hidden_states=noise(rows,n,12, seed=seed+1)).sample
def same_processors(a, b): return a.keys()==b.keys() and all(a[k] is b[k] for k in a)


# -- recorded: alignment

@pytest.mark.parametrize('case', cases('alignment'), ids=named)
def test_golden_alignment(case):
    s,t = read(case)
    tok = CLIPTokenizer.from_pretrained(case.parent/'model'/'tokenizer', local_files_only=True)
    for p in s['pairs']:
        a,b,k = p['source'],p['target'],p['replacement_mapper_index']
        assert tok(a).input_ids==p['source_token_ids']
        if k is None:
            with pytest.raises(ValueError): replace_mapper(tok, a, b, as_published=True)
        else: assert (replace_mapper(tok, a, b, as_published=True)-t['replacement_mappers'][k]).abs().max()<1e-7
        if (k := p.get('corrected_mapper_index')) is not None: assert (replace_mapper(tok, a, b)-t['corrected_replacement_mappers'][k]).abs().max()<1e-7
        taken,alphas = refine_mapper(tok, a, b, as_published=True)
        assert torch.equal(taken, t['refinement_mappers'][p['refinement_index']]) and torch.equal(alphas, t['refinement_alphas'][p['refinement_index']])
        if p['target_token_count']>=p['source_token_count']: assert torch.equal(refine_mapper(tok, a, b)[0], taken)
    for q in s['word_queries']:
        assert word_tokens(tok, q['text'], q['word'], as_published=True)==q['token_indices']
    for w in s['cross_windows']:
        assert torch.equal(cross_window(tok, w['prompts'][1:], w['steps'], w['cross_replace_steps'], as_published=True), t[w['tensor']].float())
    for e in s['equalizers']: assert torch.equal(equalizer(tok, e['text'], dict(zip(e['words'], e['values'])), as_published=True), t[e['tensor']])


# -- recorded: the parts of this floor together make Prompt-to-Prompt's runs

@pytest.fixture(scope='module')
def parts():
    "The golden model's parts in float64."
    cache = {}
    def get(folder):
        if folder not in cache:
            load = lambda cls,sub: cls.from_pretrained(folder/sub, torch_dtype=torch.float64, use_safetensors=True, local_files_only=True).eval().requires_grad_(False)
            cache[folder] = SimpleNamespace(unet=load(UNet2DConditionModel, 'unet'), text_encoder=load(CLIPTextModel, 'text_encoder'), tokenizer=CLIPTokenizer.from_pretrained(folder/'tokenizer', local_files_only=True))
        return cache[folder]
    return get

def carried(model, s):
    "`new` of a case: its mappers and factors"
    a,targets = s['prompts'][0],s['prompts'][1:]
    eq = equalizer(model, targets[0], dict(zip(s['equalizer']['words'], s['equalizer']['values'])), as_published=True).double()[:,None,None] if s.get('equalizer') else 1
    if s['edit']=='replace':
        M = torch.stack([replace_mapper(model, a, b, as_published=True) for b in targets])
        return lambda src,own: replace_maps(src, M)*eq
    taken,alphas = map(torch.stack, zip(*(refine_mapper(model, a, b, as_published=True) for b in targets)))
    return lambda src,own: refine_maps(src, own, taken, alphas)*eq

def blend_mask(model, s, maps, size):
    lb,prompts = s['local_blend'],s['prompts']
    cols = lambda words: [[i for w in ([ws] if isinstance(ws, str) else ws) for i in word_tokens(model, p, w, as_published=True)] for p,ws in zip(prompts, words)]
    mask = local_blend(maps, cols(lb['words']), size, lb['threshold'])
    return mask & ~local_blend(maps, cols(lb['subtract_words']), size, lb['subtract_threshold'], pool=False) if lb.get('subtract_words') else mask

@pytest.mark.parametrize('case', [c for i in ('p2p_replace','p2p_refine','p2p_reweight') for c in cases(i)], ids=named)
def test_golden_prompt_to_prompt(case, parts):
    s,t = read(case)
    model,T,B = parts(case.parent/'model'),s['steps'],len(s['prompts'])
    ids = model.tokenizer(['', *s['prompts']], padding='max_length', max_length=model.tokenizer.model_max_length, return_tensors='pt').input_ids
    emb = model.text_encoder(ids).last_hidden_state
    c,z = torch.cat([emb[:1].expand(B,-1,-1), emb[1:]]),t['start_latent'].double().expand(B,-1,-1,-1)
    sched = read_schedule(json.loads((case.parent/'model'/'scheduler'/'scheduler_config.json').read_text()))
    abar = DDIMScheduler.from_pretrained(case.parent/'model'/'scheduler').alphas_cumprod.double()
    cross = cross_window(model, s['prompts'][1:], T, s['cross_replace_steps'], as_published=True)
    fn = inject(carried(model, s), cross, window(T, s['self_replace_steps'], as_published=True), max_spots=s['self_replace_max_pixels'])
    assert torch.equal(cross, t['cross_window'].float())
    latents,masks,times = [],[],t['timesteps'].tolist()
    with edit_attention(model, fn), watch(model, rows=slice(B,None)) as maps:
        for k,time in enumerate(times):
            u,e = model.unet(torch.cat([z,z]), time, encoder_hidden_states=c).sample.chunk(2)
            to = time-1000//T
            z,mask = ddim(z, guide(u, e, s['guidance_scale']), float(abar[time]), float(abar[max(to, 0)])),torch.zeros(B,1,*z.shape[2:], dtype=torch.bool)
            if s.get('local_blend') and k>=int(s['local_blend']['start_blend']*T):
                mask = blend_mask(model, s, maps.mean(), z.shape[2:])
                z = torch.where(mask, z, z[:1])
            latents.append(z); masks.append(mask)
    want = t['latents'].double()
    assert (torch.stack(latents)-want).abs().max() <= 1e-6*want.abs().max()
    if 'blend_mask' in t: assert torch.equal(torch.stack(masks), t['blend_mask'].bool())
    mean = t['average_cross_maps']
    assert (maps.mean()[...,:mean.shape[-1]]-mean).abs().max()<1e-6
    assert sched.offset==1


# -- the defects of the originals

TEXTS = ['a horse on grass', 'A Horse, on grass!', 'a  horse   on grass ', "it's 12 o'clock", 'Ünïcode — ☃ snow', 'cafe\u0301 au lait', 'a\thorse\non grass', '...', 'a (horse) & a "zebra"',
         '1,000 İstanbul straße', 'x'*90, '', '   ', 'half-eaten strawberry_cake', '马 on 草', '👍🏽 horse']

@pytest.mark.parametrize('text', TEXTS)
@pytest.mark.parametrize('folder', [TINY, *{p.parent/'model'/'tokenizer' for p in GOLDENS.rglob('alignment_*')}], ids=lambda p: p.parent.name)
def test_spans_are_the_tokenizer_s_own(folder, text):
    tok = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    own = tok(unicodedata.normalize('NFC', text), return_offsets_mapping=True, truncation=True, max_length=tok.model_max_length)['offset_mapping']
    assert _spans(tok, text)==[(i,a,b) for i,(a,b) in enumerate(own) if b>a]

def test_words_case_punctuation_repeats(tok):
    assert word_tokens(tok, 'a cat, and a Cat!', 'cat')==[2, 6]==word_tokens(tok, 'a cat, and a Cat!', 'CAT.')
    assert word_tokens(tok, 'a  cat   on grass', 'cat')==[2] and word_tokens(tok, 'a  cat on grass', 'cat', as_published=True)!=[2]
    assert word_tokens(tok, 'a wooden  table', 'Wooden Table')==[2, 3]
    assert word_tokens(tok, 'a wooden  table', 2)==[3] and word_tokens(tok, 'a wooden table', 2, as_published=True)==[3]
    n = len(tok('unicorn').input_ids)-2
    assert n>1 and word_tokens(tok, 'a unicorn on grass', 'unicorn')==list(range(2, 2+n)) and word_tokens(tok, 'a unicorn on grass', 'grass')==[3+n]

@pytest.mark.parametrize('word', ['zebra', 'hors', 'orse', 'horse on sand', 'horses', 'a grass'])
def test_missing_word_is_an_error(tok, word):
    with pytest.raises(ValueError, match=f"^no word '{word}' in 'a horse on grass'$"): word_tokens(tok, 'a horse on grass', word)
    assert word_tokens(tok, 'a horse on grass', word, as_published=True)==[]
    with pytest.raises(ValueError, match=f"^no word '{word}' in "): equalizer(tok, 'a horse on grass', {word: 2})
    with pytest.raises(ValueError, match=f"^no word '{word}' in "): cross_window(tok, ['a horse on grass', 'a horse on grass'], 10, {word: .5})

@pytest.mark.parametrize('word', ['', '  ', None, 1.5, True, 4, -1])
def test_bad_word(tok, word):
    with pytest.raises(ValueError, match='^word must be'): word_tokens(tok, 'a horse on grass', word)

def test_word_cut_off_by_the_token_limit(tok):
    with pytest.raises(ValueError, match="^no word 'grass' in"): word_tokens(tok, 'a horse '*20+'on grass', 'grass')
    assert max(word_tokens(tok, 'a horse '*20, 'horse'))<tok.model_max_length-1

PAIRS = [('a horse on grass', 'a unicorn on grass'), ('a unicorn on grass', 'a horse on grass'), ('a unicorn on grass and a horse', 'a horse on grass and a unicorn'),
         ('a horse  on grass', 'a unicorn on  grass'), ('A horse on grass', 'a unicorn on Grass')]

@pytest.mark.parametrize('a,b', PAIRS)
def test_mapper_shift(tok, a, b):
    "Words that stay read their own column, attention is neither lost nor made, no column is empty."
    M = replace_mapper(tok, a, b)
    for v,w in zip(a.split(), b.split()):
        if v.lower()==w.lower():
            for i,j in zip(word_tokens(tok, a, v), word_tokens(tok, b, w)): assert M[i,j]==1 and M[:,j].sum()==1
    used = len(tok(a).input_ids)
    assert (M.sum(1)[:used]-1).abs().max()<1e-6 and (M.sum(0)>0).all()
    end_a,end_b = used-1,len(tok(b).input_ids)-1
    assert M[end_a,end_b]==1

def test_published_mapper_has_the_shift_missing(tok):
    a,b = PAIRS[0]
    j = word_tokens(tok, b, 'grass')[0]
    assert replace_mapper(tok, a, b, as_published=True)[j,j]==1 and word_tokens(tok, a, 'grass')!=[j]

@pytest.mark.parametrize('a,b', [('a cat', 'a big cat'), ('', 'a cat'), ('a cat', '')])
def test_replace_wants_equally_many_words(tok, a, b):
    for p in (False,True):
        with pytest.raises(ValueError): replace_mapper(tok, a, b, as_published=p)

def test_refine_padding_of_a_shorter_target(tok):
    a,b = 'a red horse on grass', 'a horse'
    words = set(range(1, len(tok(a).input_ids)-1))
    pad = slice(len(tok(b).input_ids), None)
    assert words & set(refine_mapper(tok, a, b, as_published=True)[0][pad].tolist())
    assert not words & set(refine_mapper(tok, a, b)[0][pad].tolist())

@pytest.mark.parametrize('a,b', [(a,b) for a in ('a cat', 'a red cat on sand', '') for b in ('a cat', 'a cat and a big dog on the sand', '', 'zebra')])
def test_refine_is_a_longest_common_subsequence(tok, a, b):
    x,y = tok(a).input_ids,tok(b).input_ids
    taken,alphas = refine_mapper(tok, a, b)
    got = [(int(i),j) for j,i in enumerate(taken[:len(y)]) if i>=0]
    assert all(x[i]==y[j] for i,j in got) and all(p[0]<q[0] for p,q in zip(got, got[1:]))
    assert len(got)>=sum(m.size for m in SequenceMatcher(None, x, y, False).get_matching_blocks())
    assert torch.equal(alphas, (taken>=0).float()) and int(taken.max())<tok.model_max_length

def test_integer_and_fractional_shares(tok):
    "1 and 0 are shares like 1. and 0., and no step is lost to floating point."
    for T in range(1, 200):
        assert window(T, 1)==window(T, 1.)==(0,T) and window(T, 0)==window(T, 0.)==(0,0)
        for k in range(T+1): assert window(T, k/T)==(0,k)
    for k in range(101): assert window(100, k/100)==(0,k) and window(50, round(k*.02, 2) if k<=50 else 1)==(0, min(k, 50))
    assert window(50, .58, as_published=True)==(0,28)
    share = {'cat': .4}
    assert cross_window(tok, 'a cat', 10, share).sum(0)[0,:3].tolist()==[10,10,4] and share=={'cat': .4}

@pytest.mark.parametrize('share', [1.2, -.1, True, '1', None, (.5,.2), (0,2), (.1,.2,.3), float('nan')])
def test_bad_share(share):
    with pytest.raises(ValueError, match='^share must be'): window(10, share)

def test_equalizer(tok):
    assert torch.equal(equalizer(tok, ['a red cat', 'a dog'], {'cat': 2, 'a': 0})[:,:5], torch.tensor([[1.,0,1,2,1], [1,0,1,1,1]]))
    for bad in ('2', None, float('nan'), float('inf')):
        with pytest.raises(ValueError, match='^the factor of'): equalizer(tok, 'a cat', {'cat': bad})


# -- with blocks

def test_no_trace(unet):
    "Processors, hooks, weights and results are as before, after a good block, an exception, Ctrl-C and nesting."
    before,ref = unet.attn_processors,call(unet)
    hooks = lambda: len(unet._forward_pre_hooks)
    def check(): assert same_processors(before, unet.attn_processors) and not hooks() and torch.equal(call(unet), ref)
    with watch(unet, 'all'), edit_attention(unet, lambda p,l: p), watch(unet): call(unet)
    check()
    for e in (ZeroDivisionError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(e):
            with watch(unet), edit_attention(unet, lambda p,l: p): raise e
        check()
    with pytest.raises(RuntimeError, match='^the UNet was not called'):
        with watch(unet): pass
    check()
    with pytest.raises(RuntimeError, match='^watch saw no attention'):
        with watch(unet, lambda l: l.place=='cellar'): call(unet)
    check()
    with pytest.raises(ValueError, match='^where must be'):
        with watch(unet, 'here'): call(unet)
    check()

def test_restores_whatever_was_set(unet):
    mine = AttnProcessor()
    before = unet.attn_processors
    unet.set_attn_processor(mine)
    with watch(unet): call(unet)
    assert all(p is mine for p in unet.attn_processors.values())
    unet.set_attn_processor(dict(before))

def test_probabilities_are_diffusers_own(unet):
    before = unet.attn_processors
    unet.set_attn_processor(AttnProcessor()); want = call(unet)
    unet.set_attn_processor(dict(before))
    with edit_attention(unet, lambda p,l: p): assert torch.equal(call(unet), want)
    assert (call(unet)-want).abs().max()<1e-5

@pytest.mark.parametrize('h,w', [(16,16), (24,8), (13,7), (2,2), (4,40)])
def test_any_size(unet, h, w):
    seen = []
    def fn(p, l): seen.append(l); assert p.shape[:3]==(2,l.heads,l.h*l.w) and l.h==-(-h//2**l.level) and l.w==-(-w//2**l.level); return p
    with edit_attention(unet, fn), watch(unet, 'all') as m:
        call(unet, h=h, w=w)
    assert {l.place for l in seen}=={'down','mid','up'} and {l.heads for l in seen}=={2,4}
    for size in m.sizes(): assert (m.mean(size, ('down','mid','up')).sum(-1)-1).abs().max()<1e-5 and m.mean(size, ('down','mid','up')).shape[1:3]==size

def test_no_aliasing(unet):
    "What was stored before an edit in place stays as it was; the order of the blocks says what is stored."
    def zero(p, l): return p.zero_() if l.is_cross else p
    with watch(unet) as own: call(unet)
    with watch(unet) as before, edit_attention(unet, zero), watch(unet) as after: call(unet)
    first = next(k for k in before.sums if k.place=='down')
    assert torch.equal(before.sums[first], own.sums[first]) and all(not v.any() for v in after.sums.values())

def test_all_heads_of_a_single_row(unet):
    raw = {}
    with edit_attention(unet, lambda p,l: raw.setdefault((l.name,l.call), p)), watch(unet) as m: call(unet, rows=1); call(unet, rows=1, seed=5)
    for k,v in m.sums.items():
        want = raw[k.name,0].mean(1)+raw[k.name,1].mean(1)
        assert m.count[k]==2 and raw[k.name,0].shape[1]==k.heads and (v-want).abs().max()<1e-6

def test_rows(unet):
    with watch(unet) as a, watch(unet, rows=-1) as b, watch(unet, rows=slice(1,None)) as c, watch(unet, rows=[2,0]) as d: call(unet, rows=3)
    x = a.mean()
    assert torch.equal(b.mean(), x[-1:]) and torch.equal(c.mean(), x[1:]) and torch.equal(d.mean(), x[[2,0]])
    with pytest.raises(ValueError, match='choose rows'):
        with watch(unet): call(unet, rows=2); call(unet, rows=1)

def test_maps_of_one_resolution(unet):
    with watch(unet) as m: call(unet)
    assert m.sizes()==[(16,16),(8,8),(4,4)] and m.mean().shape[1:3]==(8,8) and m.sizes(False)==[]
    assert (m.mean((4,4), ('mid',)).sum(-1)-1).abs().max()<1e-5
    for bad in (dict(size=(5,5)), dict(size=(4,4)), dict(places=('cellar',))):
        with pytest.raises(ValueError, match='^no cross-attention maps of size'): m.mean(**bad)
    with pytest.raises(ValueError, match="^no self-attention was watched: use watch"): m.mean(is_cross=False)

def test_calls_are_counted_from_the_block(unet):
    inner,outer = [],[]
    def note(to): return lambda p,l: (to.append(l.call), p)[1]
    with edit_attention(unet, note(outer)):
        call(unet)
        with edit_attention(unet, note(inner)): call(unet)
    assert set(inner)=={0} and set(outer)=={0,1}

@pytest.mark.parametrize('bad', [lambda p,l: None, lambda p,l: p[:1], lambda p,l: p.mean(1)])
def test_fn_must_return_probs(unet, bad):
    with pytest.raises(ValueError, match='^fn must return probs of shape'):
        with edit_attention(unet, bad): call(unet)

def test_values_alone(unet):
    "Other values change the result, not the maps of the first layer; zeros as values silence cross-attention."
    with edit_attention(unet, values=lambda v,l: v.roll(1, 1) if l.is_cross else v), watch(unet) as m: out = call(unet)
    with watch(unet) as plain: ref = call(unet)
    first = next(iter(m.sums))
    assert torch.equal(m.sums[first], plain.sums[first]) and (out-ref).abs().max()>1e-5

def test_gradients_pass(unet):
    c = noise(2,9,12).requires_grad_()
    with edit_attention(unet, lambda p,l: p*1.1 if l.is_cross else p): unet(noise(2,4,16,16), 100, encoder_hidden_states=c).sample.square().mean().backward()
    assert c.grad.abs().max()>0

def test_half_precision_is_summed_in_single(unet):
    net = copy.deepcopy(unet).to(torch.bfloat16)
    with watch(net) as m: net(noise(1,4,16,16).bfloat16(), 100, encoder_hidden_states=noise(1,9,12).bfloat16())
    assert all(v.dtype==torch.float32 for v in m.sums.values())

def test_sample_as_a_keyword(unet):
    with watch(unet) as m: unet(sample=noise(1,4,16,16), timestep=100, encoder_hidden_states=noise(1,9,12))
    assert m.mean().shape==(1,8,8,9)


# -- carrying maps over

def test_inject_touches_only_what_it_says(unet):
    cross = torch.ones(2,1,9); cross[1] = 0
    raw = []
    def keep(p, l): raw.append((l,p)); return p
    fn = inject(lambda src,own: src*2, cross, self_steps=(1,2), empty_steps=(0,1))
    with edit_attention(unet, keep), edit_attention(unet, fn), edit_attention(unet, keep): call(unet, 4); call(unet, 4)
    assert len(raw)==4*len(unet.attn_processors)
    for (l,a),(_,b) in zip(raw[::2], raw[1::2]):
        assert torch.equal(a[2], b[2])                                            # the source
        if l.is_cross: assert torch.equal(a[:2], b[:2]) and torch.equal(b[3], a[2]*2 if l.call==0 else a[3])
        else:
            inside = l.level>0
            assert torch.equal(b[3], a[2] if l.call==1 and inside else a[3])
            assert torch.equal(b[1], a[0] if l.call==0 and inside else a[1]) and torch.equal(a[0], b[0])

def test_inject_without_guidance_and_with_several_targets(unet):
    fn = inject(lambda src,own: src.expand_as(own), torch.ones(1,2,9), self_steps=(0,1), max_spots=10**6, guided=False)
    z = noise(1,4,16,16).expand(3,-1,-1,-1)
    with edit_attention(unet, fn), watch(unet, 'all') as m: unet(z, 100, encoder_hidden_states=noise(3,9,12))
    for v in m.sums.values(): assert (v-v[:1]).abs().max()<1e-6
    for rows in (2,4,6):
        with pytest.raises(ValueError, match='^inject is made for a source and 2 targets'):
            with edit_attention(unet, fn): call(unet, rows)
    with pytest.raises(ValueError, match='^inject is made for 1 steps, this is UNet call 2'):
        with edit_attention(unet, fn): call(unet, 3); call(unet, 3)

def test_refine_and_replace_maps():
    A = noise(3,2,5,6).softmax(-1)
    src,own = A[:1],A[1:]
    taken = torch.tensor([[0,1,-1,2,3,4],[0,-1,-1,5,4,3]]); alphas = (taken>=0).float()
    out = refine_maps(src, own, taken, alphas)
    for b in range(2):
        for j in range(6): assert torch.equal(out[b,...,j], src[0,...,taken[b,j]] if taken[b,j]>=0 else own[b,...,j])
    assert torch.equal(replace_maps(src, torch.eye(6).expand(2,-1,-1)), src.expand(2,-1,-1,-1))

def test_local_blend():
    m = torch.zeros(3,8,4,5)
    m[0,1,1,2] = m[1,6,2,3] = 1; m[1,6,3,3] = .4
    mask = local_blend(m, [[2],[3],[]], (16,8))
    assert mask.shape==(3,1,16,8) and mask.dtype==torch.bool
    assert torch.equal(mask[2], mask[0]) and (mask[0]<=mask[1]).all() and not mask[0,0,8:].any() and mask[1,0,12,4]
    assert local_blend(m, [[2],[3],[]], (16,8), pool=False).sum((1,2,3)).tolist()==[4,12,4]
    assert local_blend(m, [[2],[3],[]], (16,8), .5, pool=False).sum((1,2,3)).tolist()==[4,8,4]

def test_word_maps(unet, tok, monkeypatch):
    shown = []
    monkeypatch.setattr('diffedit_lab.attention.show', lambda *a, **k: shown.append((a,k)))
    n = tok.model_max_length
    with watch(unet) as m: call(unet, rows=2, n=n)
    word_maps(tok, m, 'a Horse, on grass', Image.new('RGB', (64,64), 'white'))
    word_maps(tok, m, 'a unicorn', Image.new('RGB', (64,64)), ['unicorn'], row=0, size=(16,16))
    (a,k),(b,_) = shown
    assert k['titles']==['a Horse, on grass', 'a', 'Horse', 'on', 'grass'] and len(a)==5 and len(b)==2 and a[1].size==(64,64)
    i = word_tokens(tok, 'a unicorn', 'unicorn')
    assert (word_heat(tok, m, 'a unicorn', 'unicorn', row=0)-m.mean()[0][...,i].sum(-1)).abs().max()==0
