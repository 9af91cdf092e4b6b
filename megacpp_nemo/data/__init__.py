"""Real C++ text, from source files to packed training rows.

The story, one file a chapter:

- `sources`: which files are C++ sources, and what is in them
- `tokenizer`: a byte-level BPE trained on the training files
- `split`: which file trains and which one validates
- `cache`: a folder that is either complete and verified, or not there
- `corpus`: the four above make a cached corpus of Megatron indexed files
- `indexed`: reading the facts of any Megatron indexed file, damaged ones included
- `dataset`: packed rows that know which document each position belongs to
- `base_module`, `module`: NeMo data modules over all of it

Importing this package is cheap; NeMo and megatron-core are imported where they are needed.
"""
