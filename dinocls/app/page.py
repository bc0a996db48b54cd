"A page for the browser: a picture in, the answer out, what makes it worse, and where the model looks."
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from ..attention import attention_maps
from ..augment import preprocess
from ..kit.corruptions import CORRUPTIONS, corrupt
from ..kit.files import UserError
from ..kit.pictures import as_png
from ..model import Classifier
from .service import Refusal, Service, upload_folder, within


def enlarged(pixels: np.ndarray, side: int = 320) -> np.ndarray:
    "Return a picture whose pixels are repeated until it is about `side` wide."
    times = max(1, side // max(pixels.shape[:2]))
    return pixels.repeat(times, 0).repeat(times, 1)


def attention_overlay(model, pixels: np.ndarray, strength: float = 0.6) -> np.ndarray | None:  # uint8 (h, w, 3)
    "Return a picture under the attention of the last block, the mean over its heads; nothing for models without it."
    import matplotlib
    from PIL import Image
    if not isinstance(getattr(model, 'model', None), Classifier): return None
    try: maps = attention_maps(model.model, preprocess(torch.tensor(pixels).permute(2, 0, 1)[None], model.cfg))
    except UserError: return None  # a backbone of another kind
    seen, under = maps[0].mean(0).cpu().numpy(), enlarged(pixels)
    colours = Image.fromarray(matplotlib.colormaps['inferno'](seen / seen.max(), bytes=True)[..., :3])
    over = np.asarray(colours.resize(under.shape[1::-1], Image.Resampling.NEAREST))
    return (strength * over + (1 - strength) * under).astype(np.uint8)


def looker(service: Service):
    "Return what the page does with a picture: (file, corruption, severity) → message, probabilities, picture, overlay."
    from html import escape

    import gradio as gr
    batcher, model = service.batcher, service.model
    unsure = '<p role="status">The model is not sure: this is none of the answers that it vouches for.</p>'

    async def look(file: str | None, name: str | None, severity: float):
        if not file: return gr.HTML(visible=False), None, None, None
        try:
            with batcher.hold():
                pixels = await service.read(await within(service.readers, Path(file).read_bytes))
                if severity and name in CORRUPTIONS:
                    pixels = (await within(service.readers, corrupt, pixels[None], name, int(severity)))[0]
                found = await service.in_time(batcher(pixels))
                overlay = await within(batcher.worker, attention_overlay, model, pixels)
        except Refusal as e: return gr.HTML(f'<p role="alert">{escape(str(e))}</p>', visible=True), None, None, None
        message = gr.HTML(unsure, visible=bool(found.get('uncertain')))
        return message, found['probabilities'], enlarged(pixels), overlay
    return look


def create_page(service: Service):
    "Return the page of a service, as Gradio's blocks."
    import gradio as gr
    model = service.model
    names = ', '.join(model.classes[:12]) + (', …' if len(model.classes) > 12 else '')
    shown = dict(interactive=False, buttons=[], height=240, min_width=140, format='png', elem_classes='shown')
    with gr.Blocks(title='What is in this picture?', analytics_enabled=False, delete_cache=(60, 600)) as page:
        gr.Markdown('# What is in this picture?\n'
                    f'Drop one here, and a vision transformer (`{model.config["backbone"]}`) says which of '
                    f'{len(model.classes)} classes it shows: {names}. It knows nothing else: a picture of something '
                    'else gets one of these classes all the same.')
        with gr.Row():
            picture = gr.Image(label='Picture', type='filepath', image_mode=None, sources=['upload', 'clipboard'],
                               format='png', buttons=[], height=280)
            with gr.Column(): message, label = gr.HTML(visible=False), gr.Label(label='Answer', num_top_classes=5)
        _examples(model, picture)
        with gr.Row():
            with gr.Column():
                kind = gr.Dropdown([(n.replace('_', ' '), n) for n in CORRUPTIONS], value='gaussian_noise',
                                   label='Make it worse by', filterable=False)
                severity = gr.Slider(0, 5, 0, step=1, label='Severity (0: as it is)')
            with gr.Column(), gr.Row():
                seen, looked = gr.Image(label='What it gets', **shown), gr.Image(label='Where it looks', **shown)
        gr.on([picture.change, kind.change, severity.change], looker(service), [picture, kind, severity],
              [message, label, seen, looked], show_progress='hidden', trigger_mode='always_last',
              concurrency_limit=service.limits.max_batch, api_visibility='private')
    picture.preprocess = lambda payload: payload and payload.path  # undecoded: `Service.read` decodes, within limits
    return page


def _examples(model, picture):
    "Offer the pictures that came with the model, if there are any."
    import gradio as gr
    if not (found := getattr(model, 'examples', dict)()): return
    _, first = np.unique(found['labels'], return_index=True)  # one of each class
    pictures = found['images'][first[:12]].transpose(0, 2, 3, 1)
    with tempfile.TemporaryDirectory() as folder:  # Gradio keeps copies
        files = [Path(folder)/f'{i}.png' for i in range(len(pictures))]
        for file, pixels in zip(files, pictures): file.write_bytes(as_png(pixels))
        strip = gr.Dataset(components=[picture], samples=[[str(f)] for f in files], type='index', label='Examples')
    strip.click(lambda i: pictures[i], strip, picture, show_progress='hidden', api_visibility='private')


def add_page(app, service: Service):
    "Put the page at / of a service, without anything that would be loaded from elsewhere."
    os.environ |= {'GRADIO_ANALYTICS_ENABLED': 'False', 'GRADIO_TEMP_DIR': upload_folder().name}
    import gradio as gr
    style = '.shown .image-frame { padding-top: 30px } [role=alert] { color: #b00020; font-weight: 600 }'
    fonts = {'font': ['system-ui', 'sans-serif'], 'font_mono': ['ui-monospace', 'monospace']}
    gr.mount_gradio_app(app, create_page(service), path='/', theme=gr.themes.Default(**fonts), footer_links=[],
                        run_history=False, ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False,
                        css=style, max_file_size=service.limits.max_bytes, show_error=True)
    app.state.page = app.routes[-1].app
