"""What a run runs on: devices, memory, ranks, threads that read ahead and write behind, a timeline.

May import quant, whose engines it makes. Knows no checkpoint and no model.
"""
