"What JupyterLab is started with by `make lab`: a chapter is saved as it is committed."
KERNEL = {'display_name': 'python3', 'language': 'python', 'name': 'python3'}


def as_committed(model: dict, **_):  # of Jupyter's contents manager, about to be saved
    "Take out of a notebook what a session left in it: outputs, counts, and all metadata but tags."
    if model['type'] != 'notebook': return
    model['content']['metadata'] = {'kernelspec': KERNEL}
    for cell in model['content']['cells']:
        cell['metadata'] = {k: v for k, v in cell['metadata'].items() if k == 'tags'}
        if cell['cell_type'] == 'code': cell |= {'outputs': [], 'execution_count': None}
