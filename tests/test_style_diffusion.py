"""StyleDiffusion and its tables: what is no lesson. The numbers of the original are in checkers_attention_style.py."""
import csv

import numpy as np, pytest, torch

import diffedit_lab.methods.style_diffusion as sd
from diffedit_lab import load
from diffedit_lab.attention import refine_mapper
from diffedit_lab.methods.style_diffusion import style_diffusion
from diffedit_lab.style_batch import learned_file, ns_lpips, read_row, selected_region, style_csv

FEW = dict(source='a horse on grass', steps=2, inner=1)

@pytest.fixture(scope='module')
def first(model, judge, scene): return style_diffusion(model, scene.image, target='a zebra on grass', clip=judge, **FEW)

def test_clip_is_asked_once_a_picture_and_the_networks_once_an_edit(model, judge, scene, monkeypatch):
    calls = dict(tower=0, mapped=0)
    hook = judge.net.vision_model.register_forward_hook(lambda *a: calls.update(tower=calls['tower']+1))
    mapped = sd.mapped
    monkeypatch.setattr(sd, 'mapped', lambda *a: (calls.update(mapped=calls['mapped']+1), mapped(*a))[1])
    try: e = style_diffusion(model, scene.image, clip=judge, **FEW)
    finally: hook.remove()
    assert calls==dict(tower=1, mapped=2+2+1)   # an iteration and the step itself, twice; then all steps of the edit at once
    style_diffusion(model, scene.image, fitted=e.fitted, **FEW)
    assert calls==dict(tower=1, mapped=6)

def test_only_the_network_learns_even_where_others_could(model, judge, scene):
    parts = model.unet, judge.net.vision_model
    try:
        for p in parts: p.requires_grad_(True)
        style_diffusion(model, scene.image, clip=judge, **FEW)
        assert all(w.grad is None for p in parts for w in p.parameters())
    finally:
        for p in parts: p.requires_grad_(False)

def test_learns_inside_no_grad(model, judge, scene, first):
    with torch.no_grad(): e = style_diffusion(model, scene.image, target='a zebra on grass', clip=judge, **FEW)
    assert np.array_equal(np.asarray(e.raw), np.asarray(first.raw))

def test_saved_and_reloaded_is_the_same_edit(model, scene, first, tmp_path):
    again = style_diffusion(model, scene.image, target='a zebra on grass', fitted=first.fitted.save(tmp_path/'horse'), **FEW)
    assert np.array_equal(np.asarray(again.raw), np.asarray(first.raw)) and again.rows==2*2*2
    for words,says in ((dict(steps=3), 'steps must be 2'), (dict(source='a horse on sand'), 'source must be'), (dict(guidance=3.), 'guidance must be 7.5')):
        with pytest.raises(ValueError, match=says): style_diffusion(model, scene.image, fitted=first.fitted, **FEW | words)
    with pytest.raises(ValueError, match='another picture'): style_diffusion(model, scene.image.rotate(90), fitted=first.fitted, **FEW)

@pytest.mark.parametrize('film', [True, False])
def test_learned_values_go_with_their_words(model, film):
    texts = 'a horse on grass', 'a pencil sketch of a horse on grass'
    n = model.tokenizer.model_max_length
    rows = torch.randn(3, n*(1+film), 96, generator=torch.Generator().manual_seed(0))
    v, c = sd.text_values(model, texts, rows), model.embed(texts)
    assert torch.equal(v[:,:1], sd.restyle(c[None,:1], rows[:,None]))
    taken, known = refine_mapper(model, *texts)
    for j in range(n):
        here = v[:,1,j]
        if not known[j]: assert torch.allclose(here, c[1,j].expand_as(here), atol=1e-6)
        else: assert torch.allclose(here, c[1,j]*rows[:,taken[j]]+rows[:,n+taken[j]] if film else rows[:,taken[j]], atol=1e-5)
    assert sd.text_values(model, texts[:1], rows).shape==(3, 1, n, 96)

def test_the_empty_prompt_keeps_its_values(model):
    c = torch.randn(4, 8, 16)
    layer = type('Layer', (), dict(is_cross=True, call=1))
    v = torch.randn(3, 2, 8, 16)
    for span,own in (((0,2), v[1,1]), ((0,1), c[3])):
        got = sd.style_values(v, span)(c, layer)
        assert torch.equal(got[:2], c[:2]) and torch.equal(got[2], v[1,0]) and torch.equal(got[3], own)
    layer.is_cross = False
    assert sd.style_values(v)(c, layer) is c

def test_other_sizes_and_half_precision(judge, scene):
    "Every dimension follows the model; a model in half precision learns in float32 and is handed back."
    small = load('tiny', device='cpu', dtype=torch.bfloat16)
    before = [p.data_ptr() for p in small.unet.parameters()]
    e = style_diffusion(small, scene.image.resize((120,60)), source='horse', target='zebra', clip=judge, steps=1, inner=1)
    assert e.image.size==(120,60) and small.dtype==torch.bfloat16 and [p.data_ptr() for p in small.unet.parameters()]==before
    assert e.fitted.tensors['start_weight'].dtype==torch.float32 and torch.isfinite(e.fitted.tensors['start_weight']).all()

def test_published_sizes():
    net = sd.new_mapping(197, 2*77)
    assert sum(w.numel() for w in net.values())==78540 and sd.mapped(net, torch.zeros(1,197,768)).shape==(1,154,768)
    assert sum(sd.inner_steps(100, i) for i in range(30))==1015
    assert torch.equal(net['mid_weight'], sd.new_mapping(197, 154)['mid_weight']) and not torch.equal(net['mid_weight'], sd.new_mapping(197, 154, 1)['mid_weight'])

