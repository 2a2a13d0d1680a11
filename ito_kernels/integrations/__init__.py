"""Losses with the names and signatures of other libraries, one module per library.

To switch, change one import. A feature that needs the dense similarity matrix raises
NotImplementedError.
"""
