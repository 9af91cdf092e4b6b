"""Runs, from the files of their folders: which there are, and their curves.

- `folders`: which folders are runs, their recipe and their end, from small files alone
- `events`: TensorBoard's files as curves, several files of a resumed run as one
- `curves`: the curves by what they mean, and the throughput
- `figures`: curves drawn by matplotlib; `page`: the drawings as one HTML page

torch and NeMo are not needed.
"""
