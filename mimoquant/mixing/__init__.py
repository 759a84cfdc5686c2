"""A format for each layer: what each costs in J, and which are worth their bytes.

May import evaluation, run and planning. Knows no page; writes nothing but what a resume needs.
"""
