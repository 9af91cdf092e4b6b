"""What C++ syntax trees say of each byte of a source file, and of whole corpora.

- `paint`: the structure channels of a file, painted on its bytes
- `tree`: tree-sitter's trees of several files as flat arrays, which the next three read
- `category`, `roles`: which of nine kinds of code a node belongs to, and why
- `definitions`, `facts`: types that a file defines and uses, and what it includes
- `dependencies`: levels in the graph of all files' includes and types
- `table`: the versioned mapping of names to ids

Importing this package is cheap; its modules import tree-sitter.
"""
