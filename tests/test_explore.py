"The control panel, the brush, the sweep and the film over all methods, without a browser."
import html, inspect, io, sys, time
from threading import Thread

import ipywidgets as W, numpy as np, pytest, torch
from PIL import Image

from diffedit_lab import scene as make_scene
from diffedit_lab.bench import all_methods
from diffedit_lab.widgets import explore, film, grid, knob, listening, paint, remembering, words_of
from diffedit_lab.loops import progress
from diffedit_lab.methods.diffedit import diffedit
from diffedit_lab.methods.sdedit import sdedit
from test_properties import METHODS, MODELS, QUICK, WORDS, _other, every, knows, picture, same, unchanged

PLAIN = progress.func
def words(method, **more): return {k: v for k,v in (QUICK|dict(steps=3)).items() if knows(method, k)}|WORDS.get(method, {})|more
def long(method): return dict(strength=1.) if knows(method, 'strength') else {}
def panel(method, model, image, **more):
    "A panel whose first run, if it starts by itself, is over."
    return explore(METHODS[method], model, image, **words(method, **more)).wait()
def said(x): return html.unescape(x.line.value)

@pytest.fixture
def parts(method, model): return _other(MODELS[method]) if method in MODELS else model

def test_every_method_is_offered(): assert set(all_methods())==set(METHODS)

@every
def test_every_knob_starts_where_the_method_does(method):
    "A panel without words would make the call without words; every end of every slider is legal."
    for w in words_of(METHODS[method]):
        k = knob(w, w.default)
        if k is None: assert w.default in (None, inspect.Parameter.empty), w.name
        elif w.default not in (None, inspect.Parameter.empty): assert k.value==w.default, w.name
        if isinstance(k, (W.IntSlider,W.FloatSlider)) and w.test: assert w.test(k.min) and w.test(k.max) and k.min<=w.default<=k.max, w.name
        if isinstance(k, W.Dropdown): assert all(map(w.test, k.options)), w.name

@every
def test_the_panel_the_code_and_the_film_agree(method, parts, scene, tmp_path):
    "A second run, from memory, shows the same; so does the code of the panel, and a film, for as many rows as the code."
    with unchanged(parts):
        x = panel(method, parts, scene, **long(method)); x.draw(); x.wait()
        assert x.edit is not None and x.edit.method==method, said(x)
        assert same(x.runs[-1][0].image, x.edit.image) and x.end.disabled and x.bar.layout.visibility=='hidden' and Image.open(io.BytesIO(x.picture.value)).width>100
        again = eval(x.call, dict(model=parts, scene=make_scene, **METHODS))
        assert same(again.image, x.edit.image), x.call
        f = film(METHODS[method], parts, scene, frames=2, **words(method, **long(method)))
        assert f.edit.rows==again.rows and same(f.edit.image, again.image)
    assert len(f.frames)==3 and all(o.size==again.image.size for o in f.frames) and Image.open(f.save(tmp_path/'f.gif')).n_frames>=2
    assert np.abs(np.float32(f.frames[-2])-np.float32(f.edit.raw)).mean()<6 # the last prediction is the result, but for what is put back

@every
def test_cancel_leaves_the_model_as_it_was(method, parts, scene):
    "Cancelled at its second step, wherever the method is then."
    x, count = explore(METHODS[method], parts, scene, **words(method, **long(method))), []
    x.halt(); x.wait()
    x._step = lambda stop, loop, item: (count.append(1), stop.set() if len(count)>1 else None, type(x)._step(x, stop, loop, item))
    with unchanged(parts):
        x.draw(); x.wait()
        assert 'cancelled' in said(x) and len(count)>=1
    assert '_unet' not in vars(parts) and progress.func is PLAIN
    del x._step
    x.draw(); assert x.wait().edit is not None, said(x)

def test_cancel_is_prompt(model, scene):
    x = explore(sdedit, model, scene, target='a zebra on grass', steps=100, strength=1.)
    rows = model.rows
    while model.rows<rows+4: time.sleep(.005)
    x.halt(); pressed = model.rows; x.wait()
    assert 'cancelled' in said(x) and x.edit is None and model.rows-pressed<=4

