"""What the loss feels: Fisher matrices of the residual stream, by one walk forward and one back.

May import weights, calibration and what they import. Knows no plan, no recipe and no rounding.
"""
