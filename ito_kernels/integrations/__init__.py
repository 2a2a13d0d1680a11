"""Losses under the names and signatures of other libraries, one module for each library.

Switching is a change of one import; what a loss cannot do without the dense matrix raises.
"""
