"Attention: the defects of the originals that must not come back, with blocks, bad inputs. What the originals recorded: checkers_attention_p2p.py."
import copy, os, unicodedata
from difflib import SequenceMatcher
from pathlib import Path
from types import SimpleNamespace

import pytest, torch
from PIL import Image
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTokenizer

from diffedit_lab.attention import (Blend, carried_maps, carry, cross_window, edit_attention, equalizer, inject, local_blend, refine_maps, refine_mapper,
                                    replace_maps, replace_mapper, watch, window, word_heat, word_maps, word_tokens)
from diffedit_lab.attention import _only_swaps, _spans

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = Path(os.environ.get('DIFFEDIT_LAB_GOLDENS') or ROOT.parent/'shared'/'goldens')
TINY = ROOT/'diffedit_lab'/'models'/'tiny'/'tokenizer'

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
    fn = inject(lambda src,own: src.expand_as(own), torch.ones(1,2,9), self_steps=(0,1), max_spots=10**6)
    z = noise(1,4,16,16).expand(3,-1,-1,-1)
    with edit_attention(unet, fn), watch(unet, 'all') as m: unet(z, 100, encoder_hidden_states=noise(3,9,12))
    for v in m.sums.values(): assert (v-v[:1]).abs().max()<1e-6
    for rows in (1,2,4,5):
        with pytest.raises(ValueError, match='^inject is made for a source and 2 targets, 3 rows or twice'):
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
    mask = local_blend(m, [[2],[3],[]], (16,8), pool=True)
    assert mask.shape==(3,1,16,8) and mask.dtype==torch.bool
    assert torch.equal(mask[2], mask[0]) and (mask[0]<=mask[1]).all() and not mask[0,0,8:].any() and mask[1,0,12,4]
    assert local_blend(m, [[2],[3],[]], (16,8)).sum((1,2,3)).tolist()==[4,12,4]
    assert local_blend(m, [[2],[3],[]], (16,8), .5).sum((1,2,3)).tolist()==[4,8,4]

def test_the_published_mask_is_a_cell_wider():
    m = torch.zeros(2,8,8,4); m[0,3,3,2] = m[1,3,3,2] = 1.
    maps, z = SimpleNamespace(count={'a': 3}, mean=lambda: m), noise(2,4,16,16)
    def kept(pool): blend = Blend(maps, [[2],[2]], None, (.3,.3), 0, pool); out = blend(1, z); return blend.mask[1,0], out
    (here, a), (published, b) = kept(False), kept(True)
    assert here.sum()==4 and published.sum()==36 and (here<=published).all()
    assert torch.equal(a[1][:,~here], z[0][:,~here]) and torch.equal(a[1][:,here], z[1][:,here]) and torch.equal(b[1][:,published], z[1][:,published])

def test_auto_replaces_only_where_words_change_places(tok):
    yes = [('a horse on grass','a zebra on grass'), ('a horse on grass','A zebra on  sand'), ('a cat','a cat')]
    no = [('a big red cat','a cat on sand'), ('a horse on grass','a red horse on grass'), ('a red horse','a horse'), ('a horse on grass','a watercolor of a zebra on grass')]
    assert all(_only_swaps(*o) for o in yes) and not any(_only_swaps(*o) for o in no)

def test_carried_maps_of_mixed_targets(tok):
    "Each target is replaced or refined by itself, and has factors of its own."
    n, texts = tok.model_max_length, ['a horse on grass', 'a unicorn on grass', 'a red horse on grass']
    A = noise(3,2,5,n).softmax(-1)
    src,own = A[:1],A[1:]
    want = torch.cat([replace_maps(src, replace_mapper(tok, *texts[:2])[None]), refine_maps(src, own[1:], *(o[None] for o in refine_mapper(tok, texts[0], texts[2])))])
    assert torch.equal(carried_maps(tok, texts)(src, own), want)
    assert torch.equal(carried_maps(tok, texts, factors={'grass':2})(src, own), want*equalizer(tok, texts[1:], {'grass':2})[:,None,None])
    each = carried_maps(tok, texts, factors=[{'unicorn':3}, {'red':-1}])(src, own)
    assert torch.equal(each[1], want[1]*equalizer(tok, texts[2], {'red':-1})[0]) and torch.equal(each[0], want[0]*equalizer(tok, texts[1], {'unicorn':3})[0])
    assert carried_maps(tok, texts[:1])(src, own[:0]).shape==(0,2,5,n)
    for bad in (dict(edit='swap'), dict(factors=[{}])):
        with pytest.raises(ValueError, match=f'^{[*bad][0]} must be'): carried_maps(tok, texts, **bad)

def test_carry(unet, tok):
    "The blend begins when it should, keeps the outside, joins the source's mask and takes away what is subtracted; nothing stays behind."
    both, texts, n = SimpleNamespace(unet=unet, tokenizer=tok), ['a horse on grass','a zebra on grass'], tok.model_max_length
    before, z = unet.attn_processors, noise(2,4,16,16, seed=3)
    def walk(**how):
        out = []
        with carry(both, texts, 4, **how) as blend:
            for k in range(4): call(unet, 4, n=n); out.append((blend(k, z), blend.mask))
        return out, blend
    plain,b = walk()
    assert all(torch.equal(x, z) and m is None for x,m in plain) and b.found()==(None,None) and set(b.maps.count.values())=={4} and len(b.maps.mean())==2
    out,b = walk(blend=('horse','zebra'), threshold=.9, start=.5)
    assert [m is None for _,m in out]==[True,True,False,False]
    x,m = out[-1]
    assert torch.equal(x[0], z[0]) and torch.equal(x[1], torch.where(m[1], z[1], z[0])) and (m[0]<=m[1]).all() and m.any() and not m.all()
    mask,heat = b.found()
    assert ((heat>.9)==(mask>0)).all() and mask.shape==(16,16)
    rows = walk(blend=[['horse'],['zebra']], threshold=.9)[0][-1][1]
    assert torch.equal(rows, walk(blend=['zebra','horse'], threshold=.9)[0][-1][1])
    less = walk(blend=('horse','zebra'), subtract='grass', threshold=(.9,.5))[0][-1][1]
    assert (less<=rows).all() and (less!=rows).any()
    assert same_processors(before, unet.attn_processors)
    for bad,what in ((dict(blend='cow'), "^no word 'cow' in"), (dict(subtract='horse'), '^subtract takes words out of a blend'), (dict(blend=[['horse'],['zebra'],['zebra']]), '^give the words of a blend'), (dict(self_=2), '^share must be')):
        with pytest.raises(ValueError, match=what): carry(both, texts, 4, **bad)
    for rows in (1,3):
        with pytest.raises(ValueError, match='^inject is made'), carry(both, texts, 4): call(unet, rows, n=n)
    assert same_processors(before, unet.attn_processors)

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
