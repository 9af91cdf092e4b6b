"""`python -m megacpp_nemo.cli`."""

from megacpp_nemo.cli.start import main

if __name__ == "__main__":
    raise SystemExit(main())
