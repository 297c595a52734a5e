"Bad inputs and geometry of `diffedit_lab.images`: what is not a lesson."
import itertools
from types import SimpleNamespace

import numpy as np, pytest, torch
from PIL import Image

from diffedit_lab.images import Fit, as_mask, as_picture, open_image, overlay, paste, show, strip

SIZES = [(1,1), (1,9), (7,5), (64,64), (97,67), (128,128), (144,112), (300,1200), (1200,300), (480,640), (640,480), (1920,1080), (2000,3)]
MODELS = [(128*128,16), (128*128,32), (512*512,64)]

def pic(w=8, h=6, mode='RGB', seed=0):
    a = np.random.default_rng(seed).integers(0, 256, (h,w,3), dtype=np.uint8)
    return Image.fromarray(a).convert(mode)

def blob(w, h):
    "Soft mask of an ellipse off the centre"
    y,x = np.mgrid[:h,:w]
    return np.clip(4-8*np.hypot((x+.5)/w-.6, (y+.5)/h-.55), 0, 1)

def same(a, b): return a.size==b.size and a.mode==b.mode and np.array_equal(a, b)

def one_line(f, starts, *contains):
    with pytest.raises((ValueError,TypeError,FileNotFoundError)) as e: f()
    msg = str(e.value)
    assert msg and '\n' not in msg and '\r' not in msg, msg
    assert msg.startswith(starts), msg
    assert ': ' in msg or 'must ' in msg, f'no remedy: {msg}'
    for o in contains: assert o in msg, msg
    assert e.value.__cause__ is None
    return msg


BAD_IMAGES = dict(
    none=None, int=3, float=.5, dict={'image': 1}, list=[1,2], bytes=b'\x89PNG', object=object(), cls=Image.Image, npscalar=np.float32(1),
    empty_string='', missing='no/such/file.png', newline='no\nsuch.png', nul='a\0b.png', very_long='x'*5000,
    empty=np.zeros((0,5,3), np.uint8), empty2=np.zeros((5,0), np.uint8), vector=np.zeros(5), scalar=np.array(1.), two_channels=np.zeros((4,4,2)), five=np.zeros((4,4,5)), chw=np.zeros((3,40,50)),
    batch=np.zeros((2,4,4,3)), int64=np.zeros((4,4), int), bool=np.zeros((4,4), bool), text=np.array([['a']]), objects=np.array([[None]]), complex=np.zeros((4,4), complex), uint16=np.zeros((4,4), np.uint16),
    nan=np.full((4,4,3), np.nan), inf=np.full((4,4), np.inf), above=np.full((4,4,3), 200.), below=np.full((4,4,3), -1.), one_nan=np.where(np.eye(4)>0, np.nan, .5),
    t_hwc=torch.zeros(40,50,3), t_batch=torch.zeros(2,3,4,4), t_empty=torch.zeros(3,0,4), t_nan=torch.full((3,4,4), float('nan')), t_signed=torch.full((3,4,4), -1.), t_int=torch.zeros(3,4,4, dtype=torch.int64), t_vector=torch.zeros(4),
    zero_size=Image.new('RGB', (0,5)), f_range=Image.fromarray(np.full((4,4), 300., np.float32)), i_negative=Image.fromarray(np.array([[-5,70000]], np.int32)), premultiplied_grey=Image.new('La', (4,4)),
)

@pytest.mark.parametrize('kind', BAD_IMAGES)
def test_open_image_refuses(kind): one_line(lambda: open_image(BAD_IMAGES[kind]), 'image ')

@pytest.mark.parametrize('kind', ['folder', 'text', 'empty', 'truncated', 'garbage', 'closed'])
def test_open_image_refuses_files(kind, tmp_path):
    p = tmp_path/'x.png'
    if kind=='folder': p.mkdir()
    elif kind=='text': p.write_text('hello')
    elif kind=='empty': p.write_bytes(b'')
    elif kind=='garbage': p.write_bytes(b'\x89PNG\r\n\x1a\n'+bytes(range(200)))
    else:
        pic(200, 200).save(p)
        if kind=='truncated': p.write_bytes(p.read_bytes()[:5000])
    src = p
    if kind=='closed': src = Image.open(p); src.close()
    one_line(lambda: open_image(src), 'image ')

