"""Real C++ text, from source files to packed training rows.

The story, one file a chapter:

- `sources`: which files are C++ sources, and what is in them
- `tokenizer`: a byte-level BPE trained on the training files
- `split`: which file trains and which one validates
- `cache`: a folder that is either complete and verified, or not there
- `corpus`: the four above make a corpus of Megatron indexed files, cached (`corpus`) or in a folder
  of its own (`corpus_folder`), of what `corpus_spec` says; `corpus_build` is the order of the work
- `shards`, `shard_file`, `workers`: the work cut into pieces that several processes make, and that
  a build which was stopped does not make again
- `positions`: tokens, and the byte of the file at which each of them starts
- `merge`, `indexed_writer`: the pieces put together, tokens and structure channels side by side
- `verify`, `verify_sources`: whether a corpus is what its manifest, and its sources, say
- `indexed`: reading the facts of any Megatron indexed file, damaged ones included
- `pieces`, `channels`: what a packed row is made of, read from tokens and structure channels alike
- `fim`: documents permuted for fill-in-the-middle as they are read
- `dataset`: packed rows that know which document each position belongs to, with their channels
- `blend`, `corpora`, `checks`: paths, corpus folders and settings, checked before training
- `base_module`, `module`: NeMo data modules over all of it

Importing this package is cheap; NeMo and megatron-core are imported where they are needed.
"""
