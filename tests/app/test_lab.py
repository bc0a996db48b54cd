"JupyterLab saves chapters as they are committed."
import asyncio
import shutil

import pytest
from conftest import ROOT

pytest.importorskip('jupyter_server', reason='JupyterLab comes with the extra book')


def test_opening_running_and_saving_a_chapter_changes_nothing(tmp_path):
    from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
    shutil.copy(ROOT/'nbs'/'05_phase1.ipynb', tmp_path)
    before = (tmp_path/'05_phase1.ipynb').read_bytes()
    manager = AsyncLargeFileManager(root_dir=str(tmp_path), pre_save_hook='dinocls.app.lab.as_committed')

    async def session():
        model = await manager.get('05_phase1.ipynb')
        nb = model['content']
        nb['metadata'] |= {'kernelspec': nb['metadata']['kernelspec'] | {'display_name': 'Python 3 (ipykernel)'},
                           'language_info': {'name': 'python', 'version': '3.13.1'}}
        for cell in (c for c in nb['cells'] if c['cell_type'] == 'code'):
            cell['outputs'] = [{'output_type': 'stream', 'name': 'stdout', 'text': 'seen'}]
            cell |= {'execution_count': 3, 'metadata': cell['metadata'] | {'jupyter': {'source_hidden': True}}}
        await manager.save({'type': 'notebook', 'content': nb}, '05_phase1.ipynb')
    asyncio.run(session())
    assert (tmp_path/'05_phase1.ipynb').read_bytes() == before
