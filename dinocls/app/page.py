"A page for the browser: a picture in, the answer out, what makes it worse, and where the model looks."
from pathlib import Path

import numpy as np
import torch

from ..attention import attention_maps
from ..augment import preprocess
from ..kit.corruptions import CORRUPTIONS, corrupt
from ..kit.files import UserError
from ..kit.pictures import as_url
from ..model import Classifier
from .service import Refusal, Service, files, within


def attention_picture(model, pixels: np.ndarray) -> np.ndarray | None:  # uint8 (rows, cols, 3)
    "Return the attention of the last block in colours, the mean over its heads; nothing for models without it."
    import matplotlib
    if not isinstance(getattr(model, 'model', None), Classifier): return None
    try: maps = attention_maps(model.model, preprocess(torch.tensor(pixels).permute(2, 0, 1)[None], model.cfg))
    except UserError: return None  # a backbone of another kind
    seen = maps[0].mean(0).float().cpu().numpy()
    return np.ascontiguousarray(matplotlib.colormaps['inferno'](seen / seen.max(), bytes=True)[..., :3])


def examples(model) -> list:
    "Return one picture of each class, of at most twelve, that came with the model, if there are any."
    if not (found := getattr(model, 'examples', dict)()): return []
    _, first = np.unique(found['labels'], return_index=True)
    return [*np.ascontiguousarray(found['images'][first[:12]].transpose(0, 2, 3, 1))]


def add_page(app, service: Service):
    "Put the page at / of a service: a few files, what they show, and what the model says of a picture made worse."
    from fastapi import Request
    from starlette.staticfiles import StaticFiles
    model, batcher = service.model, service.batcher
    about = {'classes': model.classes, 'backbone': model.config['backbone'], 'corruptions': [*CORRUPTIONS],
             'max_bytes': service.limits.max_bytes, 'examples': [as_url(p) for p in examples(model)]}

    async def look(data: bytes, name: str, severity: int) -> dict:
        pixels = await service.read(data)
        if severity: pixels = (await within(batcher.worker, corrupt, pixels[None], name, severity))[0]
        found, seen = await batcher(pixels), await within(batcher.worker, attention_picture, model, pixels)
        return found | {'picture': as_url(pixels), 'attention': None if seen is None else as_url(seen)}

    @app.get('/page.json', include_in_schema=False)
    async def page() -> dict: return about

    @app.post('/look', include_in_schema=False)
    async def answer(request: Request) -> dict:
        data, = await files(request, 1, service.limits)
        name, severity = (request.query_params.get(k, default) for k, default in (('worse', ''), ('severity', '0')))
        if severity != '0' and (severity not in [*'12345'] or name not in CORRUPTIONS):
            raise Refusal(422, 'The page makes pictures worse by what /page.json lists, and from 0 to 5.')
        return await service.in_time(look(data, name, int(severity)))

    app.mount('/', StaticFiles(directory=Path(__file__).parent/'static', html=True))
