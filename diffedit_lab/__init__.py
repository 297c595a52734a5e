"""Text-guided image editing with diffusion models: taught in notebooks, usable as a library, whole on a laptop's CPU."""
__version__ = "0.1.0"

from diffedit_lab.images import open_image, show, strip, overlay, as_mask, paste
from diffedit_lab.result import Edit, Fitted, load_fitted, gallery
from diffedit_lab.scenes import scene, heldout, Scene
from diffedit_lab.model import load, load_clip, embedded, Model
from diffedit_lab.bench import compare, quality
from diffedit_lab.widgets import explore, paint, grid, film
from diffedit_lab.methods.sdedit import sdedit
from diffedit_lab.methods.diffedit import diffedit
from diffedit_lab.methods.fast_diffedit import fast_diffedit
from diffedit_lab.methods.blended_latents import blended_latents, reconstruct_background
from diffedit_lab.methods.repaint import repaint
from diffedit_lab.methods.prompt_to_prompt import prompt_to_prompt, generate_and_edit
from diffedit_lab.methods.null_text import null_text
from diffedit_lab.methods.style_diffusion import style_diffusion
from diffedit_lab.methods.imagic import imagic
from diffedit_lab.methods.forgedit import forgedit, dreambooth_forgedit
from diffedit_lab.methods.instruct_pix2pix import instruct_pix2pix

__all__ = ['open_image', 'show', 'strip', 'overlay', 'as_mask', 'paste', 'Edit', 'Fitted', 'load_fitted', 'gallery', 'scene', 'heldout', 'Scene',
           'load', 'load_clip', 'embedded', 'Model', 'compare', 'quality', 'explore', 'paint', 'grid', 'film', 'sdedit', 'diffedit', 'fast_diffedit', 'blended_latents', 'reconstruct_background',
           'repaint', 'prompt_to_prompt', 'generate_and_edit', 'null_text', 'style_diffusion', 'imagic', 'forgedit', 'dreambooth_forgedit', 'instruct_pix2pix']
