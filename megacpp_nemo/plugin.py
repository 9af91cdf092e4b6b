"""Entry point of NeMo-Run's command line: registers the recipes, and cannot fail to import.

NeMo-Run swallows a plugin that fails, and then knows no recipe and does not say why. This
module imports nothing at its top, keeps the error of the real import in `IMPORT_ERROR` and
says on standard error what is wrong.
"""

IMPORT_ERROR = None


def _load():
    global IMPORT_ERROR
    try:
        import megacpp_nemo.recipes  # noqa: F401 - first: it puts adapters in place
        from megacpp_nemo.launch import factories  # noqa: F401
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        IMPORT_ERROR = error
        import sys

        print(
            "megacpp_nemo: the recipes could not be loaded\n"
            f"  given:   {type(error).__name__}: {error}\n"
            "  allowed: the package versions in its metadata\n"
            "  try:     pip check, then python -c 'import megacpp_nemo.recipes'",
            file=sys.stderr,
        )


_load()
