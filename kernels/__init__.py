"""Arithmetic: definitions in plain torch, and fast versions proved against them."""
