"What the chapters stand on: plain Python, tested in `tests/kit`."