def test_threshold_asks_nothing(model, scene):
    x = panel('diffedit', model, scene); drawn, rows, shown = x.edit, model.rows, x.picture.value
    for t in (.2,.9,.35): x.knobs['threshold'].value = t
    assert model.rows==rows and x.picture.value!=shown and x.base[0] is drawn and x.edit.settings['threshold']==.35 and x.go.button_style=='warning'
    x.knobs['threshold'].value = .5
    assert x.edit is drawn and x.picture.value==shown
    x.knobs['threshold'].value = .3; x.draw(); x.wait()
    assert same(x.edit.image, diffedit(model, scene, **words('diffedit', threshold=.3)).image) # redrawn: memory changes nothing

def test_a_slow_knob_draws_anew(model, scene):
    x = panel('sdedit', model, scene); shown = x.picture.value
    assert not x.knobs['strength'].continuous_update
    x.knobs['strength'].value = .9; x.wait()
    assert x.picture.value!=shown and x.edit.settings['strength']==.9 and len(x.runs)==2
    x.live.value = False; x.knobs['seed'].value = 4; x.wait()
    assert x.edit.settings['seed']==0 and len(x.runs)==2
    x.draw(); assert x.wait().edit.settings['seed']==4
    x.last.children[-1].click()
    assert (x.edit.settings['strength'], x.knobs['strength'].value, x.knobs['seed'].value)==(.6, .6, 0) and x.picture.value==shown

def test_the_last_turn_wins(model, scene):
    x = panel('sdedit', model, scene)
    for g in (2., 3., 4.): x.knobs['guidance'].value = g
    assert x.wait().edit.settings['guidance']==4.

@pytest.mark.parametrize('word,value,line', [('target', '', 'target must be a text'), ('target', 'a unicorn on grass', 'never learned')])
def test_errors_and_warnings_are_one_line(model, scene, word, value, line, capfd):
    x = panel('sdedit', model, scene); x.knobs[word].value = value; x.wait()
    assert line in said(x) and '\n' not in x.line.value and 'Traceback' not in ''.join(capfd.readouterr())
    x.knobs[word].value = 'a cow on grass'; assert 'a cow on grass' in said(x.wait())

def test_what_cannot_be_turned_stays(model, scene):
    m = np.zeros((128,128)); m[:64] = 1
    x = panel('sdedit', model, scene.image, mask=m)
    assert 'mask' not in x.knobs and x.call.endswith('mask=mask)') and same(x.edit.mask, Image.fromarray(np.uint8(255*m)))
    y = explore(METHODS['prompt_to_prompt'], model, scene, target=['a zebra on grass','a cow on grass'], steps=2, cross={'zebra': .5, 'default_': .8}).wait()
    assert 'target' not in y.knobs and 'cross' not in y.knobs and len(y.edit.variants)==2

def test_bad_words_say_so_at_once(model, scene):
    for f,image,more,line in ((sdedit, scene, dict(targt='a'), "no argument 'targt'"), (METHODS['repaint'], scene.image, dict(target='a'), 'paint one'), (len, scene, {}, 'method must be')):
        with pytest.raises(TypeError, match=line): explore(f, model, image, **more)
    assert 'target' in said(explore(sdedit, model, scene))

def test_a_wrong_model_is_one_line(model, scene):
    assert 'needs 8' in said(explore(METHODS['instruct_pix2pix'], model, scene, instruction='turn the horse into a zebra').wait())

# -- listening and remembering

def test_listening_is_for_one_thread(model, scene):
    heard = []
    def other(): assert list(progress(range(3)))==[0,1,2]
    with listening(lambda loop, item: heard.append(item)):
        t = Thread(target=other); t.start(); t.join()
        assert list(progress(range(2), desc='x'))==[0,1]
    assert heard==[0,1] and list(progress(range(2)))==[0,1] and heard==[0,1]

