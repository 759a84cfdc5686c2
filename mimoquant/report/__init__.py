"""Facts in, text and pages out.

May import wording and errors, and document modules for their types only. Computes nothing that a document lacks.
"""