def test_url_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('DIFFEDIT_LAB_CACHE', str(tmp_path))
    one_line(lambda: open_image('http://127.0.0.1:9/x.png'), 'image could not be downloaded')
    assert not list(tmp_path.glob('*.image'))

def test_wrong_types_are_type_errors():
    for o in (None, 3, {}): pytest.raises(TypeError, open_image, o)
    for o in (None, 3, {}): pytest.raises(TypeError, as_mask, o, (4,4))
    pytest.raises(FileNotFoundError, open_image, 'no/such.png')

@pytest.mark.parametrize('mode', ['1','L','LA','P','PA','RGB','RGBA','RGBa','RGBX','CMYK','YCbCr','HSV','I','F','I;16','I;16B'])
def test_every_mode_opens(mode):
    im = {'I;16': lambda: Image.fromarray(np.full((6,8), 40000, np.uint16)), 'F': lambda: Image.fromarray(np.full((6,8), .5, np.float32)),
          'I;16B': lambda: Image.frombytes('I;16B', (8,6), np.full(48, 40000, '>u2').tobytes()),
          'RGBa': lambda: pic(mode='RGBA').convert('RGBa'), 'PA': lambda: pic(mode='P').convert('PA')}.get(mode, lambda: pic(mode=mode))()
    assert im.mode==mode
    out = open_image(im)
    assert out.mode=='RGB' and out.size==(8,6) and not out.info
    if mode.startswith('I;'): assert out.getpixel((0,0))==(156,)*3

def test_opening_never_aliases_and_never_changes_rgb():
    im = pic(); out = open_image(im)
    assert same(im, out)
    out.putpixel((0,0), (1,2,3))
    assert same(im, pic())
    a = np.asarray(im).copy(); out = open_image(a); a[:] = 0
    assert same(out, im)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8])
def test_tensor_dtypes(dtype):
    a = np.asarray(pic())
    t = torch.tensor(a).permute(2,0,1)
    t = t if dtype==torch.uint8 else (t/255).to(dtype).requires_grad_()
    assert np.abs(np.asarray(open_image(t)).astype(int)-a).max() <= (1 if dtype==torch.bfloat16 else 0)

