"""Advantages: one number per turn, from outcomes, gains or branches. registry.py lists them."""
