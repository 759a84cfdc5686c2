"""What lies in OUT beside the shards, and the proof of an output against recipe and source.

May import run, serving and what they import. Computes no statistics and walks no tokens.
"""