@pytest.mark.parametrize('orientation', range(1,9))
@pytest.mark.parametrize('ext', ['jpg','png','tiff','webp'])
def test_exif_orientation(orientation, ext, tmp_path):
    exif = Image.Exif(); exif[0x0112] = orientation
    im = Image.new('RGB', (40,24), 'white'); im.paste('black', (0,0,20,12))
    im.save(tmp_path/f'x.{ext}', exif=exif)
    out = open_image(tmp_path/f'x.{ext}')
    assert out.size==((24,40) if orientation>4 else (40,24))
    w,h = out.size
    corner = {1:(0,0), 2:(1,0), 3:(1,1), 4:(0,1), 5:(0,0), 6:(1,0), 7:(1,1), 8:(0,1)}[orientation]
    dark = {(x,y):out.getpixel((w//4+x*w//2, h//4+y*h//2))[0]<128 for x in (0,1) for y in (0,1)}
    assert [k for k,v in dark.items() if v]==[corner]

def test_broken_exif_is_survived():
    im = pic(); im.info['exif'] = b'Exif\x00\x00garbage'
    assert open_image(im).size==im.size

def test_transparent_is_white():
    im = Image.new('RGBA', (4,4), (10,20,30,0))
    assert open_image(im).getpixel((0,0))==(255,255,255)
    p = Image.new('P', (4,4), 0); p.info['transparency'] = 0
    assert open_image(p).getpixel((0,0))==(255,255,255)


BAD_MASKS = dict(
    none=None, int=1, dict={}, list=[[1]], no_mask=SimpleNamespace(mask=None), missing='no.png', square=np.ones((8,8)), turned=np.ones((16,12)), nan=np.full((12,16), np.nan), inf=np.full((12,16), np.inf),
    above=np.full((12,16), 1.5), below=np.full((12,16), -.2), int_above=np.full((12,16), 256), int_below=np.full((12,16), -1, int), empty=np.zeros((0,16)), vector=np.ones(16), colour=np.random.default_rng(0).random((12,16,3)),
    pil_colour=pic(16,12), chw=torch.ones(3,12,16), batch=torch.ones(2,1,12,16), text=np.full((12,16), 'a'), complex=np.ones((12,16), complex), t_nan=torch.full((12,16), float('nan')), zero=Image.new('L', (0,4)), fit=Fit((16,12), 256, 4),
)

@pytest.mark.parametrize('kind', BAD_MASKS)
def test_as_mask_refuses(kind):
    msg = one_line(lambda: as_mask(BAD_MASKS[kind], (16,12)), 'mask ')
    if kind=='turned': assert '12x16' in msg and '16x12' in msg

@pytest.mark.parametrize('size', [None, 5, (5,), (5,5,5), (0,5), (5,-1), (5.,5.), 'ab', ('a','b')], ids=str)
def test_size_refused(size):
    one_line(lambda: as_mask(np.ones((5,5)), size), 'size ')
    one_line(lambda: Fit(size, 128*128, 16), 'size ')

@pytest.mark.parametrize('make', [
    lambda m: m, lambda m: m.astype(np.float32), lambda m: torch.tensor(m), lambda m: torch.tensor(m)[None], lambda m: torch.tensor(m)[None,None], lambda m: m[...,None], lambda m: m[None],
    lambda m: SimpleNamespace(mask=m), lambda m: SimpleNamespace(mask=SimpleNamespace(mask=m)), lambda m: Image.fromarray(m.astype(np.float32)), lambda m: np.asfortranarray(m), lambda m: m[::-1][::-1], lambda m: np.repeat(m[...,None], 3, -1)])
def test_mask_kinds_float(make):
    m = blob(16, 12)
    out = as_mask(make(m), (16,12))
    assert out.dtype==np.float32 and out.shape==(12,16) and np.abs(out-m).max()<1e-6

@pytest.mark.parametrize('make', [
    lambda m: m, lambda m: m.astype(np.uint8), lambda m: m.astype(np.int64)*255, lambda m: Image.fromarray(m), *(lambda m, k=k: Image.fromarray((m*255).astype(np.uint8)).convert(k) for k in ('L','LA','P','RGB','RGBA','CMYK','I','1','YCbCr')),
    lambda m: Image.fromarray(m.astype(np.uint16)*65535), lambda m: torch.tensor(m), lambda m: torch.tensor(m).to(torch.uint8)*255])
def test_mask_kinds_hard(make):
    m = blob(16, 12)>.5
    assert np.array_equal(as_mask(make(m), (16,12)), m.astype(np.float32))

def test_mask_file_and_transparency(tmp_path):
    m = blob(16, 12)>.5
    Image.fromarray(m).save(tmp_path/'m.png')
    assert np.array_equal(as_mask(tmp_path/'m.png', (16,12)), m)
    strokes = np.dstack([np.full((12,16,3), 255), m*255]).astype(np.uint8)
    assert np.array_equal(as_mask(Image.fromarray(strokes), (16,12)), m)

@pytest.mark.parametrize('frm,to', list(itertools.product([(32,24),(64,48),(97,73),(640,480)], [(640,480),(320,240),(32,24),(101,76)])))
def test_mask_resize_keeps_area_range_and_constants(frm, to):
    out = as_mask(blob(*frm), to)
    assert out.shape==to[::-1] and 0<=out.min() and out.max()<=1
    assert abs(out.mean()-blob(*frm).mean())<.01
    for v in (0., .25, 1.): assert np.array_equal(np.unique(as_mask(np.full(frm[::-1], v), to)), [np.float32(v)])

def test_mask_is_a_copy():
    m = np.zeros((5,5), np.float32); out = as_mask(m, (5,5)); out[:] = 1
    assert not m.any()

@pytest.mark.parametrize('mask,size,ok', [((32,22),(97,67),1), ((32,21),(97,67),0), ((512,512),(640,480),0), ((480,640),(640,480),0), ((1333,1000),(640,480),1), ((640,480),(97,73),1),
    ((1,1),(64,64),1), ((1000,666),(10,7),1), ((500,400),(480,400),0), ((32,8),(1200,300),1), ((32,32),(1200,300),0)])
def test_aspect_tolerance(mask, size, ok):
    f = lambda: as_mask(np.ones(mask[::-1]), size)
    assert f().shape==size[::-1] if ok else one_line(f, 'mask ', f'{mask[0]}x{mask[1]}', f'{size[0]}x{size[1]}')


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('area,multiple', MODELS)
def test_fit_geometry(size, area, multiple):
    f = Fit(size, area, multiple)
    (w,h),(iw,ih),(gw,gh) = size,f.inner,f.grid
    assert gw%multiple==gh%multiple==0 and 0<=gw-iw<multiple and 0<=gh-ih<multiple
    assert abs(iw*h-ih*w)<=max(w,h)                                        # one pixel of rounding
    if max(w,h)<=8*min(w,h): assert .78<iw*ih/area<1.25
    assert gw*gh<=1.3*area+multiple*(gw+gh)
    im = pic(*size)
    on = f.image(im); back = f.undo(on)
    assert on.size==f.grid and on.mode=='RGB' and back.size==size and back.mode=='RGB'
    a = np.asarray(on)
    assert (a[:,iw:]==a[:,iw-1:iw]).all() and (a[ih:]==a[ih-1:ih]).all()
    m = f.mask(np.ones((h,w)))
    assert m.shape==(gh,gw) and m.dtype==np.float32 and (m[:ih,:iw]==1).all() and m.sum()==iw*ih
    assert f.undo_mask(m).size==size and f.undo_mask(m).mode=='L' and np.asarray(f.undo_mask(m)).min()==255
    assert not np.asarray(f.undo_mask(np.zeros_like(m))).any()

@pytest.mark.parametrize('size,area,multiple', [((128,128),128*128,16), ((256,64),128*128,16), ((144,112),128*128,16), ((512,512),512*512,64), ((576,448),512*512,64), ((32,512),128*128,16)])
def test_on_grid_is_untouched(size, area, multiple):
    f,im = Fit(size, area, multiple),pic(*size)
    assert f.inner==f.grid==f.size
    assert same(f.image(im), im) and same(f.undo(im), im)

@pytest.mark.parametrize('size', [(97,67), (640,480), (1200,300), (130,130)], ids=str)
def test_image_and_mask_stay_together(size):
    "A picture painted from its mask, moved, is still painted from the moved mask"
    m = blob(*size)
    f = Fit(size, 128*128, 16)
    im = Image.fromarray((m*255).round().astype(np.uint8)).convert('RGB')
    a,b = np.asarray(f.image(im))[...,0]/255.,f.mask(m)
    iw,ih = f.inner
    assert np.abs(a-b)[:ih,:iw].max()<.12 and np.abs(a-b)[:ih,:iw].mean()<.005
    back = np.asarray(f.undo_mask(f.mask(m)))/255
    assert np.abs(back-m).max()<.2 and np.abs(back-m).mean()<.01

@pytest.mark.parametrize('factor', [1,4,8,16])
def test_latent_mask_round_trip(factor):
    f = Fit((144,112), 128*128, 16)
    cells = (np.random.default_rng(0).random((112//factor,144//factor))>.5).astype(np.float32)
    again = as_mask(f.mask(f.undo_mask(cells)), cells.shape[::-1])
    assert np.array_equal(again, cells)
    assert np.array_equal(f.undo_mask(torch.tensor(cells)[None,None]), f.undo_mask(cells))

@pytest.mark.parametrize('kw', [dict(area=0), dict(area=-1), dict(area=float('nan')), dict(area=float('inf')), dict(area='big'), dict(area=None), dict(multiple=0), dict(multiple=-8), dict(multiple=1.5), dict(multiple=None)], ids=str)
def test_fit_refuses(kw): one_line(lambda: Fit((64,64), **{**dict(area=128*128, multiple=16), **kw}), f'{next(iter(kw))} ')

def test_fit_refuses_strangers():
    f = Fit((97,67), 128*128, 16)
    one_line(lambda: f.image(pic()), 'image ', '8x6', '97x67')
    one_line(lambda: f.undo(pic()), 'image ', '8x6', '160x112')
    one_line(lambda: f.mask(np.ones((67,67))), 'mask ', '67x67', '97x67')
    one_line(lambda: f.undo_mask(np.ones((67,67))), 'mask ', '67x67', '160x112')
    one_line(lambda: f.mask(None), 'mask ')
    one_line(lambda: f.image(None), 'image ')


@pytest.mark.parametrize('feather', [0, .4, 1, 2, 3, 7, 25, 300])
def test_paste_promises(feather):
    import cv2
    a,b = pic(60, 40),pic(60, 40, seed=1)
    A,B = np.asarray(a),np.asarray(b)
    assert same(paste(b, a, np.zeros((40,60)), feather), a)
    assert same(paste(b, a, np.ones((40,60)), feather), b)
    m = blob(60, 40)>.8
    p = np.asarray(paste(b, a, m, feather))
    far = cv2.distanceTransform((~m).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    assert np.array_equal(p[far>feather], A[far>feather]) and np.array_equal(p[m], B[m])
    lo,hi = np.minimum(A, B),np.maximum(A, B)
    assert (p>=lo).all() and (p<=hi).all()

def test_paste_soft_mask_mixes():
    a,b = Image.new('RGB', (8,8), (0,0,0)),Image.new('RGB', (8,8), (200,100,50))
    assert paste(b, a, np.full((8,8), .5)).getpixel((3,3))==(100,50,25)

@pytest.mark.parametrize('args,name', [((None,pic(),np.ones((6,8))), 'edited '), ((pic(),None,np.ones((6,8))), 'source '), ((pic(9,6),pic(),np.ones((6,8))), 'edited '), ((pic(),pic(),np.ones((9,8))), 'mask '), ((pic(),pic(),None), 'mask '),
    ((pic(),pic(),np.ones((6,8)),-1), 'feather '), ((pic(),pic(),np.ones((6,8)),'soft'), 'feather '), ((pic(),pic(),np.ones((6,8)),float('nan')), 'feather '), ((pic(),pic(),np.ones((6,8)),float('inf')), 'feather '), ((pic(),pic(),np.ones((6,8)),None), 'feather ')])
def test_paste_refuses(args, name): one_line(lambda: paste(*args), name)

@pytest.mark.parametrize('kw', [dict(alpha=-.1), dict(alpha=2), dict(alpha='x'), dict(color=(1,2)), dict(color=5), dict(color=None)], ids=str)
def test_overlay_refuses(kw): one_line(lambda: overlay(pic(), np.ones((6,8)), **kw), f'{next(iter(kw))} ')

@pytest.mark.parametrize('f', [show, strip])
def test_gallery(f):
    import matplotlib.pyplot as plt
    one_line(f, 'images ')
    one_line(lambda: f(pic(), titles=['a','b']), 'titles ')
    one_line(lambda: f(pic(), None), 'images[1] ')
    f(pic(), blob(8,6), blob(8,6)>.5, torch.rand(6,8), [pic(300,20), pic(20,300)], np.full((4,4), np.nan), np.zeros((4,4)), titles=list('abcdefgh'))
    f(pic(1,1))
    assert not plt.get_fignums()
    one_line(lambda: show(pic(), cols=0), 'cols ')
    one_line(lambda: strip(pic(), height=0), 'height ')

def test_strip_scales_to_height():
    s = strip(pic(40,20), pic(10,20), height=100)
    assert s.height==100+2*6 and s.width==200+50+3*6

def test_as_picture_leaves_images_alone():
    assert same(as_picture(pic()), pic()) and same(as_picture(SimpleNamespace(image=pic())), pic())
    assert as_picture(np.full((4,4), .3)).size==(4,4)
