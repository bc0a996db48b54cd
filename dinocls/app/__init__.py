"What stands on the chapters: driver, command line, service, page, site; tested in `tests/app`."
