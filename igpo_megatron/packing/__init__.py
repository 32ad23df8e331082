"""Rollout trees to packed rows and back."""
