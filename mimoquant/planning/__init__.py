"""What will happen: recipe and headers become a plan, its bytes, its needs.

May import weights, calibration and what they import. Reads headers only and runs nothing.
"""
