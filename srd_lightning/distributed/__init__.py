"""Ranks: what they do together, and models that are spread over them.

Imports no other room. Begin with `process_group`; `placement` says where student and teacher are under each strategy.
"""
