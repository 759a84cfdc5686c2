"""Small checkpoints in the published formats: names, placement in files, values.

May import weights and what it imports. Knows no plan.
"""