def test_memory_knows_the_weights(model, scene):
    "Other weights, other answers; and the memory holds nothing but the CPU's."
    answers, p = {}, next(model.unet.parameters()); own = p.data
    with remembering(model, answers): a = sdedit(model, scene, **words('sdedit'))
    p.data = own*1.1
    try:
        with remembering(model, answers) as saved: b = sdedit(model, scene, **words('sdedit'))
        assert not saved and not same(a.raw, b.raw)
    finally: p.data = own
    assert all(o.device.type=='cpu' for o in answers.values())

# -- the brush

def test_strokes_become_a_mask(model, scene):
    pytest.importorskip('anywidget')
    p = paint(scene); p.strokes = [dict(points=[[64,30],[64,90]], size=20, colour='#ff0000')]
    m = np.asarray(p.mask)
    assert p.mask.size==(128,128) and m[60,64]==255 and m[60,56]==255 and m[60,80]==0 and p.scribble.getpixel((64,60))==(255,0,0) and p.scribble.getpixel((5,5))==scene.image.getpixel((5,5))
    p.strokes = p.strokes+[dict(points=[[64,60]], size=10, erase=True)]
    assert np.asarray(p.mask)[60,64]==0 and p.scribble.getpixel((64,60))==scene.image.getpixel((64,60))
    e = METHODS['blended_latents'](model, scene, target='a cow on grass', mask=p, n=1, steps=2)
    assert same(e.mask, p.mask)
    p.undo(); assert len(p.strokes)==1
    p.clear(); assert not np.asarray(p.mask).any()

def test_paint_off_the_grid(model):
    im = picture(97, 67); p = pytest.importorskip('anywidget') and paint(im); p.strokes = [dict(points=[[90,60]], size=30)]
    assert p.mask.size==(97,67) and same(METHODS['repaint'](model, im, target='a cow on grass', mask=p, steps=2, jump=1, resamples=1).mask, p.mask)

def test_without_anywidget_one_line(monkeypatch, scene):
    m = sys.modules[paint.__module__]; m._painter.cache_clear(); monkeypatch.setitem(sys.modules, 'anywidget', None)
    with pytest.raises(ImportError, match=r"diffedit-lab\[lab\]"): paint(scene)
    m._painter.cache_clear()

# -- the sweep and the film

def test_grid_shares_and_changes_nothing(model, scene):
    g = grid(diffedit, model, scene, x=('strength',[.4,.8]), y=('guidance',[2.,7.5]), **{k: v for k,v in words('diffedit').items() if k!='source'})
    for row,b in zip(g.edits, (2.,7.5)):
        for e,a in zip(row, (.4,.8)): assert same(e.image, diffedit(model, scene, **words('diffedit', strength=a, guidance=b)).image)
    assert sum(e.rows for e in g.drawn) < 4*4+2*(1+2)+2*2*(1+2) and '_unet' not in vars(model)

def test_grid_of_learners_learns_once(model, scene):
    g = grid(METHODS['forgedit'], model, scene, x=('gamma',[.5,1.]), **words('forgedit'))
    assert g.edits[0][1].rows<g.edits[0][0].rows
    g = grid(METHODS['forgedit'], model, scene, x=('updates',[1,2]), **{k: v for k,v in words('forgedit').items() if k!='updates'})
    assert g.edits[0][1].rows>g.edits[0][0].rows

def test_grid_refuses_in_one_line(model, scene):
    for x,line in ((('strenght',[1]), "no argument 'strenght'"), (('strength',[]), 'at least one value'), ('strength', 'a word and its values')):
        with pytest.raises(ValueError, match=line): grid(sdedit, model, scene, target='a', x=x)

def test_film_refuses_in_one_line(model, scene):
    with pytest.raises(ValueError, match='took no step'): film(sdedit, model, scene, target='a cow on grass', strength=0)
    with pytest.raises(ValueError, match='frames must be'): film(sdedit, model, scene, target='a cow on grass', frames=0)