# -- the tables

ROW = dict(zip(('','case_number','prompt','image_path','url','target','blend_word','eq_params','tau_v','tau_c','tau_s','tau_u','edit_type'),
               ('0','7',"a horse on grass",'horse.png','','a zebra on grass',"[('horse',),('zebra',)]","[('zebra',),(2,)]",'[.5,]','[.6]','[.2,.8]','[.5,]','Replacement')))

@pytest.fixture
def table(tmp_path, scene):
    scene.image.save(tmp_path/'horse.png')
    def write(*rows, name='table.csv'):
        with (tmp_path/name).open('w', newline='') as f:
            w = csv.DictWriter(f, list(rows[0])); w.writeheader(); w.writerows(rows)
        return tmp_path/name
    return write

def test_a_table_is_done_once_and_resumed(model, judge, table, tmp_path):
    file, words = table(ROW), dict(save_path=tmp_path/'out', models=tmp_path, clip=judge, steps=2, inner=1)
    done, = style_csv(model, file, **words)
    assert done['state']=='edited' and (tmp_path/'model_learnv'/'model-inner1-epoch1-learnv-[7].safetensors').exists()
    names = [f'{k}_img-tau_v0.5-tau_c0.6-tau_s{s}-tau_u0.5.png' for s in (.2,.8) for k in ('edited','grid')]
    assert done['files']==[tmp_path/'out'/'table'/'7 a zebra on grass'/n for n in names] and all(p.exists() for p in done['files'])
    rows = model.rows
    assert [o['state'] for o in style_csv(model, file, **words)]==['there'] and model.rows==rows
    assert not list((tmp_path/'out').rglob('.*')), 'a draft was left behind'
    failed, = style_csv(model, file, **words | dict(steps=3, save_path=tmp_path/'other'))
    assert failed['state']=='failed' and 'steps must be 2' in failed['error']

def test_a_stop_leaves_no_half_file(model, judge, table, tmp_path, monkeypatch):
    from PIL import Image
    def stop(self, path, *a, **k): open(path, 'wb').write(b'half'); raise KeyboardInterrupt
    file, words = table(ROW), dict(save_path=tmp_path/'out', models=tmp_path, clip=judge, steps=2, inner=1)
    with monkeypatch.context() as m:
        m.setattr(Image.Image, 'save', stop)
        with pytest.raises(KeyboardInterrupt): list(style_csv(model, file, **words))
    assert not [p for p in (tmp_path/'out').rglob('*.png') if not p.name.startswith('.')]
    done, = style_csv(model, file, **words)
    assert done['state']=='edited' and all(p.stat().st_size>1000 for p in done['files'])

def test_rows_are_read_or_refused_in_words(table, tmp_path):
    file = table(ROW)
    assert read_row(ROW | dict(blend_word='None', eq_params='', edit_type='Refinement'), file)['factors']=={}
    for words,says in ((dict(prompt=''), 'prompt is missing'), (dict(target=' '), 'target is missing'), (dict(tau_u='[.5'), 'tau_u must be a Python list'), (dict(tau_u='__import__("os")'), 'tau_u must be'), (dict(edit_type='Negative'), 'edit_type must be one of')):
        with pytest.raises(ValueError, match=says): read_row(ROW | words, file)
    with pytest.raises(FileNotFoundError, match='no picture'): read_row(ROW | dict(image_path="a dog's.png"), file)
    assert learned_file('3', 'cat', regularise=0).parent.name=='model_learnv_woattnloss_1word'

def test_unusable_tables(model, tmp_path):
    with pytest.raises(FileNotFoundError, match='no table'): list(style_csv(model, tmp_path/'none.csv'))
    (tmp_path/'odd.csv').write_text('a,b\n1,2\n')
    with pytest.raises(ValueError, match='needs the columns'): list(style_csv(model, tmp_path/'odd.csv'))

# -- NS-LPIPS

def test_ns_lpips_sees_the_outside_only(scene, monkeypatch):
    pytest.importorskip('torchmetrics')
    import diffedit_lab.style_batch as sb
    monkeypatch.setattr(sb, '_lpips', lambda net: lambda a, b: (a-b).abs().mean())   # the distance is torchmetrics' business, what it sees is ours
    inside, outside = scene.image.copy(), scene.image.copy()
    box = np.zeros((128,128), np.float32); box[32:96,32:96] = 1
    inside.paste((255,0,0), (40,40,88,88)); outside.paste((255,0,0), (0,0,20,20))
    for p in (False, True):
        assert ns_lpips(scene.image, inside, box, as_published=p)==0 < ns_lpips(scene.image, outside, box, as_published=p)
    soft = box*.9
    assert ns_lpips(scene.image, inside, soft)==0 < ns_lpips(scene.image, inside, soft, as_published=True)   # the cut that the authors' program forgets

def test_ns_lpips_says_what_it_lacks(scene):
    try: import torchvision
    except ImportError:
        with pytest.raises(ImportError, match='pip install torchmetrics torchvision.*clip_distance'): ns_lpips(scene.image, scene.image, np.zeros((128,128)))

def test_the_region_is_the_words(model, scene):
    rows = model.rows
    r = selected_region(model, scene.image, 'a horse on grass', 'horse', steps=2)
    assert r.size==scene.image.size and np.asarray(r).max()>200 and model.rows-rows==2
    with pytest.raises(ValueError, match="no word 'cow'"): selected_region(model, scene.image, 'a horse on grass', 'cow', steps=2)
