"""The model on the runtime storey: sequence mixers in plain torch, and what is built from them.

Importing this package imports nothing; each module imports what it needs.
"""
