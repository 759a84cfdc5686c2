"""Does what a plan says, a step at a time: read, compute, prove, calibrate, rehearse.

May import planning and what it imports. Knows no page, no engine's contract and no other run.
"""
