"""Text-guided image editing with diffusion models: taught in notebooks, usable as a library, whole on a laptop's CPU."""
__version__ = "0.1.0"

from diffedit_lab.images import open_image, show, strip, overlay, as_mask, paste
from diffedit_lab.result import Edit, Fitted, load_fitted, gallery
from diffedit_lab.scenes import scene, heldout, Scene
from diffedit_lab.model import load, load_clip, embedded, Model
from diffedit_lab.bench import compare, quality
from diffedit_lab.methods.sdedit import sdedit
from diffedit_lab.methods.diffedit import diffedit
from diffedit_lab.methods.fast_diffedit import fast_diffedit

__all__ = ['open_image', 'show', 'strip', 'overlay', 'as_mask', 'paste', 'Edit', 'Fitted', 'load_fitted', 'gallery', 'scene', 'heldout', 'Scene',
           'load', 'load_clip', 'embedded', 'Model', 'compare', 'quality', 'sdedit', 'diffedit', 'fast_diffedit']
