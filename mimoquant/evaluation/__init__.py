"""How far a candidate's next-token distributions lie from the reference's, streamed layer by layer.

May import weights, calibration and what they import; of planning only what reads a config. Writes no checkpoint
and knows no page.
"""
